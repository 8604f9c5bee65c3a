"""The champion as a report needs it: what it was measured to be, and its pictures."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from components.evaluation import Evaluation
from components.report import gallery
from components.report.gallery import GuidedPictures

if TYPE_CHECKING:
    from components.tracking import Registry

# Else its pictures say nothing beside ours.
ALIKE = (
    *("base_hash", "model_hash", "guidance_scale", "strength"),
    *("trigger", "clip_skip", "timestep_spacing"),
)


@dataclass(frozen=True, kw_only=True)
class Champion:
    """Who a guide is compared with.

    Attributes:
        said: a sentence: with whom it is compared, or why with nobody.
        version: None if there is none, or if it could not be told.
        evaluations: by model; None if there are none to compare with.
        pictures: None if there are none to show.
        no_pictures: why not, in a sentence.
    """

    said: str
    version: str | None = None
    evaluations: Mapping[str, Evaluation] | None = None
    pictures: GuidedPictures | None = None
    no_pictures: str = field(default="")


def ask(registry: "Registry", own: str | None, mine: Mapping[str, Evaluation]) -> Champion:
    """Who is champion, from the registry.

    What can't be read of a champion is said in its sentence; that it can't be told who it is raises
    TrackingError.

    Args:
        registry: where it is.
        own: the version that is compared, if it has one already.
        mine: its evaluations; only pictures of the same models are of use.
    """
    version = registry.champion()
    if version is None:
        return Champion(said="There is no champion yet, so rules against one were not checked.")
    if version == own:
        return Champion(said="It is the champion itself.", version=version)
    try:
        models = registry.summary(version)["models"]
        where = f"summary.json of version {version}"
        theirs = {name: Evaluation.from_json(e, where=where) for name, e in models.items()}
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
        said = f"The champion, version {version}, can’t be compared with: {why}."
        return Champion(said=said, version=version, no_pictures="Its pictures are left out.")
    pictures, why = _pictures(registry, version, mine, theirs)
    return Champion(
        said=f"Compared with the champion, version {version}.",
        version=version,
        evaluations=theirs,
        pictures=pictures,
        no_pictures=why,
    )


def unknown(error: Exception) -> Champion:
    """Where the registry could not tell."""
    why = " ".join(str(error).split())
    return Champion(said=f"The champion is not known, so rules against it were not checked: {why}")


def _pictures(
    registry: "Registry",
    version: str,
    mine: Mapping[str, Evaluation],
    theirs: Mapping[str, Evaluation],
) -> tuple[GuidedPictures | None, str]:
    alike = {
        model
        for model in mine.keys() & theirs.keys()
        if all(mine[model].identity.get(k) == theirs[model].identity.get(k) for k in ALIKE)
    }
    left_out = "so they are left out"
    if not alike:
        return None, f"The champion’s pictures are of other models or settings, {left_out}."
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = registry.run_file(version, f"report/{gallery.FILE}", Path(folder))
            if path is None:
                return None, f"The champion’s pictures were not kept with its run, {left_out}."
            found = GuidedPictures.load(path)
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
        return None, f"The champion’s pictures could not be read, {left_out}: {why}"
    images = {key: image for key, image in found.images.items() if key[0] in alike}
    return GuidedPictures(images=images), ""
