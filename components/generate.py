"""An image from a prompt, with a guide in place of classifier-free guidance.

    python -m components.generate --guide guides/bundle --model zoo/models/openmoji "a red apple"

It is what any user of a guide does: load a stock pipeline, plug the guide in, call it. A model of
params.yaml is used as it says there: with its trigger words, negative prompt, scale and strength.
"""

import argparse
from functools import partial
from pathlib import Path

from components.cli import main
from components.params import Model, Params
from components.paths import BUNDLE


def run(params: Params, arguments: argparse.Namespace) -> None:
    """Write the image. Raises ValueError if guide or model can't be opened, or don't fit."""
    import torch

    from components.device import device
    from pnp_core.bundle import GuideBundle
    from pnp_core.fine_tunes import load_model, skip_layers
    from pnp_core.models import load_pipeline
    from pnp_core.plug import plug
    from pnp_core.single_file import configs_of

    bundle = GuideBundle.load(arguments.guide)
    row = row_of(arguments.model, params)
    pipe = load_pipeline(params.base, device=device())
    if row.path != params.base:
        pipe = load_model(row.path, base=pipe, configs=configs_of(params.base))
    skip_layers(pipe, row.clip_skip)
    plug(pipe, bundle, strength=row.strength if arguments.strength is None else arguments.strength)
    scale = arguments.guidance_scale or row.guidance_scale or params.evaluate.guidance_scale
    negative = row.negative_prompt if arguments.negative is None else arguments.negative
    image = pipe(
        f"{row.trigger} {arguments.prompt}".strip(),
        negative_prompt=negative or None,
        num_inference_steps=arguments.steps or min(bundle.num_steps),
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(arguments.seed),
    ).images[0]
    image.save(arguments.out)
    print(arguments.out)


def row_of(model: str | None, params: Params) -> Model:
    """A model of params.yaml by its name or its path, or another by its path; None: the base."""
    path = model or params.base
    if path in params.models:
        return params.models[path]
    same = [row for row in params.models.values() if row.path == path]
    return same[0] if same else Model(path=path, reference="")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m components.generate", description="Make an image with a guide."
    )
    parser.add_argument("prompt")
    parser.add_argument("--guide", type=Path, default=BUNDLE, help="default: %(default)s")
    parser.add_argument(
        "--model", help="a name in params.yaml, or the path of a fine-tune; default: the base"
    )
    parser.add_argument("--steps", type=int, help="default: the fewest that the guide is made for")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's, or evaluate's")
    parser.add_argument("--strength", type=float, help="default: the model's, or 1")
    parser.add_argument("--negative", metavar="PROMPT", help="what the image should not show")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="default: %(default)s")
    main(partial(run, arguments=parser.parse_args()))
