"""Vision encoders: any open_clip model, truncated at a layer, as a function from pixels to patch tokens."""

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
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor, nn

from mmphi.config.shared import VisionSettings
from mmphi.data.clip_weights import CONFIG, prepared_for, preprocess_of, quick_gelu_of, weights_file
from mmphi.data.hf_connectivity import hub_is_reachable
from mmphi.errors import ModelError
from mmphi.models.patches.bn_folding import fold_batch_norms
from mmphi.models.vision.feature_extraction import layer_tokens
from mmphi.models.vision.preprocess import Preprocess

LIGHT_CLIP, RANDOM = "light_clip", "random"


@dataclass(frozen=True)
class VisionReference:
    """Which vision encoder a model has, and the question that it was trained on for captions.

    Attributes:
        settings: Name, tag, layer, pooling.
        digest: Digest of the encoder: equal digests give equal features.
        folder: Folder of the light CLIP, if it was trained here.
        question: Question before captions in training; empty if captions had none.
        encoder: Name of an encoder that was passed as a module; it has to be passed again when the model is loaded.
        fingerprint: Some outputs of such an encoder on a fixed image.
    """

    settings: VisionSettings
    digest: str
    folder: Path | None = None
    question: str = ""
    encoder: str = ""
    fingerprint: tuple[float, ...] = ()


class VisionEncoder(nn.Module):
    """Frozen image encoder of a CLIP, up to one layer.

    Args:
        visual: An open_clip vision encoder. It is changed in place: in fp32, batch norms are folded.
        settings: Layer, CLS policy, pooling, precision.

    Attributes:
        tokens: Features per image.
        width: Width of a feature.
        preprocess: Function from a PIL image to pixels (3, H, W), uint8.
        digest: Digest of weights, layer, CLS policy, pooling, preprocessing and precision; equal digests give equal
            features.

    Raises:
        ModelError: If the encoder has no such layer, no CLS token to keep, or a grid that the pooling does not divide.
    """

    def __init__(self, visual: Any, settings: VisionSettings) -> None:
        super().__init__()
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        # Convolutions are fastest with channels last: two thirds of the time on a CPU.
        self.visual = visual.to(dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.settings = settings
        config = PreprocessCfg(**visual.preprocess_cfg)
        self.preprocess: Callable[[Image.Image], Tensor] = Preprocess(config)
        self.mean: Tensor
        self.std: Tensor
        for name in ("mean", "std"):  # On the encoder's device, to avoid a copy per batch.
            channels = torch.tensor(getattr(config, name), dtype=torch.float32)
            self.register_buffer(name, channels.view(-1, 1, 1), persistent=False)
        self.digest = _digest(visual, settings, config)
        height, width = config.size if isinstance(config.size, tuple | list) else (config.size, config.size)
        image = torch.rand(1, 3, int(height), int(width), generator=torch.Generator().manual_seed(0))
        self.tokens, self.width = self(image).shape[1:]
        if dtype == torch.float32 and fold_batch_norms(self, image):
            self.visual.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Tokens (B, tokens, width) of the chosen layer, row by row from the top left, after the CLS token if kept.

        Args:
            pixels_BCHW: uint8, as ``preprocess`` returns them, or scaled already.
        """
        parameter = next(self.visual.parameters())
        pixels = pixels_BCHW.to(parameter.device, non_blocking=True)
        return layer_tokens(self.visual, self.scaled(pixels).to(parameter.dtype), self.settings).float()

    def scaled(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (..., 3, H, W), fp32, bit-identical to those of open_clip's transform.

        Args:
            pixels: uint8; other types count as normalised already and are returned unchanged.
        """
        if pixels.dtype != torch.uint8:
            return pixels
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)


def encoder_output_shape(settings: VisionSettings, light_clip: dict[str, Any] | None = None) -> tuple[int, int]:
    """Number of features per image and their width, computed without weights.

    Args:
        settings: The ``vision`` section.
        light_clip: open_clip's configuration of the light CLIP, if the settings name it.

    Raises:
        ModelError: If there is no such model, or it cannot provide such features.
    """
    name = settings.model
    if light_clip is not None:
        name = "mmphi-light-clip"
        open_clip.factory._MODEL_CONFIGS[name] = light_clip
    elif Path(name).is_dir():
        return encoder_output_shape(settings, _model_config(Path(name)))
    else:
        name = _known(name)
        if not settings.pretrained:
            raise ModelError(f"vision.model = {name}, but vision.pretrained names no weights", _tags(name))
    try:
        with open_clip_warnings(), torch.device("meta"):
            visual = open_clip.create_model(name, pretrained=None, pretrained_text=False, device="meta").visual.eval()
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"the encoder of {name} cannot be built: {error}", "check the sizes of its encoders"
        ) from error
    size = PreprocessCfg(**visual.preprocess_cfg).size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    with torch.inference_mode():
        found = layer_tokens(visual, torch.zeros(1, 3, int(height), int(width), device="meta"), settings)
    return int(found.shape[1]), int(found.shape[2])


def _digest(visual: Any, settings: VisionSettings, config: PreprocessCfg) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    chosen = {name: getattr(settings, name) for name in ("layer", "cls", "pool", "precision")}
    if settings.quick_gelu != "auto":  # Omitted by default, so that digests of stored features do not change.
        chosen["quick_gelu"] = settings.quick_gelu
    digest.update(json.dumps([chosen, str(config)], sort_keys=True).encode())
    return digest.hexdigest()


