"""What a registered version carries beside its bundle: a card for people, and what MLflow runs."""

from collections.abc import Mapping
from pathlib import Path

from components.evaluation import Evaluation
from components.model_card import write_card
from components.params import Params
from components.verdict import checks, clean


def complete(
    folder: Path,
    params: Params,
    lineage: Mapping[str, str],
    evaluations: Mapping[str, Evaluation],
    picture: Path,
) -> None:
    """Add README.md, MLmodel and what they name to a bundle's folder.

    Args:
        folder: of the bundle, which becomes a version.
        params: those that it was made with.
        lineage: what it was made of.
        evaluations: by model.
        picture: unguided, CFG and guided, side by side.
    """
    from components.tracking.serving import make_servable

    found = checks(evaluations, None, params.promote)
    write_card(
        folder,
        name=params.register_.name,
        lineage=lineage,
        evaluations=evaluations,
        checks=[clean(lineage["git_commit"], allow_dirty=False), *found],
        picture=picture,
        dataset=Path(params.prepare.dataset),
    )
    first = next(iter(evaluations.values()))  # whose scale the card shows
    make_servable(folder, base=params.base, guidance_scale=first.guidance_scale)
