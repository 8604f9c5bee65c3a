"""What a model's configs say of whether a guide can be made for it, or learn from it.

Nothing here loads a model, or imports torch or diffusers: a base that can't work is told at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pnp_core.files import opened_weights, read_object
from pnp_core.model_files import LORA_FILE, configs_of

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Of a UNet's config: other entries mean that it is told more than a guide knows of.
PLAIN: dict[str, tuple[Any, ...]] = {
    "encoder_hid_dim_type": (None,),  # it projects the text states that it is given
    "addition_embed_type": (None, "text_time"),
}
VAES = ("AutoencoderKL", "AsymmetricAutoencoderKL")  # whose encoders give a mean and a deviation
NO_ALPHAS = ("FlowMatch", "EDM")  # schedulers whose names begin so have no alphas_cumprod
# Without a signal at the last timestep: what says so, and what else it may be set to.
NO_SIGNAL = {
    "rescale_betas_zero_snr": (True, "false"),
    "beta_schedule": (
        "squaredcos_cap_v2",
        "what the base was trained with (scaled_linear, for Stable Diffusion)",
    ),
}
# Of a scheduler's config: two that are not the same here have other noise at a timestep.
BETAS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")


def check_base_configs(base: str | Path) -> None:
    """Look at a base's configs, and at what its single file says of itself.

    Raises:
        ValueError: no guide can be made for it; or its file contradicts its configs.
    """
    configs = configs_of(base)
    if configs is None:
        return
    unet, vae = (_config(configs / part / "config.json") for part in ("unet", "vae"))
    check_not_distilled(base)
    if unet:
        check_told(unet)
    size, channels = unet.get("sample_size"), unet.get("in_channels")
    if unet and not isinstance(size, int):
        raise ValueError(
            f"{configs / 'unet/config.json'} has sample_size {size}, and a cache is made of square "
            "latents: write their width there, one whole number."
        )
    if vae.get("_class_name", VAES[0]) not in VAES:
        raise ValueError(
            f"The VAE of {base} is an {vae['_class_name']}, which does not tell how uncertain its "
            f"latents are: put the base's own in its place, an {VAES[0]}."
        )
    if unet and channels != vae.get("latent_channels", channels):
        raise ValueError(
            f"The UNet of {base} has {channels} input channels and its VAE {vae['latent_channels']}"
            ": it is told an image beside the text, as for inpainting. Name a text-to-image base."
        )
    for name in ("latents_mean", "latents_std"):
        if vae.get(name) is not None:
            raise ValueError(
                f"The VAE of {base} has {name}, and caches are made of latents that scaling_factor "
                "alone scales: take a base without."
            )
    scheduler = _config(configs / "scheduler/scheduler_config.json")
    check_scheduler(scheduler)
    said, by = schedule_of(base, weights_only=True)
    if scheduler and (differing := _first_difference(said, scheduler)):
        name, value, other = differing
        raise ValueError(
            f"{base} has {name} {value!r} ({by}), and its scheduler's config {other!r}: put the "
            f"configs of its diffusers folder into {_folder(base)}, with what it was trained with "
            "in their scheduler_config.json."
        )


def check_told(unet: Mapping[str, Any]) -> None:
    """Raise ValueError if a UNet of this config is told more than a guide knows of."""
    for name, allowed in PLAIN.items():
        if (entry := unet.get(name)) not in allowed:
            raise ValueError(
                f"This UNet has {name} {entry!r}: it is told more than a guide knows of, so there "
                "is none for it."
            )
    if not isinstance(width := unet.get("cross_attention_dim", 0), int):
        raise ValueError(
            f"This UNet has cross_attention_dim {width}: a guide knows of one width of text states "
            "only."
        )


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a base's scheduler, of this config, can't be distilled."""
    name, prediction_type = config.get("_class_name", ""), predicted(config)
    if name.startswith(NO_ALPHAS):
        raise ValueError(
            f"{name} has no alphas_cumprod: the base model needs a discrete variance-preserving "
            "scheduler such as DDIMScheduler."
        )
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"The scheduler's prediction_type is {prediction_type!r}; supported: "
            f"{', '.join(PREDICTION_TYPES)}."
        )
    for entry, (value, other) in NO_SIGNAL.items():
        if prediction_type == "epsilon" and config.get(entry) == value:
            raise ValueError(
                "The base's scheduler says that it predicts epsilon and that its last timestep has "
                f"no signal ({entry} is {value}), where epsilon says nothing of the image: set "
                "prediction_type to what the base was trained for (v_prediction, for most), or "
                f"{entry} to {other}, in its scheduler_config.json."
            )


