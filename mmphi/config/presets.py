"""Loads settings from presets, YAML files that extend one another, and command-line overrides."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from mmphi.config import yaml12
from mmphi.config.declared_view import covered
from mmphi.config.environment import VARIABLES
from mmphi.config.fields import Field, field_of, former_names, leaves
from mmphi.config.messages import did_you_mean, explain_validation_error, warn_renamed
from mmphi.config.overrides import change, full_name
from mmphi.config.section import Section
from mmphi.errors import SettingsError

AS_PRESET = "preset"  # Default of MLproject's parameters: keep the preset's value.
FILE_ENDINGS = (
    *(".bin", ".csv", ".gz", ".json", ".jsonl", ".md", ".ndjson", ".parquet", ".pt", ".pth", ".safetensors"),
    *(".tsv", ".txt", ".xz", ".zip", ".zst"),
)
R = TypeVar("R", bound=Section)
VARIABLE = re.compile(r"\$\{(\w+)\}")


def presets_folder() -> Path:
    """Return ``experiments/`` of the checkout that contains this package, or of the current folder."""
    own_folder = Path(__file__).resolve().parents[2] / "experiments"
    return own_folder if own_folder.is_dir() else Path.cwd() / "experiments"


def load(
    root: type[R], preset: str, overrides: Mapping[str, str] | None = None, stage: str = "", *, expand: bool = True
) -> R:
    """Load the settings of a preset or YAML file, with overrides.

    Paths in a file are relative to that file, paths in overrides to the current folder.

    Args:
        root: Class of all settings.
        preset: Name of a file in ``experiments/``, or a path.
        overrides: Dotted keys and values as typed (``{"vision.pool": "2"}``); keys of the stage's section may omit the
            section. The value ``preset`` keeps the preset's.
        stage: Stage whose section is searched first.
        expand: Whether unset environment variables are errors; otherwise values with unset ``${NAME}`` are kept.

    Raises:
        SettingsError: If a setting is invalid; names the key, the value and the nearest valid one.
    """
    content = _read(root, _find(preset), ())
    for key, typed in (overrides or {}).items():
        name = full_name(root, key, stage)
        if typed != AS_PRESET:
            change(root, content, name, typed)
    for name, value in list(leaves(content)):
        _put(content, name, _finished(root, name, value, expand))
    try:
        return root(**content)
    except ValidationError as error:
        raise explain_validation_error(root, error) from error


def _find(preset: str, own_folder: Path | None = None) -> Path:
    folders = [own_folder] if own_folder else []
    folders.append(presets_folder())
    inside = [folder / name for folder in folders for name in (preset, f"{preset}.yaml")]
    for path in [*([] if own_folder else [Path(preset).expanduser()]), *inside]:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path.resolve()
    known = sorted(p.relative_to(presets_folder()).with_suffix("").as_posix() for p in presets_folder().rglob("*.yaml"))
    near = did_you_mean(preset, known)
    raise SettingsError(
        f"there is no preset {preset!r}",
        f"did you mean {near}?" if near else f"there are {', '.join(known)}, or any YAML",
    )


def _read(root: type[Section], path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        circle = " -> ".join(p.name for p in (*above, path))
        raise SettingsError(f"{path} extends itself: {circle}", "take one `extends` out")
    try:
        content = yaml12.load(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        hint = "indent with spaces: YAML takes no tabs" if "'\\t'" in str(error) else "fix the YAML there"
        raise SettingsError(f"{path} cannot be read: {error}", hint) from error
    if not isinstance(content or {}, dict):
        raise SettingsError(
            f"{path} holds a {type(content).__name__}, not settings by name", "write `key: value` lines"
        )
    content = {"name": path.stem, **_current(root, _nested(content or {}))}
    parent = content.pop("extends", None)
    for name, value in list(leaves(content)):
        if value is None and name.rpartition(".")[2].isdigit():
            raise SettingsError(f"{path}: {name} is empty", "write a value, or take the item out")
        if value is None:  # An empty `projector:` or `name:` keeps the inherited value.
            _drop(content, name)
        else:
            _put(content, name, _from_file(root, name, value, path.parent))
    if not parent:
        return content
    found = _find(str(parent), path.parent)
    if found == path and "/" not in str(parent):  # my/small.yaml may extend the preset `small`.
        found = _find(str(parent), presets_folder())
    return _merge(_read(root, found, (*above, path)), content)


def _nested(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested mappings for dotted keys: ``vision.pool: 2`` becomes ``vision: {pool: 2}``."""
    tree: dict[str, Any] = {}
    for key, value in content.items():
        branch = _nested(value) if isinstance(value, dict) else value
        for part in reversed(str(key).split(".")):
            branch = {part: branch}
        tree = _merge(tree, branch)
    return tree


