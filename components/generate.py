"""An image from a prompt, with a guide in place of classifier-free guidance.

    python -m components.generate --guide guides/bundle --model zoo/models/openmoji "a red apple"

It is what any user of a guide does: load a stock pipeline, plug the guide in, call it.
"""

import argparse
from functools import partial
from pathlib import Path

from components.cli import main
from components.params import Params
from components.paths import BUNDLE


def run(params: Params, arguments: argparse.Namespace) -> None:
    """Write the image. Raises ValueError if guide or model can't be opened, or don't fit."""
    import torch

    from components.device import device
    from pnp_core.bundle import GuideBundle
    from pnp_core.models import load_pipeline, load_unet
    from pnp_core.plug import plug

    bundle = GuideBundle.load(arguments.guide)
    pipe = load_pipeline(params.base, device=device())
    if arguments.model not in (None, params.base):
        pipe.unet = load_unet(arguments.model, base=pipe)
    plug(pipe, bundle, strength=arguments.strength)
    image = pipe(
        arguments.prompt,
        negative_prompt=arguments.negative,
        num_inference_steps=arguments.steps or min(bundle.num_steps),
        guidance_scale=arguments.guidance_scale or params.evaluate.guidance_scale,
        generator=torch.Generator().manual_seed(arguments.seed),
    ).images[0]
    image.save(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m components.generate", description="Make an image with a guide."
    )
    parser.add_argument("prompt")
    parser.add_argument("--guide", type=Path, default=BUNDLE, help="default: %(default)s")
    parser.add_argument("--model", help="the base or a fine-tune of it; default: the base")
    parser.add_argument("--steps", type=int, help="default: the fewest that the guide is made for")
    parser.add_argument("--guidance-scale", type=float, help="default: that of evaluate")
    parser.add_argument("--strength", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--negative", metavar="PROMPT", help="what the image should not show")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out.png"), help="default: %(default)s")
    main(partial(run, arguments=parser.parse_args()))
