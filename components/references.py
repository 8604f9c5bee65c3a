"""What judges see in real images, kept: nobody looks at the same references twice.

results/judged/<judge>-<reference>.safetensors holds the features of all images of one reference by
one judge, and KID's own sum of them, for every model and run. It says what else they depend on,
with their SHA-256: what is of something else is computed anew, and so is what is not whole.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import dataset
from components.paths import JUDGED, PREPARED
from pnp_core.files import read_json, sha256_file, write_tensors

if TYPE_CHECKING:
    import numpy as np

    from components.judging import Judge
    from components.params import Params
    from components.scores import RealImages

OF_A_JUDGE = (".safetensors", ".json", ".txt", ".pt")
KEPT = ("features", "kernel_mean")
# A multiple of what judges look at in one go, so that they see the same batches as of all at once.
IMAGES_AT_ONCE = 256
# By whose code latents are denoised, and pictures become features.
DENOISING = ("torch", "diffusers", "transformers")
PACKAGES = ("torch", "transformers", "pillow", "torchvision", "timm", "clean-fid")


class References:
    """The real images that a model is compared with, and what judges see in them.

    Args:
        path: as params.yaml names it.
        params: of the run.
    """

    def __init__(self, path: str, params: "Params") -> None:
        self._path, self._params = path, params

    def seen_by(self, judge: "Judge") -> "RealImages":
        """What the judge sees in all images. Raises ValueError if they can't be read."""
        import numpy as np

        from components.scores import RealImages

        recipe = {**self._recipe, **judged_by(judge)}
        path = kept_at(recipe["judge"], recipe["reference"])
        found = read(path, recipe) if path.exists() else None
        if found is None:
            features = self._features(judge)
            found = {
                "features": features,
                "kernel_mean": np.array(RealImages(features).kernel_mean),
            }
            write(path, recipe, found)
        return RealImages(found["features"], kernel_mean=float(found["kernel_mean"]))

    def _features(self, judge: "Judge") -> "np.ndarray":
        """Of all images, `IMAGES_AT_ONCE` of which are in memory."""
        import numpy as np

        batches = dataset.reference_batches(self._path, self._params, IMAGES_AT_ONCE)
        return np.concatenate(list(map(judge.features, batches)))

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        """What the images are."""
        return {
            "reference": files_hash(Path(self._path)),
            "is_prepared": Path(self._path) == PREPARED,
            "image_column": self._params.prepare.image_column,
            "resolution": read_json(PREPARED / "manifest.json")["resolution"],
        }


def judged_by(judge: "Judge") -> dict[str, Any]:
    """What a judge's features depend on, besides the images."""
    from components import judging, scores

    code = [sha256_file(Path(str(module.__file__))) for module in (dataset, judging, scores)]
    return {
        "judge": judge_hash(judge.folder),
        "device": judge.device,
        "code": code,
        "packages": {name: installed(name) for name in PACKAGES},
    }


def denoised_by() -> dict[str, Any]:
    """What denoises and measures it: what other code measured is not taken for what this does."""
    import pnp_core

    files = [Path(__file__).with_name("sampling.py")]
    files += sorted(Path(pnp_core.__file__).parent.rglob("*.py"))
    return {
        "code": digest([sha256_file(file) for file in files]),
        "packages": {name: installed(name) for name in DENOISING},
    }


def kept_at(judge: str, reference: str) -> Path:
    """Where the features are, by the hashes of a judge and of the reference."""
    return JUDGED / f"{judge[:16]}-{reference[:16]}.safetensors"


def read(path: Path, recipe: Mapping[str, Any]) -> "dict[str, np.ndarray] | None":
    """What `path` holds; None if it is of another recipe, or not whole, which is said."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            said, found = file.metadata(), {name: file.get_tensor(name) for name in KEPT}
        if said["sha256"] != checksum(found):
            raise ValueError("its checksum is another")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path} is not whole ({error}): its features are computed anew", flush=True)
        return None
    return found if said["recipe"] == json.dumps(recipe, sort_keys=True) else None


def write(path: Path, recipe: Mapping[str, Any], found: "Mapping[str, np.ndarray]") -> None:
    """Keep it, in one atomic step."""
    import torch

    said = {"recipe": json.dumps(recipe, sort_keys=True), "sha256": checksum(found)}
    write_tensors(path, {name: torch.from_numpy(found[name]) for name in KEPT}, said)


def checksum(found: "Mapping[str, np.ndarray]") -> str:
    """SHA-256 of all numbers."""
    return hashlib.sha256(b"".join(found[name].tobytes() for name in KEPT)).hexdigest()


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def judge_hash(folder: str) -> str:
    """SHA-256 of a judge's weights and settings."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.suffix in OF_A_JUDGE:
            digest.update(f"\0{file.name}\0{sha256_file(file)}".encode())
    return digest.hexdigest()


def files_hash(path: Path) -> str:
    """SHA-256 of a file, or of the data files in a folder with their names."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest([(file.relative_to(path).as_posix(), sha256_file(file)) for file in files])


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
