"""Every setting by its dotted name, with what its declaration says about it: type, bounds, choices, unit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
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
    """One setting as declared.

    Attributes:
        name: Dotted; an item of a list is ``N``, as in ``data.sources.N.path``.
        kind: ``int``, ``float``, ``bool``, ``str``, ``list`` or ``choice``.
        default: Value where no preset says otherwise.
        help: What it means.
        unit: Unit, empty for plain numbers and names.
        affects_key: Whether it stands in keys.
        legacy_default: The value that is left out of keys.
        file: ``path``, ``name``, ``weights``, ``model`` or empty, as :func:`mmphi.config.setting` says.
        names: Values that are names, whatever files there are.
        bounds: ``ge``, ``gt``, ``le``, ``lt``, as far as declared.
        choices: The values allowed, where they are few.
        key_name: Dotted name by which it stands in keys: that of the version that introduced it.
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
        """Type and bounds as ``--help`` shows them."""
        bounds = ", ".join(f"{SIGNS[name]} {value:g}" for name, value in self.bounds.items())
        return "|".join(self.choices) or f"{self.kind} {bounds}".strip()

    def nearest(self, value: Any) -> Any:
        """The valid number nearest to one that is not valid; None beyond an open end, the default for no number."""
        if self.kind not in ("int", "float"):
            return self.default
        # 1,600 is a whole number with a mark between its thousands; 1,5 a fraction as many languages write it.
        typed = str(value).replace(",", "" if self.kind == "int" else ".")
        try:
            number = float(typed)
        except ValueError:
            return self.default
        if math.isnan(number):
            return self.default
        step = 1 if self.kind == "int" else 0
        low = max((self.bounds.get("ge", -math.inf), self.bounds.get("gt", -math.inf) + step))
        high = min((self.bounds.get("le", math.inf), self.bounds.get("lt", math.inf) - step))
        clamped = min(max(number, low), high)
        if math.isinf(clamped) or clamped in (self.bounds.get("gt"), self.bounds.get("lt")):
            return None  # An open end has no nearest number.
        return round(clamped) if self.kind == "int" else clamped


def canonical(name: str) -> str:
    """A dotted name with the numbers of list items written ``N``."""
    return ITEM.sub("N", name)


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation names, if it names one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


@cache
def all_fields(root: type[Section]) -> Mapping[str, Field]:
    """Every setting of an experiment by its dotted name, in the order of their declaration."""
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
    """Every single value of a section, list or plain tree with its dotted name; an empty list counts as a value."""
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
    """Today's dotted name of every setting that had another one in earlier versions."""
    return {field.key_name: field.name for field in all_fields(root).values() if field.key_name != field.name}


def current_name(root: type[Section], name: str) -> str:
    """Today's dotted name of a setting, which may be that of an earlier version."""
    return former_names(root).get(name, name)


def renamed(tree: Any, names: Mapping[str, str]) -> Any:
    """The same tree of mappings, lists and texts with other names, as its keys and as its texts.

    Args:
        tree: Such as a study's declaration.
        names: Former dotted names and today's, as :func:`former_names` gives them.
    """
    if isinstance(tree, Mapping):
        return {names.get(str(name), name): renamed(value, names) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(renamed(value, names) for value in tree)
    return names.get(tree, tree) if isinstance(tree, str) else tree


def field_of(root: type[Section], name: str) -> Field | None:
    """The declaration of a dotted name, ``None`` where there is none; an item of a plain list has its list's."""
    fields, name = all_fields(root), current_name(root, name)
    declared = fields.get(canonical(name))
    return declared or fields.get(canonical(name).removesuffix(".N"))
