"""What a registered version carries beside its bundle: a card for people, and what MLflow runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from components.evaluation import Evaluation
from components.model_card import write_card
from components.params import Params
from components.verdict import Check


def complete(  # noqa: PLR0913, what a version says of itself, by name
    folder: Path,
    params: Params,
    *,
    lineage: Mapping[str, str],
    evaluations: Mapping[str, Evaluation],
    checks: Sequence[Check],
    champion: str,
    picture: Path,
) -> None:
    """Add README.md, MLmodel and what they name to a bundle's folder.

    Args:
        folder: of the bundle, which becomes a version.
        params: those that it was made with.
        lineage: what it was made of.
        evaluations: by model.
        checks: the verdict, as the version's page has it.
        champion: who it was compared with, or why with nobody, in a sentence.
        picture: unguided, CFG and guided, side by side.
    """
    from components.tracking.serving import make_servable

    write_card(
        folder,
        name=params.register_.name,
        lineage=lineage,
        evaluations=evaluations,
        checks=checks,
        champion=champion,
        picture=picture,
        dataset=Path(params.prepare.dataset),
    )
    first = next(iter(evaluations.values()))  # whose scale the card shows
    make_servable(folder, base=params.base, guidance_scale=first.guidance_scale)
