"""Presets, files that extend one another, and command-line overrides, made into checked settings."""

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

AS_PRESET = "preset"  # The word that MLproject's parameters default to: as the preset says.
FILE_ENDINGS = (
    *(".bin", ".csv", ".gz", ".json", ".jsonl", ".md", ".ndjson", ".parquet", ".pt", ".pth", ".safetensors"),
    *(".tsv", ".txt", ".xz", ".zip", ".zst"),
)
R = TypeVar("R", bound=Section)
VARIABLE = re.compile(r"\$\{(\w+)\}")


def presets_folder() -> Path:
    """``experiments/`` of the checkout that this package lies in, or of the current folder."""
    beside = Path(__file__).resolve().parents[2] / "experiments"
    return beside if beside.is_dir() else Path.cwd() / "experiments"


def load(
    root: type[R], preset: str, overrides: Mapping[str, str] | None = None, stage: str = "", *, expand: bool = True
) -> R:
    """Settings of a preset or YAML file, with single values changed.

    Paths in a file count from that file, paths in overrides from the current folder.

    Args:
        root: The class of all settings.
        preset: Name of a file in ``experiments/``, or a path.
        overrides: Dotted keys and values as typed (``{"vision.pool": "2"}``); a key of the stage's own section may
            stand without its section. The value ``preset`` changes nothing.
        stage: The stage asked for.
        expand: Whether all of the environment's variables must be set; else ``${NAME}`` may stay as written.

    Raises:
        SettingsError: Naming the key, the value and the nearest valid one.
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


def _find(preset: str, beside: Path | None = None) -> Path:
    folders = [beside] if beside else []
    folders.append(presets_folder())
    inside = [folder / name for folder in folders for name in (preset, f"{preset}.yaml")]
    for path in [*([] if beside else [Path(preset).expanduser()]), *inside]:
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
        if value is None:  # `projector:` with nothing below it, `name:` with nothing after it: as it is inherited.
            _drop(content, name)
        else:
            _put(content, name, _from_file(root, name, value, path.parent))
    if not parent:
        return content
    found = _find(str(parent), path.parent)
    if found == path and "/" not in str(parent):  # my/small.yaml may extend the preset small.
        found = _find(str(parent), presets_folder())
    return _merge(_read(root, found, (*above, path)), content)


def _nested(content: Mapping[Any, Any]) -> dict[str, Any]:
    """A tree in which ``vision.pool: 2`` stands as ``vision: {pool: 2}``."""
    tree: dict[str, Any] = {}
    for key, value in content.items():
        branch = _nested(value) if isinstance(value, dict) else value
        for part in reversed(str(key).split(".")):
            branch = {part: branch}
        tree = _merge(tree, branch)
    return tree


def _current(root: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
    """A tree in which settings have today's names."""
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
    """What YAML made of a value, made what was meant: texts that look like numbers, paths beside the file."""
    field = field_of(root, name)
    if field is None or (field.kind not in ("str", "choice") and not field.file):
        return yaml12.plain_values(value)
    if isinstance(value, yaml12.WrittenInt | yaml12.WrittenFloat):
        return value.text
    if not isinstance(value, str) or not value or value.startswith(("${", "~", "/")):
        return value
    return str(folder / value) if field.file and is_path(field, value, folder) else value


def is_path(field: Field, value: str, folder: Path) -> bool:
    """Whether a value that may be a path is one: the only place where that is decided.

    It is where there is such a file or folder, as transformers and ``datasets`` have it, and where it looks like one.
    Words that mean something of their own (``pretrain``, ``phi-2``) are names.

    Args:
        field: The setting.
        value: As written.
        folder: What a relative path counts from.
    """
    if value in field.names or "://" in value:
        return False
    if field.file == "path" or value.startswith(("/", "./", "../", "~")) or value.endswith(FILE_ENDINGS):
        return True
    if field.file == "model":  # A run or a registered name is looked for in the store.
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
            continue  # A daemon's folder, in which `home` and `tmp` are no names that anybody typed.
        if _exists(folder / path) and is_path(field, value, folder):
            return str(folder / path)
    return str(Path.cwd() / path) if is_path(field, value, Path.cwd()) else value


def _folders() -> Iterator[Path]:
    """What a relative path may count from: the current folder, and those that `mlflow run` was called in.

    `mlflow run` starts its commands in the project's folder, wherever it was called. The folders of the processes above
    are looked through, the nearest first.
    """
    yield Path.cwd()
    if os.environ.get("MLFLOW_RUN_ID"):
        yield from caller_folders()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # Too long for a file's name.
        return False


def from_caller(relative: Path) -> Path:
    """Where a relative path leads from: the current folder, or the one that `mlflow run` was called in."""
    return next((folder / relative for folder in _folders() if _exists(folder / relative)), Path.cwd() / relative)


def caller_folders() -> Iterator[Path]:
    """Current folders of the processes that this one was started by, the nearest first."""
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
    """The files and folders that settings name, by dotted name.

    Args:
        settings: All settings.
        declared: Names of settings and sections; a name covers all below it.

    Raises:
        SettingsError: If one is not there.
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
