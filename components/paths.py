"""Where each stage writes, relative to the repository's root. `dvc.yaml` names the same paths."""

from pathlib import Path

PREPARED = Path("data/prepared")
CACHE = Path("data/cache")
DISTILLED = Path("guides/distilled")
BUNDLE = Path("guides/bundle")
EVALUATED = Path("results/evaluate")
# Sampled images, which stay while evaluations change.
SAMPLED = Path("results/sampled")
# Features of real images, by judge.
JUDGED = Path("results/judged")
REPORT = Path("results/report")
# Checkpoints of runs in progress: not versioned, safe to delete.
RUNS = Path("runs")