def load_clip(settings: VisionSettings, light_clip: Path | None = None) -> Any:
    """Whole open_clip model: by name and pretrained tag or weights file, by JSON config or folder, or the light CLIP.

    Raises:
        ModelError: If there is no such model, or its weights cannot be loaded.
    """
    name = settings.model
    if name == LIGHT_CLIP:
        if light_clip is None:
            raise ModelError("vision.model = light_clip, but no light CLIP was trained", "run `mmphi light_clip`")
        return load_saved_clip(light_clip)
    if Path(name).is_dir():
        return load_saved_clip(Path(name), settings)
    return _create(_known(name), settings)


def _known(name: str) -> str:
    """Name of a model in open_clip; a JSON configuration is registered first.

    Raises:
        ModelError: If there is no such model.
    """
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ModelError(f"vision.model = {name}: there is no such file", "give the path of an open_clip config")
        config = json.loads(Path(name).read_text())
        if "model_cfg" in config:
            open_clip.factory._MODEL_CONFIGS[Path(name).stem] = config["model_cfg"]
        else:
            open_clip.add_model_config(name)
        name = Path(name).stem
    known = open_clip.list_models()
    if ":" not in name and name.replace("/", "-") not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise ModelError(f"vision.model = {name} is not an open_clip model", f"did you mean {', '.join(near)}?")
    return name


def _tags(name: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"tags: {', '.join(tags) or 'none'}; without network, the path of a weights file; or {RANDOM}"


def _create(name: str, settings: VisionSettings) -> Any:
    """Model with the activation of its weights, which may differ from the architecture's default."""
    hint, pretrained = _tags(name), settings.pretrained
    if not pretrained:
        raise ModelError(f"vision.model = {name}, but vision.pretrained names no weights", hint)
    file = weights_file(pretrained)
    quick = quick_gelu_of(settings)
    if file is None and pretrained != RANDOM:
        if quick is None and open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"):
            quick = True
        hub_is_reachable()  # If not, sets offline mode: open_clip would retry for most of a minute.
    try:
        with warnings.catch_warnings(), open_clip_warnings() as messages:
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            model = open_clip.create_model(
                name,
                pretrained=None if pretrained == RANDOM else str(file or pretrained),
                pretrained_text=False,
                force_preprocess_cfg=preprocess_of(settings) or None,
                **_activation(quick),
            )
    except Exception as error:  # open_clip passes on any exception of its hub client.
        raise ModelError(f"vision.pretrained = {pretrained} of {name} cannot be loaded: {error}", hint) from error
    if messages and pretrained != RANDOM:
        raise ModelError(f"vision.pretrained = {pretrained} of {name} was loaded incompletely: {messages[0]}", hint)
    return model


def _activation(quick_gelu: bool | None) -> dict[str, bool]:
    """open_clip's arguments for an activation; ``None`` keeps the architecture's default."""
    return {"quick_gelu": False} if quick_gelu is False else {"force_quick_gelu": bool(quick_gelu)}


@contextmanager
def open_clip_warnings() -> Iterator[list[str]]:
    """Collect warnings on the root logger, where open_clip logs, instead of printing them."""
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


def load_saved_clip(folder: Path, settings: VisionSettings | None = None) -> Any:
    """CLIP from a folder that open_clip or the stage ``light_clip`` wrote; the folder may have been moved.

    Args:
        folder: Folder with ``open_clip_config.json`` and weights.
        settings: The ``vision`` section, for another preprocessing or activation.

    Raises:
        ModelError: If the folder has no such model.
    """
    try:
        config = _config_of(folder) | {"model_cfg": _model_config(folder)}
        name = f"mmphi-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}"
        open_clip.factory._MODEL_CONFIGS[name] = config["model_cfg"]
        with open_clip_warnings():
            return open_clip.create_model(
                name,
                pretrained=str(weights_file(str(folder))),
                pretrained_text=False,
                force_preprocess_cfg=(config.get("preprocess_cfg") or {})
                | (preprocess_of(settings) if settings else {}),
                **_activation(quick_gelu_of(settings) if settings else None),
            )
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"the CLIP in {folder} cannot be loaded: {error}", "train it again with --force") from error


def _model_config(folder: Path) -> dict[str, Any]:
    """Configuration of the model in a folder, with the path of the text tower in the same folder."""
    config: dict[str, Any] = _config_of(folder)["model_cfg"]
    text = config.get("text_cfg") or {}
    if "hf_model_name" in text and (folder / "text_tower").is_dir():
        text["hf_model_name"] = str(folder / "text_tower")
    return config


def _config_of(folder: Path) -> dict[str, Any]:
    """open_clip's configuration in a folder.

    Raises:
        ModelError: If there is none.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        return config if config["model_cfg"] else {}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ModelError(f"no CLIP can be read from {folder}: {error}", f"it needs {CONFIG} and weights") from error


def load_vision_encoder(
    settings: VisionSettings, light_clip: Path | None = None, *, earlier: bool = False
) -> VisionEncoder:
    """Vision encoder of a CLIP, truncated at the layer in the settings.

    Args:
        settings: The ``vision`` section.
        light_clip: Folder of the light CLIP trained here.
        earlier: Whether to load weights files as earlier versions did: with open_clip's default preprocessing and
            activation.

    Raises:
        ModelError: If the encoder cannot be loaded, or cannot provide such features.
    """
    if not earlier:
        settings = prepared_for(settings)
    return VisionEncoder(load_clip(settings, light_clip).visual, settings)
