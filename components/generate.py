"""An image from a prompt, with a guide in place of classifier-free guidance.

    python -m components.generate --guide guides/bundle --model zoo/models/openmoji "a red apple"
    python -m components.generate --guide models:/pnp-guide@champion --compare "a red apple"

It is what any user of a guide does: load a stock pipeline, plug the guide in, call it. A model of
params.yaml is used as it says there: with its trigger words, negative prompt, scale and strength.
"""

import argparse
import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.cli import main, utf8
from components.inputs import check_num_steps
from components.methods import METHODS
from components.mlflow_place import without_secrets
from components.params import Model, Params
from components.paths import BUNDLE
from pnp_core.files import atomic_file, check_writable, old_of
from pnp_core.model_files import check_model_files

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image


REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")

MOST_STEPS = 10_000
MOST = 1000  # of a scale or a strength: images are noise long before
MOST_IN_TITLE = 400  # characters of a prompt


def run(params: Params, arguments: argparse.Namespace) -> None:
    """Write the image. Raises ValueError if guide or model can't be opened, or don't fit."""
    check_out(arguments.out)
    check_guide(arguments.guide)
    check_named(arguments.model, params)
    from components.rows import load_row
    from pnp_core.bundle import GuideBundle
    from pnp_core.plug import checked, plug
    from pnp_core.scheduling import of_scheduler

    row = row_of(arguments.model, params)
    for model in (params.base, row.path):
        check_model_files(model)
    if arguments.steps is not None:
        check_num_steps(arguments.steps, params.base)
    with guide_folder(arguments.guide, params) as (folder, guide):
        bundle = GuideBundle.load(folder)
    pipe = load_row(row, params.base)
    num_steps = bundle.default_num_steps if arguments.steps is None else arguments.steps
    best = bundle.scheduler_for(num_steps)
    if best is not None:
        best.set(pipe)
    scales = (arguments.guidance_scale, row.guidance_scale, params.evaluate.guidance_scale)
    scale = next(scale for scale in scales if scale is not None)
    negative = row.negative_prompt if arguments.negative is None else arguments.negative
    prompt = f"{row.trigger} {arguments.prompt}".strip()
    asked = {
        "prompt": prompt,
        "negative_prompt": negative or None,
        "num_inference_steps": num_steps,
    }
    strength = row.strength if arguments.strength is None else arguments.strength
    made: dict[str, Image.Image] = {}
    if arguments.compare:
        checked(pipe, bundle, strength, 0)  # before two pictures are made without it
        for method, w in (("unguided", 1.0), ("cfg", scale)):
            image, seconds = timed(pipe, arguments.seed, guidance_scale=w, **asked)
            made[f"{METHODS[method]}, {seconds:.2f} s"] = image
    plug(pipe, bundle, strength=strength)
    if arguments.compare:
        image, seconds = timed(pipe, arguments.seed, guidance_scale=scale, **asked)
        made[f"{METHODS['guided']}, {seconds:.2f} s"] = image
        image = side_by_side(made, title=title_of(prompt, arguments.seed))
    else:
        image = sample(pipe, arguments.seed, guidance_scale=scale, **asked)
    with atomic_file(arguments.out.resolve()) as new:  # where a link leads
        image.save(new)
    print(
        f"guide {guide} on {row.path}: scale {scale:g}, {num_steps} steps, "
        f"{of_scheduler(pipe.scheduler) or type(pipe.scheduler).__name__}, seed {arguments.seed}"
    )
    for label in made:
        print(label)
    print(arguments.out)


def check_out(path: Path) -> None:
    """Raise ValueError if no image can be written there."""
    from PIL import Image

    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--out {path}: name a file in a folder that there is")
    try:
        check_writable(path.parent)
    except ValueError as error:
        raise ValueError(f"--out {path}: {error}") from None
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:  # some kinds are read alone, or by what is not installed
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind or "none")
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"--out {path}: end its name with .png, or as another kind of image does"
        ) from error


def check_guide(guide: str) -> None:
    """Raise ValueError for what can be no guide, before anything is opened."""
    if guide.startswith("models:"):
        if not REGISTERED.fullmatch(guide):
            raise ValueError(
                f"--guide {guide}: write models:/<name>@<alias> or models:/<name>/<version>"
            )
    elif not (Path(guide).is_dir() or old_of(Path(guide)).is_dir()):
        said = "it is no folder" if Path(guide).exists() else "there is no such folder"
        raise ValueError(f"--guide {guide}: {said}; the pipeline puts a guide into {BUNDLE}")


def check_named(model: str | None, params: Params) -> None:
    """Raise ValueError for a word that is neither a name of params.yaml nor a path that there is.

    What has a slash is looked at as a path, or a hub's, later.
    """
    if model is None or "/" in model or model in params.models or Path(model).exists():
        return
    names = ", ".join(params.models)
    raise ValueError(f"--model {model}: no such path, and the models of params.yaml are {names}")


