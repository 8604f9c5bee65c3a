"""What a teacher cache costs on the true architectures of Stable Diffusion, computed.

    python -m benchmarks.cache_cost                 # a table, in seconds
    python -m benchmarks.cache_cost --tflops 250    # hours on a GPU that sustains so much

FLOPs are counted by PyTorch on meta tensors. Hours follow from them and from the sustained speed
given; nothing is run.
"""

import torch

from benchmarks.command import amount, command_parser, errors_in_one_line
from benchmarks.cost import ARCHITECTURES, Forwards, unet_config
from components.environment import quiet
from pnp_core.cache import SampleBytes, sample_bytes
from pnp_core.metrics import count_flops
from pnp_core.models import pooled_width

PAIRS = 1_000_000


def architecture_bytes(name: str) -> SampleBytes:
    """Bytes of a cache's rows for one architecture: 4 latent channels, 77 tokens."""
    config = unet_config(name)
    size = config["sample_size"]
    pooled = pooled_width(config) if config.get("addition_embed_type") == "text_time" else 0
    return sample_bytes(
        latent=(4, size, size), text=(77, config["cross_attention_dim"]), pooled=pooled
    )


def row(name: str, tflops: float) -> str:
    """The architecture's line of the table in docs/own-models.md."""
    size = architecture_bytes(name)
    flops = count_flops(Forwards(unet_config(name), "meta", torch.float32).cfg)
    cells = [
        name,
        f"{size.pair:,}",
        f"{size.image:,}",
        f"{size.prompt:,}",
        f"{PAIRS * size.pair / 1e9:,.0f} GB",
        f"{flops / 1e12:.2f}",
        f"{PAIRS * flops / (tflops * 1e12) / 3600:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


@errors_in_one_line()
def main() -> None:
    """Print a table with a row for each architecture."""
    parser = command_parser("cache_cost", __doc__)
    parser.add_argument("--tflops", type=amount, default=100, help="sustained, of one GPU")
    arguments = parser.parse_args()
    quiet()
    print("| | bytes a pair | an image | a prompt | a million pairs | TFLOP a pair | hours |")
    print("|---|---|---|---|---|---|---|")
    for name in ARCHITECTURES:
        print(row(name, arguments.tflops))


if __name__ == "__main__":
    main()
