"""From settings and upstream results to models that are ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from mmphi.data.features import FeatureStore, ImageFeatures, LiveFeatures
from mmphi.models.language import Language, load_language
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector
from mmphi.models.vision import load_tower
from mmphi.settings import Settings
from mmphi.stage import Result


def this_device() -> torch.device:
    """The accelerator that belongs to this process, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def image_features(settings: Settings, upstream: Mapping[str, Result]) -> ImageFeatures:
    """Stored features where an ``embed`` result is given, else the tower itself."""
    if "embed" in upstream:
        return FeatureStore.open(upstream["embed"].path)
    light_clip = upstream.get("light_clip")
    return LiveFeatures(load_tower(settings.vision, light_clip.path if light_clip else None).to(this_device()))


def language_of(settings: Settings, upstream: Mapping[str, Result]) -> Language:
    """The frozen language model, on this process's device."""
    pretrained = upstream.get("pretrain")
    return load_language(settings.language, pretrained.path if pretrained else None, this_device())


def assemble(settings: Settings, upstream: Mapping[str, Result], projector: Path) -> Multimodal:
    """All parts joined, with a projector read from its folder.

    Raises:
        ModelError: If a part cannot be loaded, or two do not fit.
    """
    return Multimodal(
        language_of(settings, upstream),
        Projector.load(projector),
        image_features(settings, upstream),
        settings.projector.max_length,
    )