def _current(root: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
    """Rename settings of earlier versions in place, with a warning."""
    for former, name in former_names(root).items():
        section, _, last = former.rpartition(".")
        branch = tree.get(section)
        if isinstance(branch, dict) and last in branch:
            warn_renamed(former, name)
            value = branch.pop(last)
            branch.setdefault(name.rpartition(".")[2], value)
    return tree


def _merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _put(content: Any, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for part in parents:
        content = content[int(part)] if isinstance(content, list) else content[part]
    content[int(last) if isinstance(content, list) else last] = value


def _drop(content: dict[str, Any], name: str) -> None:
    *parents, last = name.split(".")
    place: Any = content
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    del place[last]


def _from_file(root: type[Section], name: str, value: Any, folder: Path) -> Any:
    """Value from a YAML file; number-like texts of text settings are restored, paths resolved from ``folder``."""
    field = field_of(root, name)
    if field is None or (field.kind not in ("str", "choice") and not field.file):
        return yaml12.plain_values(value)
    if isinstance(value, yaml12.WrittenInt | yaml12.WrittenFloat):
        return value.text
    if not isinstance(value, str) or not value or value.startswith(("${", "~", "/")):
        return value
    return str(folder / value) if field.file and is_path(field, value, folder) else value


def is_path(field: Field, value: str, folder: Path) -> bool:
    """Return whether a value that may be a path or a name is a path.

    It is a path if such a file or folder exists, as in transformers and ``datasets``, or if it looks like a path.
    Reserved words (``pretrain``, ``phi-2``) are names. All code decides this here.

    Args:
        field: Declaration of the setting.
        value: Value as written.
        folder: Folder that relative paths start from.
    """
    if value in field.names or "://" in value:
        return False
    if field.file == "path" or value.startswith(("/", "./", "../", "~")) or value.endswith(FILE_ENDINGS):
        return True
    if field.file == "model":  # Runs and registered models are looked up in the tracking store.
        return "/" in value and (folder / value).exists()
    return _exists(folder / value) and (field.file != "weights" or (folder / value).is_file())


def _finished(root: type[Section], name: str, value: Any, expand: bool) -> Any:
    field = field_of(root, name)
    if not isinstance(value, str):
        return value
    if expand or all(os.environ.get(variable) for variable in VARIABLE.findall(value)):
        value = VARIABLE.sub(lambda match: _variable(match.group(1), name), value)
    elif VARIABLE.search(value):
        return value
    if field is None or not field.file or not value:
        return value
    path = Path(value).expanduser()
    for folder in _folders():
        if folder == Path("/") and "/" not in value:
            continue  # A daemon's working folder, in which bare names would match `home` or `tmp`.
        if _exists(folder / path) and is_path(field, value, folder):
            return str(folder / path)
    return str(Path.cwd() / path) if is_path(field, value, Path.cwd()) else value


def _folders() -> Iterator[Path]:
    """Folders that a relative path may start from: the current one, and those of the callers of `mlflow run`.

    `mlflow run` starts its commands in the project's folder, wherever it is called, so the current folders of the
    parent processes are searched, the nearest first.
    """
    yield Path.cwd()
    if os.environ.get("MLFLOW_RUN_ID"):
        yield from caller_folders()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # Too long for a file name.
        return False


def from_caller(relative: Path) -> Path:
    """Resolve a relative path from the current folder, or from the one in which `mlflow run` was called."""
    return next((folder / relative for folder in _folders() if _exists(folder / relative)), Path.cwd() / relative)


def caller_folders() -> Iterator[Path]:
    """Yield the current folders of the parent processes, the nearest first."""
    import psutil

    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            yield Path(process.cwd())


def _variable(variable: str, name: str) -> str:
    if not os.environ.get(variable):
        what = VARIABLES.get(variable, "")
        raise SettingsError(
            f"{name} needs the environment variable {variable}, which is not set",
            f"export {variable}=FOLDER{f', {what}' if what else ''}",
        )
    return os.environ[variable]


def files_of_settings(settings: Section, declared: Iterable[str]) -> dict[str, Path]:
    """Return the files and folders in settings, by dotted name.

    Args:
        settings: All settings.
        declared: Dotted names of settings and sections to include; a name includes all below it.

    Raises:
        SettingsError: If a file or folder does not exist.
    """
    named = {}
    for name, value in leaves(settings):
        field = field_of(type(settings), name)
        if field is None or field.file not in ("path", "name", "weights") or not isinstance(value, str) or not value:
            continue
        if not covered(name, declared) or not is_path(field, value, Path.cwd()):
            continue
        named[name] = Path(value).expanduser().absolute()
        if not named[name].exists():
            raise SettingsError(f"{name} = {value}: there is no such file or folder", _nearest_path(named[name]))
    return named


def _nearest_path(path: Path) -> str:
    there = next((p for p in path.parents if p.is_dir()), Path("/"))
    missing = path.relative_to(there).parts[0]
    near = did_you_mean(missing, (p.name for p in there.iterdir()))
    return f"did you mean {there / near.split(' or ')[0]}?" if near else f"{there} has no {missing}"
