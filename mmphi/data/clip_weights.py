"""How images are prepared, and which activation is computed, for the weights of a CLIP that are in a file.

A pretrained tag of open_clip brings both. A file brings neither: open_clip prepares images for it as OpenAI did, and
computes the activation that the architecture has by default. For SigLIP and MobileCLIP, and for OpenAI's own weights,
that is wrong, and nothing fails. So for a file these are taken from, in this order:

1. the settings;
2. ``open_clip_config.json`` in the file's folder, as open_clip and the stage ``light_clip`` write it;
3. the pretrained tags of the architecture, as far as all of them agree;
4. open_clip's defaults, for an architecture that has no tag.
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
    """The file of weights that a setting names, in a folder as open_clip writes it or alone; none for a tag.

    Raises:
        ModelError: If a folder has no weights.
    """
    path = Path(pretrained)
    if not pretrained or not path.exists():
        return None
    if path.is_file():
        return path
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None and ("/" in pretrained or (path / CONFIG).is_file()):  # Not a tag that is called like a folder.
        raise ModelError(f"vision.pretrained = {pretrained}: the folder has none of {', '.join(WEIGHTS)}")
    return found


def prepared_for(settings: VisionSettings) -> VisionSettings:
    """The same settings; for a file of weights, with what is not open_clip's default filled in.

    Args:
        settings: The ``vision`` section; what is set in it stays.

    Raises:
        ModelError: If the tags of the architecture differ, and neither the settings nor a file say which is right.
    """
    model = settings.model.replace("/", "-") if not settings.model.endswith(".json") else settings.model
    file = weights_file(settings.pretrained)
    if file is None or all(getattr(settings, name) != value for name, value in AUTO.items()):
        return settings
    usual = _usual(model)
    found = {**usual, **_described(model), **_beside(file)}
    if not (file.parent / CONFIG).is_file():
        tags = _of_tags(model)
        unsettled = [n for n, v in tags.items() if len(v) > 1 and getattr(settings, n) == AUTO[n]]
        if unsettled:
            raise ModelError(_choices(settings, tags, unsettled), _hint(tags, unsettled))
        found |= {name: json.loads(next(iter(values))) for name, values in tags.items() if len(values) == 1}
    # What is open_clip's default anyway is left open, so that keys and digests of earlier versions stay.
    changed = {n: v for n, v in found.items() if getattr(settings, n) == AUTO[n] and v != usual[n]}
    return settings.model_copy(update=changed)


def preprocess_of(settings: VisionSettings) -> dict[str, Any]:
    """What of open_clip's ``PreprocessCfg`` the settings say."""
    names = {"mean": "mean", "std": "std", "interpolation": "interpolation", "resize": "resize_mode"}
    return {theirs: getattr(settings, own) for own, theirs in names.items() if getattr(settings, own) != AUTO[own]}


def quick_gelu_of(settings: VisionSettings) -> bool | None:
    """Whether the settings ask for OpenAI's activation; ``None`` where they leave it open."""
    return None if settings.quick_gelu == "auto" else settings.quick_gelu == "yes"


def _read(config: Mapping[str, Any], quick_gelu: Any) -> dict[str, Any]:
    """A description in open_clip's terms as settings, as far as it says anything."""
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
    """What open_clip does for a file of weights."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    own = _own_config(model).get("model_cfg") if model.endswith(".json") else open_clip.get_model_config(model)
    own, plain = own or {}, PreprocessCfg()
    config = {name: getattr(plain, name) for name in ("mean", "std", "interpolation", "resize_mode")}
    return _read(config, bool(own.get("quick_gelu", False)))


def _own_config(model: str) -> dict[str, Any]:
    """A JSON configuration of the user's own: of an architecture alone, or with its preprocessing.

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
    """What a JSON configuration of the user's own says about the preprocessing."""
    return _read(_own_config(model).get("preprocess_cfg") or {}, None) if model.endswith(".json") else {}


def _beside(file: Path) -> dict[str, Any]:
    """What ``open_clip_config.json`` in the folder of a file says.

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
    """For each setting its values in JSON, each with the tags that have it; empty without tags."""
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
        f"{settings.pretrained} is a file, and weights of {settings.model} are of several kinds:",
        *(
            f"  vision.{name} = {value.strip(chr(34))}: {', '.join(of)}"
            for name in unsettled
            for value, of in tags[name].items()
        ),
    ]
    return "\n".join(lines)


def _hint(tags: Mapping[str, Mapping[str, list[str]]], unsettled: list[str]) -> str:
    example = " ".join(f"--vision.{n} {next(iter(tags[n])).strip(chr(34))!r}" for n in unsettled)
    return f"say which, for example {example}; or put the model's {CONFIG} beside the file"
