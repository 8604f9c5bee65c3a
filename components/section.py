"""What the sections of params.yaml have in common."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticUndefined

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Guided = Annotated[float, Field(gt=1, le=1000)]  # at 1 there is no guidance
Filled = Annotated[str, Field(min_length=1)]  # an empty path is the current folder


def _named(pattern: str, rule: str) -> AfterValidator:
    """Refuses a name that is not of the pattern, in words."""

    def check(name: str) -> str:
        if not re.fullmatch(pattern, name, re.ASCII):
            raise ValueError(f"{name!r} can't be a name here: {rule}")
        return name

    return AfterValidator(check)


# A row of the table, a DVC stage and parameter (where a dot goes a level down), and a folder.
ModelName = Annotated[
    str,
    _named(r"[A-Za-z0-9][\w-]*", "letters, digits, - and _, beginning with a letter or digit"),
]
# A registered model of MLflow, and part of a URI.
RegisteredName = Annotated[
    str,
    _named(r"[A-Za-z0-9][\w.-]*", "letters, digits, -, _ and dots, a letter or digit at first"),
]


class Section(BaseModel, frozen=True):
    """Part of params.yaml: frozen, strict about names and types, its numbers finite.

    One that is made from a dataclass of the library has its fields and its ranges, but no defaults:
    params.yaml says everything but for what the library marks as optional.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        library = {
            field.name
            for base in cls.__mro__
            if dataclasses.is_dataclass(base)
            for field in dataclasses.fields(base)
            if not field.metadata.get("optional")
        }
        for name in library:
            cls.model_fields[name].default = PydanticUndefined
        cls.model_rebuild(force=True)

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for base in type(self).__mro__:
            if dataclasses.is_dataclass(base) and "__post_init__" in vars(base):
                vars(base)["__post_init__"](self)
        return self


def not_json(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values below `value` that JSON has no form for, with their dotted names."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from not_json(below, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from not_json(below, f"{name}[{number}]")
    elif not isinstance(value, str | int | float | None):
        yield name, value
