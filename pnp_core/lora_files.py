"""What can be told of a LoRA by its file's header: of which modules of a UNet it is made.

Nothing here imports torch or diffusers, see :mod:`pnp_core.model_files`.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from pnp_core.files import opened_weights

# A LoRA's matrix for a module of a UNet: by diffusers, as now and as earlier, or by kohya's tools.
MATRIX = re.compile(
    r"(?:unet\.|lora_unet_)(?P<module>.+?)(?:[._]lora)?[._](?:lora_)?(?P<kind>A|B|down|up)\.weight"
)
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
KOHYA_READ = (".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale")
# Names of the original layout, whose blocks are numbered in another way.
ORIGINAL = re.compile(r"(input|output)_blocks|middle_block|time_embed_|label_emb|unet_out_")


def check_lora_keys(path: Path, keys: Iterable[str]) -> None:
    """Raise ValueError if diffusers reads nothing for a UNet from a LoRA of these keys."""
    keys = sorted(keys)
    if any(key.startswith("unet.") for key in keys):
        return
    if not any(key.startswith("lora_unet_") for key in keys):
        raise ValueError(
            f"The LoRA {path} has nothing for a UNet: its keys begin neither with unet. nor with "
            f"lora_unet_, the first one is {keys[0]}."
        )
    for key in keys:
        if not (key.startswith(KOHYA) and key.endswith(KOHYA_READ)):
            raise ValueError(
                f"The LoRA {path} is of a kind that diffusers does not read: it has {key}."
            )


def check_lora_shapes(path: Path, unet: Path) -> None:
    """Compare a LoRA's matrices with the modules of the UNet in a folder.

    Names of the original layout, as of kohya's LoRAs for SDXL, are left to loading.

    Raises:
        ValueError: the UNet lacks a module, or has it of another width.
    """
    matrices = {}
    for key, shape in shapes_of([path]).items():
        if ORIGINAL.search(key):
            return
        if found := MATRIX.fullmatch(key):
            matrices[key] = (_flat(found["module"]), found["kind"], shape)
    weights = shapes_of(sorted(unet.glob("*.safetensors")))
    modules = {_flat(k.removesuffix(".weight")): v for k, v in weights.items() if len(v) > 1}
    for key, (module, kind, shape) in matrices.items():
        if module not in modules:
            raise ValueError(
                f"{path} is no LoRA for the base: its {key} is for a module that {unet} lacks"
            )
        side = 1 if kind in ("A", "down") else 0  # in and out, with the rank between them
        width, own = shape[side], modules[module][side]
        if width != own:
            raise ValueError(
                f"{path} is no LoRA for the base: its {key} is {width} wide, the module in {unet} "
                f"{own}"
            )


def shapes_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """The shape of every weight in .safetensors files."""
    shapes = {}
    for file in files:
        with opened_weights(file) as weights:
            for key in weights.keys():  # noqa: SIM118
                shapes[key] = list(weights.get_slice(key).get_shape())
    return shapes


def _flat(module: str) -> str:
    """A module's name as kohya's tools write it, from any of the layouts."""
    name = module.replace(".processor.", ".").replace(".", "_")
    return f"{name}_0" if name.endswith("to_out") else name
