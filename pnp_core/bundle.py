"""One guide for each number of sampling steps, kept together."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pnp_core.files import read_json, recover, write_directory
from pnp_core.guide import Guide
from pnp_core.guide.saved import check_config, is_count
from pnp_core.model_files import check_safetensors
from pnp_core.scheduling import SchedulerChoice

INDEX = "bundle.json"
FEWEST = 4  # steps, unless it is asked for fewer


class GuideBundle:
    """Guides by step count, as progressive halving leaves them.

    The largest count is that of the guide before halving, which serves any number of steps from
    there on. ``schedulers`` says which scheduler is best for a count, where that is known.
    """

    def __init__(
        self,
        guides: Mapping[int, Guide],
        schedulers: Mapping[int, SchedulerChoice] | None = None,
    ) -> None:
        if not guides:
            raise ValueError("A bundle needs at least one guide.")
        self.guides = dict(sorted(guides.items()))
        self.schedulers = dict(sorted((schedulers or {}).items()))

    @property
    def num_steps(self) -> tuple[int, ...]:
        """The step counts that there is a guide for, in ascending order."""
        return tuple(self.guides)

    @property
    def default_num_steps(self) -> int:
        """The fewest, but no fewer than 4 where there is a choice: with 2, images are far worse."""
        return next((n for n in self.num_steps if n >= FEWEST), self.num_steps[-1])

    def for_steps(self, num_steps: int) -> Guide:
        """The guide whose step count is nearest to ``num_steps``, by ratio."""
        return self.guides[self._nearest(num_steps)]

    def scheduler_for(self, num_steps: int) -> SchedulerChoice | None:
        """The scheduler that is best for that guide; None if the bundle does not say."""
        return self.schedulers.get(self._nearest(num_steps))

    def _nearest(self, num_steps: int) -> int:
        return nearest(self.guides, num_steps)

    def to(self, target: torch.device | str | torch.dtype) -> "GuideBundle":
        """Move every guide to a device, or to a dtype, in place."""
        for guide in self.guides.values():
            guide.to(target)
        return self

    def save(self, directory: str | Path) -> None:
        """Write the folder in one step: ``steps-N/`` for each guide and ``bundle.json``."""

        def fill(folder: Path) -> None:
            for num_steps, guide in self.guides.items():
                guide.save_pretrained(folder / f"steps-{num_steps}")
            index: dict[str, Any] = {"num_steps": self.num_steps}
            if self.schedulers:
                index["schedulers"] = {n: asdict(choice) for n, choice in self.schedulers.items()}
            (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

        write_directory(Path(directory), fill)

    @classmethod
    def load(cls, directory: str | Path) -> "GuideBundle":
        """Open a bundle, or the folder of a single guide as a bundle of one.

        A folder whose replacement was interrupted is put back first.

        Raises:
            ValueError: nothing of the kind is there, or a file is damaged.
            OSError: the folder has to be put back, and can't be.
        """
        directory = Path(directory)
        if not directory.exists():
            recover(directory)
        if (directory / INDEX).exists():
            counts, schedulers = read_index(directory / INDEX)
            return cls({n: load_guide(directory / f"steps-{n}") for n in counts}, schedulers)
        guide = load_guide(directory)
        return cls({guide.config.num_steps or 50: guide})


def read_index(file: Path) -> tuple[list[int], dict[int, SchedulerChoice]]:
    """What a bundle's index says: its step counts, and the schedulers that are best for them.

    Raises:
        ValueError: it is damaged.
    """
    index = read_json(file)
    try:
        counts = list(index["num_steps"])
        best = index.get("schedulers", {})  # bundles made before this were known have none
        keys = [int(n) if str(n).isdecimal() else n for n in best]
        if odd := [n for n in (*counts, *keys) if not is_count(n)]:
            raise ValueError(f"it has {odd[0]!r} for a number of steps")
        if not counts:
            raise ValueError("it names no guide")
        choices = [SchedulerChoice(**choice) for choice in best.values()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = str(error).rstrip(".") if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{file} is damaged ({why}): get the bundle again.") from None
    return counts, dict(zip(keys, choices, strict=True))


def nearest(counts: Iterable[int], num_steps: int) -> int:
    """Of some step counts, the one nearest to ``num_steps``, by ratio.

    Raises:
        ValueError: ``num_steps`` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"A number of steps is 1 or more, and not {num_steps!r}.")
    counts = list(counts)
    if num_steps >= max(counts):  # however large: a ratio may be too small for a float
        return max(counts)
    return min(counts, key=lambda n: abs(math.log(n / num_steps)))


def load_guide(directory: str | Path) -> Guide:
    """Open one guide's folder.

    Raises:
        ValueError: nothing of the kind is there, or a file is damaged.
    """
    directory = Path(directory)
    weights = directory / "diffusion_pytorch_model.safetensors"
    config = directory / "config.json"
    if not config.exists() or not weights.exists():
        raise ValueError(f"{directory} is not a guide: it needs config.json and {weights.name}.")
    check_config(read_json(config), directory)
    check_safetensors(weights)
    return Guide.from_pretrained(directory).eval()
