"""Image towers: any open_clip model, cut off at a layer, as a function from pixels to patch tokens."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from mmphi.errors import ModelError
from mmphi.settings.shared import VisionSettings

LIGHT_CLIP, RANDOM = "light_clip", "random"


@dataclass(frozen=True)
class Vision:
    """Which image tower a model has.

    Attributes:
        settings: Name, tag, layer, pooling.
        digest: Of the tower: equal digests give equal features.
        folder: The light CLIP's own, where it was trained here.
    """

    settings: VisionSettings
    digest: str
    folder: Path | None = None


class Tower(nn.Module):
    """The image half of a CLIP, frozen, up to one layer.

    Args:
        visual: An open_clip image tower.
        settings: Layer, CLS policy, pooling, precision.

    Attributes:
        tokens: Features per image.
        width: Width of a feature.
        preprocess: From a PIL image to pixels (3, H, W).
        digest: Of weights, layer, CLS policy, pooling, preprocessing and precision; equal digests give equal features.

    Raises:
        ModelError: If the tower has no such layer, no CLS token to keep, or a grid that the pooling does not divide.
    """

    def __init__(self, visual: Any, settings: VisionSettings) -> None:
        super().__init__()
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.visual = visual.to(dtype).eval().requires_grad_(False)
        self.settings = settings
        config = PreprocessCfg(**visual.preprocess_cfg)
        self.preprocess: Callable[[Image.Image], Tensor] = image_transform_v2(config, is_train=False)
        self.digest = _digest(visual, settings, config)
        height, width = config.size if isinstance(config.size, tuple | list) else (config.size, config.size)
        self.tokens, self.width = self(torch.zeros(1, 3, int(height), int(width))).shape[1:]

    @torch.inference_mode()
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Tokens (B, tokens, width) of the chosen layer, row by row from the top left, after the CLS token if kept."""
        parameter = next(self.visual.parameters())
        pixels_BCHW = pixels_BCHW.to(parameter.device, parameter.dtype)
        if isinstance(self.visual, TimmModel):
            map_BDHW, cls_BPD = _timm_layer(self.visual.trunk, pixels_BCHW, self.settings.layer)
        else:
            map_BDHW, cls_BPD = _open_clip_layer(self.visual, pixels_BCHW, self.settings.layer)
        pooled = self._pool(map_BDHW).flatten(2).transpose(1, 2)
        if self.settings.cls == "keep":
            if cls_BPD is None:
                raise ModelError("vision.cls = keep, but this tower has no CLS token", "use vision.cls = drop")
            pooled = torch.cat([cls_BPD[:, :1], pooled], dim=1)
        return pooled.float()

    def _pool(self, map_BDHW: Tensor) -> Tensor:
        side, (height, width) = self.settings.pool, map_BDHW.shape[2:]
        if height % side or width % side:
            fits = [str(n) for n in range(1, 17) if height % n == 0 and width % n == 0]
            raise ModelError(
                f"vision.pool = {side} does not divide the grid of {height} x {width} patches", f"use {', '.join(fits)}"
            )
        return nn.functional.avg_pool2d(map_BDHW, side) if side > 1 else map_BDHW


