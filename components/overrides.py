"""`section.key=value`: other values than those of params.yaml, for one run."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from components.params import ParamsError, checked


def overridden(path: Path, overrides: Sequence[str]) -> str:
    """The text of the params.yaml at `path` with these values in it; its comments stay.

    Raises ParamsError, in one line that names the override, if it is of another form, of an unknown
    key, or of a value that the key can't have.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # long lines stay
    try:
        values = yaml.load(path)
    except (OSError, YAMLError) as error:
        raise ParamsError(f"{path} can't be read: {str(error).splitlines()[0]}") from None
    for override in overrides:
        _set(values, override)
    checked(values, "overrides")
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()


def _set(values: Any, override: str) -> None:
    key, is_there, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not is_there or not last:
        raise ParamsError(
            f"overrides: {override!r}: write section.key=value, such as distill.num_images=2000"
        )
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ParamsError(f"overrides: {override!r}: {str(error).splitlines()[0]}") from None
    place = values
    for section in sections:
        place = place.setdefault(section, {})  # one that is unknown is refused with all its keys
        if not isinstance(place, dict):
            raise ParamsError(f"overrides: {override!r}: {section} has no keys below it")
    place[last] = value
