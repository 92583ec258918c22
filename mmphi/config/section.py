"""How a setting is declared: its type and bounds, its unit, its meaning, and whether it can change a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

File = Literal["", "path", "name", "weights", "model"]
UNSET: Any = object()


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    matters: bool = True,
    file: File = "",
    names: Sequence[str] = (),
    introduced: Any = UNSET,
    **bounds: Any,
) -> Any:
    """A field with its meaning and unit.

    Args:
        default: Value where no preset says otherwise.
        help: One line for ``--help``.
        unit: Unit of the value, empty for plain numbers and names.
        matters: Whether the value can change a result, and so belongs in the stage's key.
        file: ``path`` where the value is a file or folder, ``name`` where it may be one or else a name, ``weights``
            where it may be a file or else a name, ``model`` where it is a model's folder, run or registered name. A
            value that may be a name is a path where there is such a file or folder. A path counts from the file it is
            written in, must be there, and stands in the key by its content.
        names: Values that are names, whatever files there are.
        introduced: The value that all earlier results were built with, where the default is no longer that one. A
            setting that has this value is left out of keys, so that a new setting does not empty anybody's cache.
        **bounds: pydantic's ``ge``, ``gt``, ``le``, ``lt``.
    """
    extra: JsonDict = {"unit": unit, "matters": matters, "file": file, "names": list(names)}
    if introduced is not UNSET:
        extra["introduced"] = introduced
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: default.copy(), description=help, json_schema_extra=extra, **bounds)
    return Field(default=default, description=help, json_schema_extra=extra, **bounds)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values keep their type."""

    model_config = ConfigDict(extra="forbid", validate_default=True)
