"""Image preprocessing and activation function for CLIP weights that are loaded from a file.

A pretrained tag of open_clip defines both. A file defines neither: open_clip then uses OpenAI's preprocessing and the
default activation of the architecture. For SigLIP and MobileCLIP, and for OpenAI's own weights, this is wrong and
raises no error. For a file, the values are therefore taken from, in this order:

1. the settings;
2. ``open_clip_config.json`` in the file's folder, as open_clip and the stage ``light_clip`` write it;
3. the pretrained tags of the architecture, where all of them agree;
4. open_clip's defaults, for an architecture without tags.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmphi.config.shared import VisionSettings
from mmphi.errors import ModelError

CONFIG, WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
AUTO: Mapping[str, Any] = {"mean": [], "std": [], "interpolation": "auto", "resize": "auto", "quick_gelu": "auto"}


def weights_file(pretrained: str) -> Path | None:
    """Returns the weights file that a setting names, directly or by its open_clip folder; ``None`` for a tag.

    Raises:
        ModelError: If a folder has no weights.
    """
    path = Path(pretrained)
    if not pretrained or not path.exists():
        return None
    if path.is_file():
        return path
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None and ("/" in pretrained or (path / CONFIG).is_file()):  # Else a tag may have the name of a folder.
        raise ModelError(f"vision.pretrained = {pretrained}: the folder has none of {', '.join(WEIGHTS)}")
    return found


def prepared_for(settings: VisionSettings) -> VisionSettings:
    """Returns the settings; for a weights file, values that differ from open_clip's defaults are filled in.

    Args:
        settings: The ``vision`` section; values that are set are kept.

    Raises:
        ModelError: If the tags of the architecture differ, and neither the settings nor a file decides.
    """
    model = settings.model.replace("/", "-") if not settings.model.endswith(".json") else settings.model
    file = weights_file(settings.pretrained)
    if file is None or all(getattr(settings, name) != value for name, value in AUTO.items()):
        return settings
    usual = _usual(model)
    found = {**usual, **_described(model), **_config_of_folder(file)}
    if not (file.parent / CONFIG).is_file():
        tags = _of_tags(model)
        unsettled = [n for n, v in tags.items() if len(v) > 1 and getattr(settings, n) == AUTO[n]]
        if unsettled:
            raise ModelError(_choices(settings, tags, unsettled), _hint(tags, unsettled))
        found |= {name: json.loads(next(iter(values))) for name, values in tags.items() if len(values) == 1}
    # Values equal to open_clip's defaults stay unset, so that cache keys and digests of earlier versions remain valid.
    changed = {n: v for n, v in found.items() if getattr(settings, n) == AUTO[n] and v != usual[n]}
    return settings.model_copy(update=changed)


def preprocess_of(settings: VisionSettings) -> dict[str, Any]:
    """Returns the preprocessing settings that are set, under their names in open_clip's ``PreprocessCfg``."""
    names = {"mean": "mean", "std": "std", "interpolation": "interpolation", "resize": "resize_mode"}
    return {theirs: getattr(settings, own) for own, theirs in names.items() if getattr(settings, own) != AUTO[own]}


def quick_gelu_of(settings: VisionSettings) -> bool | None:
    """Whether OpenAI's activation (QuickGELU) is set; ``None`` for ``auto``."""
    return None if settings.quick_gelu == "auto" else settings.quick_gelu == "yes"


def _read(config: Mapping[str, Any], quick_gelu: Any) -> dict[str, Any]:
    """Settings from an open_clip configuration; missing entries are left out."""
    found: dict[str, Any] = {}
    for own, theirs in (
        ("mean", "mean"),
        ("std", "std"),
        ("interpolation", "interpolation"),
        ("resize", "resize_mode"),
    ):
        value = config.get(theirs)
        if value is not None:
            found[own] = [float(each) for each in value] if own in ("mean", "std") else str(value)
    if quick_gelu is not None:
        found["quick_gelu"] = "yes" if quick_gelu else "no"
    return found


def _usual(model: str) -> dict[str, Any]:
    """open_clip's defaults for a weights file of an architecture."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    own = _own_config(model).get("model_cfg") if model.endswith(".json") else open_clip.get_model_config(model)
    own, plain = own or {}, PreprocessCfg()
    config = {name: getattr(plain, name) for name in ("mean", "std", "interpolation", "resize_mode")}
    return _read(config, bool(own.get("quick_gelu", False)))


def _own_config(model: str) -> dict[str, Any]:
    """User-supplied JSON configuration of an architecture, with or without its preprocessing.

    Raises:
        ModelError: If it cannot be read.
    """
    try:
        config = json.loads(Path(model).read_text())
        return config if "model_cfg" in config else {"model_cfg": config}
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"vision.model = {model} is no configuration of open_clip: {error}", "check the file"
        ) from error


def _described(model: str) -> dict[str, Any]:
    """Preprocessing settings in a user-supplied JSON configuration; empty for the name of an architecture."""
    return _read(_own_config(model).get("preprocess_cfg") or {}, None) if model.endswith(".json") else {}


def _config_of_folder(file: Path) -> dict[str, Any]:
    """Settings in ``open_clip_config.json`` in the folder of a file; empty if it does not exist.

    Raises:
        ModelError: If it cannot be read.
    """
    path = file.parent / CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
        return _read(config.get("preprocess_cfg") or {}, config["model_cfg"].get("quick_gelu", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no configuration of open_clip: {error}", "fetch it again, or remove it") from error


def _of_tags(model: str) -> dict[str, dict[str, list[str]]]:
    """For each setting, its values (as JSON) and the tags with each value; empty without tags."""
    import open_clip

    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for tag in open_clip.list_pretrained_tags_by_model(model):
        config = open_clip.get_pretrained_cfg(model, tag)
        usual = _usual(model)
        quick = config.get("quick_gelu")
        own = {**usual, **_read(config, None if quick is None else bool(quick) or usual["quick_gelu"] == "yes")}
        for name, value in own.items():
            found[name].setdefault(json.dumps(value), []).append(tag)
    return found


def _choices(settings: VisionSettings, tags: Mapping[str, Mapping[str, list[str]]], unsettled: list[str]) -> str:
    lines = [
        f"{settings.pretrained} is a file, and weights of {settings.model} exist with different values:",
        *(
            f"  vision.{name} = {value.strip(chr(34))}: {', '.join(of)}"
            for name in unsettled
            for value, of in tags[name].items()
        ),
    ]
    return "\n".join(lines)


def _hint(tags: Mapping[str, Mapping[str, list[str]]], unsettled: list[str]) -> str:
    example = " ".join(f"--vision.{n} {next(iter(tags[n])).strip(chr(34))!r}" for n in unsettled)
    return f"set these, for example {example}; or put the model's {CONFIG} into the file's folder"
