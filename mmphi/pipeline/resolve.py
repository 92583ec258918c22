"""Resolves open settings before cache keys are computed: precision from the machine, revisions from the hub.

Keys therefore contain the values in effect, and a bf16 result from a GPU is not reused for an fp32 run on a CPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from mmphi.config.declared_view import covered
from mmphi.config.fields import field_of, leaves
from mmphi.config.presets import FILE_ENDINGS
from mmphi.config.section import Section
from mmphi.data.clip_weights import prepared_for
from mmphi.data.hf_connectivity import hub_is_reachable

R = TypeVar("R", bound=Section)
HUB_TIMEOUT_S = 5.0


def resolved(settings: R, declared: Iterable[str]) -> R:
    """Returns the settings with ``auto`` precision and empty revisions filled in, as far as they are declared.

    Args:
        settings: All settings.
        declared: Dotted names of the settings that stages may read.
    """
    root, changed = type(settings), settings
    names = dict(leaves(settings))
    for name, value in names.items():
        field = field_of(root, name)
        if field is None or not covered(name, declared):
            continue
        section, _, last = name.rpartition(".")
        new = value
        if last == "precision" and value == "auto":
            new = "bf16" if gpu_has_bf16() else "fp32"
        elif last == "revision" and not value:
            new = _revision(section, names, declared)
        if new != value:
            changed = _with(changed, name.split("."), new)
    if covered("vision.quick_gelu", declared) and names.get("vision.pretrained"):
        # A file of CLIP weights determines its preprocessing and activation function.
        changed = changed.model_copy(update={"vision": prepared_for(changed.vision)})  # type: ignore[attr-defined]
    return changed


def _with(value: Any, path: list[str], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, list):
        index = int(path[0])
        return [*value[:index], _with(value[index], path[1:], new), *value[index + 1 :]]
    return value.model_copy(update={path[0]: _with(getattr(value, path[0]), path[1:], new)})


def _revision(section: str, names: dict[str, Any], declared: Iterable[str]) -> str:
    """Newest revision of the hub repository that a section uses; empty if it uses none or the revision is unknown."""
    if section == "language":
        return _of_repository(names["language.model"], "model")
    if section == "vision":
        tag = names["vision.pretrained"]
        return _of_repository(_tag_repository(names["vision.model"], tag), "model") if tag else ""
    if section == "textgen":  # Pretraining on files declares these settings too, but uses no generator.
        unused = covered("pretrain.source", declared) and names["pretrain.source"] == "files"
        return "" if unused else _of_repository(names["textgen.model"], "model")
    if names.get(f"{section}.kind") in ("datasets", "auto"):  # `kind` of a text source may be detected from its path.
        return _of_repository(names[f"{section}.path"].partition(":")[0], "dataset")
    return ""


def _tag_repository(model: str, tag: str) -> str:
    if Path(tag).exists():
        return ""
    import open_clip

    return str(open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "")).rstrip("/")


def _of_repository(name: str, kind: str) -> str:
    if "/" not in name or name.startswith(("/", ".", "~")) or name.endswith(FILE_ENDINGS) or Path(name).exists():
        return ""
    return hub_revision(name, kind)


@cache
def gpu_has_bf16() -> bool:
    """Whether this machine has a GPU that supports bf16; imports torch only if an NVIDIA driver is found."""
    if not shutil.which("nvidia-smi") and not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


@cache
def hub_revision(name: str, kind: str) -> str:
    """Newest commit of a hub repository, else the one in the local cache, else an empty string.

    Args:
        name: Repository as ``owner/name``.
        kind: ``model`` or ``dataset``.
    """
    from huggingface_hub import HfApi, constants

    if hub_is_reachable():
        try:
            info = HfApi().repo_info(name, repo_type=kind, timeout=HUB_TIMEOUT_S)
            return str(info.sha or "")
        except Exception:  # Any error of the HTTP client or the hub: fall back to the local cache.
            pass
    folder = Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)
    reference = folder / f"{kind}s--{name.replace('/', '--')}" / "refs" / "main"
    return reference.read_text().strip() if reference.is_file() else ""
