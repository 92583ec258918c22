"""Presets, files that extend one another, and command-line overrides, made into checked settings."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mmphi.errors import SettingsError
from mmphi.settings import Settings

AS_PRESET = "preset"  # The word that MLproject's parameters default to: as the preset says.
PATH_KEYS = ("path", "images", "image_weights", "text_tower", "corpus")
VARIABLE = re.compile(r"\$\{(\w+)\}")


def presets_folder() -> Path:
    """``experiments/`` of the checkout that this package lies in, or of the current folder."""
    beside = Path(__file__).resolve().parents[1] / "experiments"
    return beside if beside.is_dir() else Path.cwd() / "experiments"


def load_settings(preset: str, overrides: Mapping[str, str] | None = None, stage: str = "") -> Settings:
    """Settings of a preset or YAML file, with single values changed.

    Args:
        preset: Name of a file in ``experiments/``, or a path.
        overrides: Dotted keys and values as typed (``{"vision.pool": "2"}``); a key of the stage's own section may
            stand without its section.
        stage: The stage asked for.

    Raises:
        SettingsError: Naming the key, the value and the nearest valid one.
    """
    content = _read(_find(preset), ())
    for key, value in (overrides or {}).items():
        if value != AS_PRESET:
            _set(content, _full_key(key, stage), value)
    try:
        return Settings(**content)
    except ValidationError as error:
        raise _explained(error) from error


def _find(preset: str, beside: Path | None = None) -> Path:
    folders = [f for f in (beside, presets_folder()) if f is not None]
    for path in [Path(preset)] + [folder / f"{preset}.yaml" for folder in folders] + [f / preset for f in folders]:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path.resolve()
    known = sorted(p.stem for p in presets_folder().glob("*.yaml"))
    raise SettingsError(
        f"there is no preset {preset!r}", f"did you mean {_nearest(preset, known)}? Or give a YAML file."
    )


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        raise SettingsError(f"{path} extends itself, by way of {', '.join(p.name for p in above)}", "break the circle")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read: {error}", "mend the YAML there") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} holds a {type(content).__name__}, not settings by name")
    parent = content.pop("extends", None)
    content = _with_paths(content, path.parent)
    content.setdefault("name", path.stem)
    return _merge(_read(_find(str(parent), path.parent), (*above, path)), content) if parent else content


def _merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _with_paths(value: Any, folder: Path, key: str = "") -> Any:
    """Put the environment's variables in, and make the paths in a file relative to that file."""
    if isinstance(value, dict):
        return {k: _with_paths(v, folder, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_paths(v, folder, key) for v in value]
    if not isinstance(value, str):
        return value
    value = VARIABLE.sub(lambda m: _variable(m.group(1), key), value)
    beside = folder / value
    return str(beside) if key in PATH_KEYS and value and beside.exists() else value


def _variable(name: str, key: str) -> str:
    if name not in os.environ:
        raise SettingsError(f"{key} names the environment variable {name}, which is not set", f"export {name}=...")
    return os.environ[name]


def _full_key(key: str, stage: str) -> str:
    key = key.replace("-", "_")
    if "." in key or key not in Settings.model_fields:
        section = Settings.model_fields.get(stage)
        inner = section.annotation if section else None
        if "." not in key and isinstance(inner, type) and issubclass(inner, BaseModel) and key in inner.model_fields:
            return f"{stage}.{key}"
    if key.split(".")[0] not in Settings.model_fields:
        known = [*all_keys(), *(k.partition(".")[2] for k in all_keys() if k.startswith(f"{stage}."))]
        raise SettingsError(f"there is no setting {key!r}", f"did you mean {_nearest(key, known)}?")
    return key


def all_keys() -> list[str]:
    """Every setting by its dotted name."""
    keys = []
    for name, field in Settings.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += [f"{name}.{key}" for key in inner.model_fields]
        else:
            keys.append(name)
    return keys


def _set(content: dict[str, Any], key: str, typed: str) -> None:
    *sections, last = key.split(".")
    place: Any = content
    for part in sections:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    try:
        value = yaml.safe_load(typed)
    except yaml.YAMLError as error:
        raise SettingsError(f"{key} = {typed!r} cannot be read: {error}", "write it as YAML or JSON") from error
    # YAML 1.1 reads 1e-3 as a word.
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)
    place[int(last) if isinstance(place, list) else last] = value if value is not None else ""


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    tails = [k for k in known if k.rpartition(".")[2] == word.rpartition(".")[2]]
    return " or ".join(dict.fromkeys([*tails, *near])) or ", ".join(known[:8])


def _explained(error: ValidationError) -> SettingsError:
    """The first thing that is wrong, in words."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    given, context = first["input"], first.get("ctx", {})
    what = f"{key} = {given!r}: {first['msg'].removeprefix('Value error, ')}"
    hint = ""
    if first["type"] == "extra_forbidden":
        what = f"there is no setting {key!r}"
        hint = f"did you mean {_nearest(key, all_keys())}?"
    elif first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        hint = f"the nearest valid value is {_nearest(str(given), choices)}"
    elif "ge" in context or "le" in context:
        hint = f"the nearest valid value is {context.get('ge', context.get('le'))}"
    elif "gt" in context or "lt" in context:
        bound = context.get("gt", context.get("lt"))
        hint = f"it must be {'more' if 'gt' in context else 'less'} than {bound}"
    elif not key and isinstance(given, dict):
        what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        what = f"{key}: {first['msg'].removeprefix('Value error, ')}"
    return SettingsError(what, hint)
