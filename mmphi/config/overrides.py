"""Command-line overrides of settings: ``--vision.pool 2``, or ``--layers 3`` in the stage's own section."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mmphi.config import yaml12
from mmphi.config.fields import Field, all_fields, canonical, current_name, field_of
from mmphi.config.messages import unknown_setting, warn_renamed
from mmphi.config.section import Section
from mmphi.errors import SettingsError

# Further sections that a stage's short names are looked up in, after its own: `mmphi listen --path x --whisper base`.
ALSO = {"transcribe": ("audio",), "listen": ("speech", "audio"), "speech": ("audio",)}


class Alone(str):
    """Value ``true`` of an option without a value, which is valid for boolean settings only.

    Attributes:
        word: Option as typed.
    """

    word: str


def flag_value(word: str) -> Alone:
    """Return the value of an option that was typed without one."""
    made = Alone("true")
    made.word = word
    return made


def full_name(root: type[Section], key: str, stage: str) -> str:
    """Return the dotted name of a key as typed.

    Names are looked up in the stage's section, then among all names, then in the sections of :data:`ALSO`; ``-`` equals
    ``_``. A section whose sources may be paths is short for them: ``corpus`` for ``corpus.sources``.

    Raises:
        SettingsError: If there is no such setting; suggests similar names.
    """
    key = key.replace("-", "_")
    sources = all_fields(root).get(f"{key}.sources")
    own = [f"{stage}.{key}", key, *([sources.name] if sources and sources.file else [])]
    for typed in (*own, *(f"{section}.{key}" for section in ALSO.get(stage, ()))):
        name = current_name(root, typed)
        if name != typed:
            warn_renamed(typed, name)
        if canonical(name) in all_fields(root) or (re.fullmatch(r".+\.\d+", name) and field_of(root, name)):
            return name
    raise unknown_setting(root, key, stage)


def change(root: type[Section], content: dict[str, Any], name: str, typed: str) -> None:
    """Set a typed value in a tree of settings.

    Args:
        root: Class of all settings.
        content: Sections by name; changed in place.
        name: Full dotted name.
        typed: Value as typed; lists are YAML or JSON.

    Raises:
        SettingsError: If a list is malformed, a list index is out of range, or the value is missing.
    """
    field = field_of(root, name)
    if isinstance(typed, Alone) and (field is None or field.kind != "bool"):
        raise SettingsError(f"{typed.word} has no value", f"give one: {typed.word} VALUE")
    *parents, last = name.split(".")
    place: Any = content
    for part, following in zip(parents, name.split(".")[1:], strict=True):
        if isinstance(place, list):
            place = place[_index(place, part, name, {})]
        else:
            if not isinstance(place.get(part), dict | list):
                place[part] = [] if following.isdigit() else {}
            place = place[part]
    value = parse_value(typed, field) if field and canonical(name) == field.name else typed
    if isinstance(place, list):
        place[_index(place, last, name, "")] = value
    else:
        place[last] = value


def _index(items: list[Any], part: str, name: str, fresh: Any) -> int:
    index = int(part)
    if index > len(items):
        raise SettingsError(
            f"{name}: the list has {len(items)} items", f"the next is {name.replace(part, str(len(items)), 1)}"
        )
    if index == len(items):
        items.append(fresh)
    return index


def parse_value(typed: str, field: Field) -> Any:
    """Parse a list from YAML or JSON; other values stay as typed, for pydantic to convert.

    A list of one item may be typed as the item itself, such as a path with special characters.

    Raises:
        SettingsError: If the text of a list is malformed or empty.
    """
    if field.kind != "list":
        return typed
    if not typed.strip():
        raise SettingsError(f"{field.name} = {typed!r} names nothing", "write a list: '[a, b]'; '[]' is an empty one")
    if not typed.lstrip().startswith(("[", "{", "- ")):
        try:
            value = yaml12.plain_values(yaml12.load(typed))
        except yaml.YAMLError:
            value = typed
        return [value if isinstance(value, int | float) else typed]
    try:
        value = yaml12.plain_values(yaml12.load(typed))
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise SettingsError(f"{field.name} = {typed!r} cannot be read: {where}", "write a list: '[a, b]'") from error
    return [] if value is None else value if isinstance(value, list) else [value]
