"""The cache key of a stage: a digest of everything that can change its result, and of nothing else.

These are the stage's name and version, the settings that it reads, the content of the files they name, and the keys of
its upstream stages. A setting at its ``legacy_default`` is left out, so that adding a setting changes no existing key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mmphi.config.declared_view import covered
from mmphi.config.fields import Field, current_name, field_of, leaves
from mmphi.config.section import Section
from mmphi.pipeline.stage import Stage


def consumed(stage: Stage, settings: Section) -> dict[str, Any]:
    """Returns the settings that determine a stage's result, by dotted name."""
    values = {}
    for name, value in leaves(settings):
        field = field_of(type(settings), name)
        if covered(name, stage.reads) and (field is None or (field.affects_key and value != field.legacy_default)):
            values[name if field is None else _key_name(field, name)] = value
    return values


def _key_name(field: Field, name: str) -> str:
    """The name of a setting in cache keys, with the indices of list items: ``evaluate.links.0``."""
    parts, former = name.split("."), field.key_name.split(".")
    return ".".join(part if one == "N" else one for one, part in zip(former, parts, strict=False)) + "".join(
        f".{part}" for part in parts[len(former) :]
    )


def key_parts(
    stage: Stage, settings: Section, digests: Mapping[str, str], upstream: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the parts of a key as a flat mapping, which can be compared with those of another key.

    Args:
        stage: The stage.
        settings: All settings, resolved.
        digests: Content digests of the files it reads, by the setting that names them; they replace the paths.
        upstream: Keys of the upstream stages, by stage name.
    """
    parts: dict[str, Any] = {"stage": stage.name, "version": stage.version, **consumed(stage, settings)}
    parts.update({name: f"sha256:{digest}" for name, digest in digests.items()})
    parts.update({f"upstream.{name}": key for name, key in upstream.items()})
    return parts


def key_of(parts: Mapping[str, Any]) -> str:
    """Returns the key: 32 hexadecimal digits of the SHA-256 of its parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def difference(parts: Mapping[str, Any], before: Mapping[str, Any], settings: Section, shown: int = 2) -> str:
    """Describes the differences between the parts of two keys; empty if there are none.

    Args:
        parts: Parts of the requested key.
        before: Parts of the key of an earlier result.
        settings: All settings; a setting missing from a key has its ``legacy_default``.
        shown: Number of differences to describe; the others are counted.
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
    """One difference of two keys; digests are not shown, because they have no meaning for a reader."""
    if name.startswith("upstream."):
        return f"the {name.removeprefix('upstream.')} that it uses is another one"
    if any(str(each).startswith("sha256:") for each in (value, before)):
        return f"the content of {name} is different"
    return f"{name} is {_short(value)}, was {_short(before)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None or value == "" else str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
