"""How a setting is declared: its type and bounds, its unit, its meaning, and whether it can change a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

File = Literal["", "path", "name", "weights", "model"]
UNSET: Any = object()


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    affects_key: bool = True,
    file: File = "",
    names: Sequence[str] = (),
    legacy_default: Any = UNSET,
    formerly: str = "",
    **bounds: Any,
) -> Any:
    """A field with its meaning and unit.

    Args:
        default: Value where no preset says otherwise.
        help: One line for ``--help``.
        unit: Unit of the value, empty for plain numbers and names.
        affects_key: Whether the value can change a result, and so belongs in the stage's key.
        file: ``path`` where the value is a file or folder, ``name`` where it may be one or else a name, ``weights``
            where it may be a file or else a name, ``model`` where it is a model's folder, run or registered name. A
            value that may be a name is a path where there is such a file or folder. A path counts from the file it is
            written in, must be there, and stands in the key by its content.
        names: Values that are names, whatever files there are.
        legacy_default: The value that all earlier results were built with, where the default is no longer that one. A
            setting that has this value is left out of keys, so that a new setting does not empty anybody's cache.
        formerly: Its name in earlier versions: presets and commands may still use it, and keys do.
        **bounds: pydantic's ``ge``, ``gt``, ``le``, ``lt``.
    """
    extra: JsonDict = {
        "unit": unit,
        "affects_key": affects_key,
        "file": file,
        "names": list(names),
        "formerly": formerly,
    }
    if legacy_default is not UNSET:
        extra["legacy_default"] = legacy_default
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: default.copy(), description=help, json_schema_extra=extra, **bounds)
    return Field(default=default, description=help, json_schema_extra=extra, **bounds)


def former_name(info: FieldInfo) -> str:
    """The name of a field in earlier versions; empty where it had no other."""
    extra = info.json_schema_extra
    return str(extra.get("formerly", "")) if isinstance(extra, dict) else ""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values keep their type."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """Settings under the names of earlier versions."""
        if not isinstance(values, Mapping):
            return values
        renamed = {former_name(info): name for name, info in cls.model_fields.items() if former_name(info)}
        return {renamed.get(name, name) if renamed.get(name) not in values else name: v for name, v in values.items()}