def _open_clip_layer(visual: Any, pixels_BCHW: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
    if not hasattr(visual, "forward_intermediates"):
        raise ModelError(
            f"{type(visual).__name__} cannot give the tokens of a layer", "use a ViT, ResNet or timm tower"
        )
    outputs = visual.forward_intermediates(
        pixels_BCHW, indices=_layer_index(_depth(visual), layer), intermediates_only=True, output_extra_tokens=True
    )
    prefix = outputs.get("image_intermediates_prefix")
    return outputs["image_intermediates"][0], prefix[0] if prefix else None


def _depth(visual: Any) -> int:
    if hasattr(visual, "transformer"):
        return len(visual.transformer.resblocks)
    return 5  # open_clip's ResNets: the stem and four stages.


def _timm_layer(trunk: Any, pixels_BCHW: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
    """Blocks of a timm transformer; of a convolutional net its stages, and as the last layer its final features."""
    if hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed"):
        index = _layer_index(len(trunk.blocks), layer)
        (outputs,) = trunk.forward_intermediates(
            pixels_BCHW, indices=index, intermediates_only=True, return_prefix_tokens=True
        )
        return outputs if isinstance(outputs, tuple) else (outputs, None)
    if layer == -1:
        features: Tensor = trunk.forward_features(pixels_BCHW)
        return features, None
    stages = len(trunk.feature_info)
    index = _layer_index(stages + 1, layer)
    return trunk.forward_intermediates(pixels_BCHW, indices=index, intermediates_only=True)[0], None


def _layer_index(depth: int, layer: int) -> list[int]:
    if -layer > depth:
        raise ModelError(f"vision.layer = {layer}, but the tower has {depth} layers", f"use -{depth} to -1")
    return [depth + layer]


def _digest(visual: Any, settings: VisionSettings, config: PreprocessCfg) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    chosen = {name: getattr(settings, name) for name in ("layer", "cls", "pool", "precision")}
    digest.update(json.dumps([chosen, str(config)], sort_keys=True).encode())
    return digest.hexdigest()


def load_clip(settings: VisionSettings, light_clip: Path | None = None) -> Any:
    """A whole open_clip model: by name and pretrained tag or weights file, by JSON config, or the one trained here.

    Raises:
        ModelError: If there is no such model, or its weights cannot be had.
    """
    name = settings.model
    if name == LIGHT_CLIP:
        if light_clip is None:
            raise ModelError("vision.model = light_clip, but no light CLIP was trained", "run `mmphi light_clip`")
        return load_saved_clip(light_clip)
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ModelError(f"vision.model = {name}: there is no such file", "give the path of an open_clip config")
        open_clip.add_model_config(name)
        name = Path(name).stem
    known = open_clip.list_models()
    if ":" not in name and name.replace("/", "-") not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise ModelError(f"vision.model = {name} is not an open_clip model", f"did you mean {', '.join(near)}?")
    return _create(name, settings.pretrained)


def _create(name: str, pretrained: str) -> Any:
    """A model as its weights need it: a tag may ask for another activation than the architecture's own."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    hint = f"tags: {', '.join(tags) or 'none'}; with no hub in reach give the path of its weights file"
    if not pretrained:
        raise ModelError(f"vision.model = {name}, but vision.pretrained says no weights", f"{hint}; or {RANDOM}")
    tag = {} if Path(pretrained).exists() or pretrained == RANDOM else open_clip.get_pretrained_cfg(name, pretrained)
    try:
        with warnings.catch_warnings(), open_clip_warnings() as said:
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            model = open_clip.create_model(
                name,
                pretrained=None if pretrained == RANDOM else pretrained,
                pretrained_text=False,
                force_quick_gelu=bool(tag.get("quick_gelu")),
            )
    except Exception as error:  # open_clip raises whatever its hub client does.
        raise ModelError(f"vision.pretrained = {pretrained} of {name} cannot be loaded: {error}", hint) from error
    if said and pretrained != RANDOM:
        raise ModelError(f"vision.pretrained = {pretrained} of {name} was not loaded whole: {said[0]}", hint)
    return model


@contextmanager
def open_clip_warnings() -> Iterator[list[str]]:
    """Collect what open_clip would warn of on the root logger, in place of printing it."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    root = logging.getLogger()
    before, root.handlers = root.handlers, [Collector(logging.WARNING)]
    try:
        yield messages
    finally:
        root.handlers = before


def load_saved_clip(folder: Path) -> Any:
    """A light CLIP from the folder its stage wrote; the folder may have been moved since.

    Raises:
        ModelError: If the folder holds no such model.
    """
    try:
        config = json.loads((folder / "open_clip_config.json").read_text())
        text = config["model_cfg"]["text_cfg"]
        if "hf_model_name" in text:
            text["hf_model_name"] = str(folder / "text_tower")
        name = f"mmphi-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}"
        open_clip.factory._MODEL_CONFIGS[name] = config["model_cfg"]
        with open_clip_warnings():
            return open_clip.create_model(
                name,
                pretrained=str(folder / "open_clip_model.safetensors"),
                pretrained_text=False,
                force_preprocess_cfg=config.get("preprocess_cfg"),
            )
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"no CLIP can be read from {folder}: {error}", "train it anew with --force") from error


def load_tower(settings: VisionSettings, light_clip: Path | None = None) -> Tower:
    """The image tower of a CLIP, cut off at the layer that the settings name.

    Args:
        settings: The ``vision`` section.
        light_clip: Folder of the CLIP trained here.

    Raises:
        ModelError: If it cannot be had, or cannot give such features.
    """
    return Tower(load_clip(settings, light_clip).visual, settings)
