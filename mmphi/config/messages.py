"""Error messages of settings: the key, the value, and the nearest valid one."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from mmphi.config.fields import Field, all_fields, canonical, field_of
from mmphi.config.section import Section
from mmphi.errors import SettingsError

WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list", "str": "a text"}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the known words most similar to ``word``, best first, joined by "or"; empty if none is similar.

    Dotted names with the same last part come first: ``layer`` finds ``vision.layer``.
    """
    known = list(dict.fromkeys(known))
    tail = word.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == tail]
    by_tail = {k.rpartition(".")[2]: k for k in reversed(known)}
    alike = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    alike += [by_tail[t] for t in difflib.get_close_matches(tail, list(by_tail), n=2, cutoff=0.7)]
    return " or ".join(list(dict.fromkeys([*same, *alike]))[:3])


def unknown_setting(root: type[Section], key: str, stage: str = "") -> SettingsError:
    """Return the error for an unknown setting, with similar names.

    Args:
        root: Class of all settings.
        key: Name as written.
        stage: Stage whose section may be omitted in names.
    """
    known = [k for k in all_fields(root) if ".N." not in k]
    section, _, tail = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in all_fields(root) if k.rpartition(".")[0] == canonical(section)]
    below = [k for k in known if k.startswith(f"{key}.")]
    own = [k.removeprefix(f"{stage}.") for k in known if k.startswith(f"{stage}.")]
    near = difflib.get_close_matches(tail, siblings, n=1) if section else []
    # Top-level keys of a YAML file: sections, or `extends`.
    top = [] if section or stage else difflib.get_close_matches(key, [*root.model_fields, "extends"], n=1, cutoff=0.7)
    if below:
        hint = f"it is a section: {', '.join(below)}"
    elif top:
        hint = f"did you mean {top[0]}?"
    elif near:
        hint = f"did you mean {section}.{near[0]}?"
    elif similar := did_you_mean(key, [*own, *known]):
        hint = f"did you mean {similar}?"
    else:
        hint = f"`mmphi {stage or 'STAGE'} --help-all` lists them"
    return SettingsError(f"there is no setting {key!r}", hint)


def explain_validation_error(root: type[Section], error: ValidationError) -> SettingsError:
    """Return pydantic's validation error as one settings error that lists all problems."""
    errors = [_one(root, e) for e in error.errors()]
    if len(errors) == 1:
        return errors[0]
    lines = [f"{e.what}{f' ({e.hint})' if e.hint else ''}" for e in errors]
    return SettingsError("\n  ".join([f"{len(errors)} settings are wrong:", *lines]))


def _one(root: type[Section], error: Any) -> SettingsError:
    key = ".".join(str(part) for part in error["loc"])
    value, field = error["input"], field_of(root, key)
    if error["type"] == "extra_forbidden":
        return unknown_setting(root, key)
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return SettingsError(f"{key}: {message}" if key else message)
    if field is None:
        return SettingsError(f"{key} = {value!r} must be a section of settings", "give it as `key: value` lines")
    shown = repr(value) if field.kind in ("str", "choice") else value
    return SettingsError(f"{key} = {shown}, but it must be {_must(field, error['type'])}", _nearest_valid(field, value))


def _must(field: Field, problem: str) -> str:
    if field.choices:
        return f"one of {', '.join(field.choices)}"
    bounds = problem.startswith(("greater_than", "less_than"))
    return field.type_name.removeprefix(field.kind).strip() if bounds else WANTED[field.kind]


def _nearest_valid(field: Field, value: Any) -> str:
    if field.choices:
        near = difflib.get_close_matches(str(value), field.choices, n=1)
        return f"did you mean {near[0]}?" if near else f"the default is {field.default}"
    valid = field.nearest(value)
    if valid is None:
        return f"the default is {str(field.default).lower() if field.kind == 'bool' else field.default}"
    return f"the nearest valid value is {valid}"


def warn_renamed(former: str, current: str) -> None:
    """Warn that a setting has been renamed, once per name and process."""
    if former not in _WARNED:
        _WARNED.add(former)
        warnings.warn(f"the setting {former} is called {current} now", FutureWarning, stacklevel=3)


_WARNED: set[str] = set()
