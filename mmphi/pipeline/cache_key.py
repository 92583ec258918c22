"""The key of a stage: a digest of everything that can change its result, and of nothing more.

That is the stage and its version, the settings that it reads, the content of the files they name, and the keys of what
it is built on. A setting that has the value it was introduced with is left out, so that a new one changes no old key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mmphi.config.declared_view import covered
from mmphi.config.fields import current_name, field_of, leaves
from mmphi.config.section import Section
from mmphi.pipeline.stage import Stage


def consumed(stage: Stage, settings: Section) -> dict[str, Any]:
    """The settings that a stage's result follows from, by dotted name."""
    values = {}
    for name, value in leaves(settings):
        field = field_of(type(settings), name)
        if covered(name, stage.reads) and (field is None or (field.affects_key and value != field.legacy_default)):
            values[name if field is None or field.key_name == field.name else field.key_name] = value
    return values


def key_parts(
    stage: Stage, settings: Section, digests: Mapping[str, str], upstream: Mapping[str, str]
) -> dict[str, Any]:
    """What a key is the digest of, as a flat table that can be compared with another's.

    Args:
        stage: The stage.
        settings: All settings, resolved.
        digests: Content of the files it reads, by the setting that names them; stands in place of the path.
        upstream: Keys of what it is built on, by stage.
    """
    parts: dict[str, Any] = {"stage": stage.name, "version": stage.version, **consumed(stage, settings)}
    parts.update({name: f"sha256:{digest}" for name, digest in digests.items()})
    parts.update({f"upstream.{name}": key for name, key in upstream.items()})
    return parts


def key_of(parts: Mapping[str, Any]) -> str:
    """32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def difference(parts: Mapping[str, Any], before: Mapping[str, Any], settings: Section, shown: int = 2) -> str:
    """In what the parts of two keys differ, in words; empty where they do not.

    Args:
        parts: Of the key that is asked for.
        before: Of the key of an earlier result.
        settings: All settings; a setting that is left out of a key has the value it was introduced with.
        shown: How many differences are spelled out.
    """

    def value(table: Mapping[str, Any], name: str) -> Any:
        field = field_of(type(settings), name)
        return table.get(name, field.legacy_default if field else None)

    changed = [name for name in {**parts, **before} if value(parts, name) != value(before, name)]
    words = [
        _change(current_name(type(settings), name), value(parts, name), value(before, name)) for name in changed[:shown]
    ]
    return "; ".join(words) + (f" and {len(changed) - shown} more" if len(changed) > shown else "")


def _change(name: str, value: Any, before: Any) -> str:
    """One difference of two keys; digests are not shown, because nobody can read them."""
    if name.startswith("upstream."):
        return f"the {name.removeprefix('upstream.')} that it uses is another one"
    if any(str(each).startswith("sha256:") for each in (value, before)):
        return f"the content of {name} is different"
    return f"{name} is {_short(value)}, was {_short(before)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None or value == "" else str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
