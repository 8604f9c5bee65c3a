"""What a GPU takes for steps, training and caching at true size, with random weights.

    python -m benchmarks.gpu --run     # makes what is missing on this card, in 8 minutes
    python -m benchmarks.gpu --json    # what the committed results say
    python -m benchmarks.gpu --tiny    # all of it on a CPU with toys, to see that it runs

Stable Diffusion 1.5 at 512 px and XL at 1024 px, bf16, channels_last. A row is written as it is
made; a run that was stopped goes on, for the same card and code. With --json, the last line on
stdout is one JSON object of the largest card's figures, null where they are missing:

    over_plain, over_cfg   time of a tiny guide's step over a plain one's and CFG's, compiled by
                           repeated blocks; by base and batch size
    over_plain_graph       the same over a plain one's, both as CUDA graphs
    over_plain_eager       the same over a plain one's, eager, SDXL at batch 1
    sd15_24gb, sdxl_24gb   peak of a training step at the preset's micro-batch, GB
    …_samples_per_second   of training
    …_pairs_per_second     of caching
    tests                  marked `gpu`, of offloading and of waits
    missing, failed        names of rows
    of_other_code          rows that earlier code made
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.command import amount, command_parser, errors_in_one_line
from benchmarks.gpu.results import code_digest, run
from benchmarks.gpu.scale import Scale, toy_scale, true_scale
from benchmarks.gpu.table import as_markdown, main_card, summary
from benchmarks.plug import kernel_ratio
from components.environment import quiet
from pnp_core.files import read_json, write_text

RESULTS = Path("benchmarks/results/gpu.json")
TINY = Path("build/gpu-tiny.json")  # a CPU's results are no card's


@errors_in_one_line()
def main() -> None:
    """The command."""
    parser = command_parser("gpu", __doc__)
    parser.add_argument("--run", action="store_true", help="measure what is missing")
    parser.add_argument("--tiny", action="store_true", help="the same with toys on a CPU")
    parser.add_argument("--minutes", type=amount, default=8, help="that a run may take")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    arguments = parser.parse_args()
    quiet()
    path = TINY if arguments.tiny else RESULTS
    scale = toy_scale() if arguments.tiny else true_scale()
    if arguments.run or arguments.tiny:
        if not arguments.tiny and not torch.cuda.is_available():
            sys.exit(
                "error: PyTorch finds no GPU here (`python -m torch.utils.collect_env` says why); "
                "--tiny runs all of it on the CPU with toys"
            )
        run(scale, path, minutes=arguments.minutes, done=lambda: write_table(path, scale))
    results = read_json(path) if path.exists() else {}
    found = summary(results, scale, code_digest())
    if arguments.json:
        print(json.dumps(found))
        return
    write_table(path, scale)
    print(f"{path.with_suffix('.md')}: {main_card(results) or 'no GPU has measured this yet'}")


def write_table(path: Path, scale: Scale) -> None:
    """Write the tables beside the results."""
    results = read_json(path) if path.exists() else {}
    kernels = {} if results else {name: kernel_ratio(name)[0] for name in scale.bases}
    write_text(path.with_suffix(".md"), as_markdown(results, scale, kernels))


if __name__ == "__main__":
    main()
