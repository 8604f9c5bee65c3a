"""Train all models of the zoo anew, one after the other, and report on them.

    python -m zoo.world --device cuda --minutes 8
    python -m zoo.world --minutes 1200              # on a CPU

An interrupted run is taken up again by the same command. Models that need not wait for one another
train side by side on a GPU, which such small ones don't fill.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from zoo.dataset import COMPANION_STYLE, FINETUNE_STYLES, LORA_STYLE


class Job(NamedTuple):
    """One model to train."""

    share: float  # of all minutes
    batch_size: int
    command: tuple[str, ...]


def stages(out: Path, runs: Path, *, side_by_side: bool) -> list[list[Job]]:
    """What to train: jobs of one stage need those of the stages before."""
    options: dict[str, tuple[str, ...]] = {style: ("--style", style) for style in FINETUNE_STYLES}
    options[f"{LORA_STYLE}-lora"] = ("--style", LORA_STYLE, "--lora")
    options[f"companions/{COMPANION_STYLE}"] = ("--style", COMPANION_STYLE)
    each = 0.2 if side_by_side else 0.2 / len(options)
    base, vae = str(out / "base"), str(runs / "vae")
    ae = ("zoo.autoencoder", "--out", vae)
    judge = ("zoo.judge", "--out", str(out / "judge"))
    larger = ("--augmentations", "24", "--learning-rate", "1e-3") if side_by_side else ()
    teacher = ("zoo.base", "--vae", vae, *larger, "--out", base)
    more = ("--augmentations", "8") if side_by_side else ()
    tuned = [
        ("zoo.finetune", *style, *more, "--base", base, "--out", str(out / name))
        for name, style in options.items()
    ]
    if side_by_side:
        return [
            [Job(0.3, 128, ae), Job(0.2, 512, judge)],
            [Job(0.5, 1024, teacher)],
            [Job(each, 256, command) for command in tuned],
        ]
    return [
        [Job(0.25, 16, ae), Job(0.15, 128, judge)],
        [Job(0.4, 64, teacher)],
        [Job(each, 64, command) for command in tuned],
    ]


def run_stage(jobs: list[Job], args: argparse.Namespace, *, side_by_side: bool) -> None:
    """Raises CalledProcessError, once the other jobs of the stage have ended, if one fails."""
    started = []
    for job in jobs:
        command = [
            sys.executable, "-m", *job.command, "--device", args.device, "--runs", str(args.runs),
            "--minutes", f"{job.share * args.minutes:g}", "--seed", str(args.seed),
            "--batch-size", str(job.batch_size),
        ]  # fmt: skip
        if side_by_side:
            command += ["--threads", str(max(1, (os.cpu_count() or 1) // len(jobs)))]
        started.append(subprocess.Popen(command))
        if not side_by_side:
            started[-1].wait()
    codes = [process.wait() for process in started]
    for process, code in zip(started, codes, strict=True):
        if code:
            raise subprocess.CalledProcessError(code, process.args)


def main() -> None:
    """Train all models, side by side where that is possible, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, required=True, help="of training, in all")
    parser.add_argument("--out", type=Path, default=Path("zoo/models"))
    parser.add_argument("--runs", type=Path, default=Path("zoo/runs"), help="checkpoints")
    parser.add_argument("--num-images", type=int, default=1000, help="of a measurement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    side_by_side = args.device == "cuda"
    try:
        for jobs in stages(args.out, args.runs, side_by_side=side_by_side):
            run_stage(jobs, args, side_by_side=side_by_side)
        subprocess.run(
            [
                sys.executable, "-m", "zoo.report", "--device", args.device,
                "--models", str(args.out), "--out", str(args.out / "report"),
                "--num-images", str(args.num_images),
            ],
            check=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(error.cmd)}` failed with {error.returncode}; see above")


if __name__ == "__main__":
    main()
