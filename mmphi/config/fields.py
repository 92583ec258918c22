"""Declarations of all settings by dotted name: type, bounds, choices and unit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmphi.config.section import Section, former_name

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
ITEM = re.compile(r"(?<=\.)(\d+|N)(?=\.|$)")


@dataclass(frozen=True)
class Field:
    """Declaration of one setting.

    Attributes:
        name: Dotted name; a list item is ``N``, as in ``data.sources.N.path``.
        kind: ``int``, ``float``, ``bool``, ``str``, ``list`` or ``choice``.
        default: Value if no preset sets another.
        help: Description for ``--help``.
        unit: Unit; empty for plain numbers and names.
        affects_key: Whether the setting is part of cache keys.
        legacy_default: Value that is left out of cache keys.
        file: ``path``, ``name``, ``weights``, ``model`` or empty; see :func:`mmphi.config.setting`.
        names: Values that are always names, even if a file of that name exists.
        bounds: Declared bounds by ``ge``, ``gt``, ``le`` or ``lt``.
        choices: Allowed values of the kind ``choice``; empty for other kinds.
        key_name: Dotted name in cache keys: that of the version that introduced the setting.
    """

    name: str
    kind: Literal["int", "float", "bool", "str", "list", "choice"]
    default: Any
    help: str
    unit: str
    affects_key: bool
    legacy_default: Any
    file: str
    names: tuple[str, ...]
    bounds: Mapping[str, float]
    choices: tuple[str, ...]
    key_name: str

    @property
    def type_name(self) -> str:
        """Type and bounds for ``--help``."""
        bounds = ", ".join(f"{SIGNS[name]} {value:g}" for name, value in self.bounds.items())
        return "|".join(self.choices) or f"{self.kind} {bounds}".strip()

    def nearest(self, value: Any) -> float | None:
        """Return the valid number nearest to an invalid one; ``None`` for a non-number and at an open bound."""
        if self.kind not in ("int", "float"):
            return None
        # 1,600 is an integer with a thousands separator; 1,5 is a fraction with a decimal comma.
        typed = str(value).replace(",", "" if self.kind == "int" else ".")
        try:
            number = float(typed)
        except ValueError:
            return None
        if math.isnan(number):
            return None
        step = 1 if self.kind == "int" else 0
        low = max((self.bounds.get("ge", -math.inf), self.bounds.get("gt", -math.inf) + step))
        high = min((self.bounds.get("le", math.inf), self.bounds.get("lt", math.inf) - step))
        clamped = min(max(number, low), high)
        if math.isinf(clamped) or clamped in (self.bounds.get("gt"), self.bounds.get("lt")):
            return None  # An open bound has no nearest number.
        return round(clamped) if self.kind == "int" else clamped


def canonical(name: str) -> str:
    """Return a dotted name with the indices of list items replaced by ``N``."""
    return ITEM.sub("N", name)


def section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of an annotation; ``None`` if it is not a section."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


@cache
def all_fields(root: type[Section]) -> Mapping[str, Field]:
    """Return all settings of an experiment by dotted name, in the order of declaration."""
    return {field.name: field for field in _fields(root, "")}


def _fields(model: type[BaseModel], prefix: str) -> Iterator[Field]:
    for name, info in model.model_fields.items():
        section = section_type(info.annotation)
        if section:
            yield from _fields(section, f"{prefix}{name}.")
            continue
        yield _field(f"{prefix}{name}", info)
        item = get_args(info.annotation)[:1] if get_origin(info.annotation) is list else ()
        inner = section_type(item[0]) if item else None
        if inner:
            yield from _fields(inner, f"{prefix}{name}.N.")


def _field(name: str, info: FieldInfo) -> Field:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    origin = get_origin(info.annotation)
    kinds: dict[Any, Any] = {int: "int", float: "float", bool: "bool", str: "str"}
    default = info.get_default(call_default_factory=True)
    return Field(
        name=name,
        kind="choice" if origin is Literal else "list" if origin is list else kinds[info.annotation],
        default=default,
        help=info.description or "",
        unit=str(extra.get("unit", "")),
        affects_key=bool(extra.get("affects_key", True)),
        legacy_default=extra.get("legacy_default", default),
        file=str(extra.get("file", "")),
        names=tuple(map(str, names)) if isinstance(names := extra.get("names"), list) else (),
        bounds={sign: getattr(m, sign) for m in info.metadata for sign in SIGNS if hasattr(m, sign)},
        choices=tuple(map(str, get_args(info.annotation))) if origin is Literal else (),
        key_name="".join(name.rpartition(".")[:2]) + (former_name(info) or name.rpartition(".")[2]),
    )


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every single value of a section, list or plain tree with its dotted name; an empty list is a value."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{prefix}.{index}")
    else:
        yield prefix, value


@cache
def former_names(root: type[Section]) -> Mapping[str, str]:
    """Return the current dotted name of every setting that had another name in earlier versions, by that name."""
    return {field.key_name: field.name for field in all_fields(root).values() if field.key_name != field.name}


def current_name(root: type[Section], name: str) -> str:
    """Return the current dotted name of a setting; accepts names of earlier versions."""
    return current_item(former_names(root), name)


def current_item(names: Mapping[str, str], name: str) -> str:
    """Return the current dotted name of a setting, or of an item of a list, such as ``evaluate.links.0``.

    Args:
        names: Current dotted names by former ones, as returned by :func:`former_names`.
        name: Current or former name.
    """
    whole, _, last = name.rpartition(".")
    return f"{names[whole]}.{last}" if last.isdecimal() and whole in names else names.get(name, name)


def renamed(tree: Any, current: Callable[[str], str]) -> Any:
    """Return a copy of a tree of mappings, lists and texts in which former names are replaced, as keys and as texts.

    Args:
        tree: Tree, such as a study's declaration.
        current: Returns the current name of a former one, and any other text unchanged.
    """
    if isinstance(tree, Mapping):
        return {current(name) if isinstance(name, str) else name: renamed(v, current) for name, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(renamed(value, current) for value in tree)
    return current(tree) if isinstance(tree, str) else tree


def field_of(root: type[Section], name: str) -> Field | None:
    """Return the declaration of a dotted name, ``None`` if there is none; an item of a plain list has its list's."""
    fields, name = all_fields(root), current_name(root, name)
    declared = fields.get(canonical(name))
    return declared or fields.get(canonical(name).removesuffix(".N"))