@contextmanager
def guide_folder(guide: str, params: Params) -> Iterator[tuple[Path, str]]:
    """Where a guide's files are while it is open, and what it is called in a sentence.

    `guide` is a folder, or `models:/<name>@<alias>` or `models:/<name>/<version>` of the registry.
    Raises ValueError if there is no such version, TrackingError if MLflow can't tell.
    """
    if not guide.startswith("models:"):
        yield Path(guide), guide
        return
    from components.tracking import Registry
    from components.tracking.store import database_of, store_uri

    asked = REGISTERED.fullmatch(guide)
    assert asked, "check_guide has seen it"
    uri = store_uri(params.tracking)
    database = database_of(uri)
    if database is not None and not database.exists():  # asking MLflow would make it
        raise ValueError(
            f"--guide {guide}: {asked['name']} has no versions here, for there is no MLflow at "
            f"{without_secrets(uri)}: name the store that has it as tracking.uri, or a guide's "
            "folder"
        )
    registry = Registry(params.tracking, asked["name"])
    version = asked["version"] or registry.named(asked["alias"])
    if version is None:
        raise ValueError(
            f"--guide {guide}: {asked['name']} has no {asked['alias']} in MLflow at "
            f"{registry.store.name}: promote a version (python -m components.promote), or name one "
            f"as models:/{asked['name']}/<version>"
        )
    with registry.folder(version) as folder:
        yield folder, f"{asked['name']} version {version}"


def row_of(model: str | None, params: Params) -> Model:
    """A model of params.yaml by its name or its path, or another by its path; None: the base."""
    from components.rows import is_same

    path = model or params.base
    if path in params.models:
        return params.models[path]
    same = [row for row in params.models.values() if is_same(row.path, path)]
    return same[0] if same else Model(path=path, reference="")


def sample(pipe: "DiffusionPipeline", seed: int, **asked: Any) -> "Image.Image":
    """One image of the seed."""
    import torch

    image: Image.Image = pipe(generator=torch.Generator().manual_seed(seed), **asked).images[0]
    return image


def timed(pipe: "DiffusionPipeline", seed: int, **asked: Any) -> "tuple[Image.Image, float]":
    """One image, and the seconds that it took when everything was warm."""
    sample(pipe, seed, **asked)
    began = time.perf_counter()
    image = sample(pipe, seed, **asked)  # a PIL image: whatever computed it has ended
    return image, time.perf_counter() - began


def side_by_side(images: "dict[str, Image.Image]", *, title: str) -> "Image.Image":
    """Images in a row, each under its label."""
    import numpy as np

    from components.pictures import grid

    cell = max(128, next(iter(images.values())).width)
    rows = {"": np.stack([np.asarray(image.convert("RGB")) for image in images.values()])}
    return grid(rows, list(images), title=title, cell=cell)


def title_of(prompt: str, seed: int) -> str:
    """Of a picture: the prompt, or the beginning of a long one, and the seed."""
    words = " ".join(prompt.split())
    shown = words if len(words) <= MOST_IN_TITLE else f"{words[:MOST_IN_TITLE]}…"
    return f"{shown}, seed {seed}"


def seed(text: str) -> int:
    """A seed that PyTorch takes."""
    number = int(text)
    if not -(2**63) <= number < 2**64:
        raise argparse.ArgumentTypeError(
            f"a number below 2^64, from -2^63 on, is needed, not {text}"
        )
    return number


def steps(text: str) -> int:
    """A number of steps."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least one step is needed, not {number}")
    if number > MOST_STEPS:
        raise argparse.ArgumentTypeError(f"{MOST_STEPS:,} steps are the most")
    return number


def utf8_path(given: str) -> Path:
    """A path, which is printed, so that it is UTF-8."""
    return Path(utf8(given))


def factor(text: str) -> float:
    """A scale or a strength."""
    number = float(text)
    if not 0 <= number <= MOST:
        raise argparse.ArgumentTypeError(f"a number from 0 to {MOST} is needed, not {text}")
    return number


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m components.generate", description="Make an image with a guide."
    )
    parser.add_argument("prompt", type=utf8)
    parser.add_argument(
        "--guide",
        type=utf8,
        default=BUNDLE.as_posix(),
        help="a folder, or models:/<name>@champion of the registry; default: %(default)s",
    )
    parser.add_argument(
        "--model",
        type=utf8,
        help="a name in params.yaml, or the path of a fine-tune; default: the base",
    )
    parser.add_argument(
        "--steps", type=steps, help="default: the fewest from 4 on that the guide is made for"
    )
    parser.add_argument("--guidance-scale", type=factor, help="default: the model's, or evaluate's")
    parser.add_argument("--strength", type=factor, help="default: the model's, or 1")
    parser.add_argument(
        "--negative", type=utf8, metavar="PROMPT", help="what the image should not show"
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also without guidance and with CFG, in one picture, with the time of each",
    )
    parser.add_argument(
        "--out", type=utf8_path, default=Path("out.png"), help="default: %(default)s"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(partial(run, arguments=parsed()), reads_inputs=False)
