"""Declaration of settings: type, bounds, unit, description, and whether a setting affects results."""

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
    """Declare a field of a section.

    Args:
        default: Value if no preset sets another.
        help: Description in one line, for ``--help``.
        unit: Unit of the value; empty for plain numbers and names.
        affects_key: Whether the value can change a result, and is therefore part of the stage's cache key.
        file: ``path`` for a file or folder, ``name`` for a file, folder or name, ``weights`` for a file or name,
            ``model`` for a model's folder, run or registered name. A value that may be a name is a path if such a file
            or folder exists. A path is relative to the file that contains it, must exist, and is represented in the
            cache key by its content.
        names: Values that are always names, even if a file of that name exists.
        legacy_default: Value that is left out of cache keys; by default ``default``. Set it to the value of earlier
            versions if the default differs, so that cached results stay valid.
        formerly: Name in earlier versions, which presets and commands may still use, and which cache keys contain.
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
    """Return the name of a field in earlier versions; empty if it was not renamed."""
    extra = info.json_schema_extra
    return str(extra.get("formerly", "")) if isinstance(extra, dict) else ""


class Section(BaseModel):
    """Base class of all sections; unknown keys are errors, and defaults are validated, too."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """Accept settings under the names of earlier versions."""
        if not isinstance(values, Mapping):
            return values
        renamed = {former_name(info): name for name, info in cls.model_fields.items() if former_name(info)}
        return {renamed.get(name, name) if renamed.get(name) not in values else name: v for name, v in values.items()}