def check_prediction(path: str | Path, base: str | Path, *, teaches: bool) -> None:
    """Compare what a fine-tune predicts with what the base does, as far as files say it.

    A folder's scheduler config does, and marks in a single file. Of one that ``teaches``, the noise
    at each timestep is compared too.

    Raises:
        ValueError: they differ; or it is guidance-distilled.
    """
    check_not_distilled(path)
    folder = configs_of(base) or Path(base)
    ours = _config(folder / "scheduler/scheduler_config.json")
    theirs, by = schedule_of(path)
    if not teaches:
        theirs = {k: v for k, v in theirs.items() if k == "prediction_type"}
    if ours and (differing := _first_difference(theirs, ours)):
        name, value, other = differing
        remedy = "take it out of the companions" if teaches else "leave this model out"
        raise ValueError(
            f"{path} has {name} {value!r} ({by}), the base {other!r}, and a guide is for models "
            f"that predict what its base does: {remedy}, or correct there what is not so."
        )


def check_not_distilled(path: str | Path) -> None:
    """Raise ValueError if a model's files say that its UNet is told ``w``, as an LCM's is."""
    folder = _folder(path)
    width = _config(folder / "unet/config.json").get("time_cond_proj_dim")
    told = f"time_cond_proj_dim is {width}" if width is not None else ""
    if Path(path).is_file():
        with opened_weights(Path(path)) as file:
            names = [key for key in file.keys() if "time_embed" in key and "cond_proj" in key]  # noqa: SIM118
        told = told or (f"it has {names[0]}" if names else "")
    if told:
        raise ValueError(
            f"The UNet of {path} is guidance-distilled itself ({told}), as an LCM's is: no guide "
            "can be made for it or learn from it. Take the model that it was distilled from."
        )


def schedule_of(path: str | Path, *, weights_only: bool = False) -> tuple[dict[str, Any], str]:
    """What a model's own files say of its schedule, as entries of a scheduler's config.

    Args:
        path: of the model.
        weights_only: as its weights' file says it, not the config beside that.

    Returns:
        The entries, none where nothing is said, and where they are said.
    """
    path, place = Path(path), _folder(path) / "scheduler/scheduler_config.json"
    if place.exists() and not weights_only:
        config = read_object(place)
        if config.get("_class_name", "").startswith(NO_ALPHAS):
            return {"prediction_type": config["_class_name"]}, str(place)
        known = {name: config[name] for name in BETAS if name in config}
        zero_snr = bool(config.get("rescale_betas_zero_snr"))
        return known | {
            "prediction_type": predicted(config),
            "rescale_betas_zero_snr": zero_snr,
        }, str(place)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        return {}, ""
    with opened_weights(file) as weights:
        keys, metadata = set(weights.keys()), weights.metadata() or {}
    # Empty weights of these names are how a checkpoint says it, and this entry how a LoRA does.
    # Both are left out by many: without them, nothing is known.
    if "v_pred" in keys:
        said: dict[str, Any] = {"prediction_type": "v_prediction"}
        if "ztsnr" in keys:
            said["rescale_betas_zero_snr"] = True
        return said, "its weight v_pred"
    if metadata.get("modelspec.prediction_type") in ("v", "v_prediction"):
        return {"prediction_type": "v_prediction"}, "its modelspec.prediction_type"
    return {}, ""


def num_train_timesteps(base: str | Path) -> int | None:
    """How many timesteps a base has; None where no configs here say it."""
    configs = configs_of(base)
    number = configs and _config(configs / "scheduler/scheduler_config.json").get(BETAS[0])
    return number if isinstance(number, int) else None


def image_size(base: str | Path) -> int | None:
    """How wide and high a base's images are, in pixels; None where no configs here say it.

    Raises:
        ValueError: see :func:`pnp_core.model_files.config_folder`.
    """
    configs = configs_of(base)
    if configs is None:
        return None
    unet, vae = (configs / part / "config.json" for part in ("unet", "vae"))
    if not (unet.exists() and vae.exists()):
        return None
    size, widths = read_object(unet).get("sample_size"), read_object(vae).get("block_out_channels")
    if not (isinstance(size, int) and isinstance(widths, list) and widths):
        return None
    return int(size * 2 ** (len(widths) - 1))


def predicted(scheduler: Mapping[str, Any]) -> Any:
    """The prediction type of a scheduler's config."""
    return scheduler.get("prediction_type", "epsilon")


def _folder(path: str | Path) -> Path:
    """Where a model's own configs lie: beside a single file, in a folder of its name."""
    path = Path(path)
    return path.with_suffix("") if path.is_file() else path


def _config(file: Path) -> dict[str, Any]:
    return read_object(file) if file.exists() else {}


def _first_difference(
    said: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """The first entry that a scheduler's config has otherwise: its name, as said, and as there."""
    defaults = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    there = defaults | dict(scheduler)
    for name, value in said.items():
        if name in there and there[name] != value:
            return name, value, there[name]
    return None
