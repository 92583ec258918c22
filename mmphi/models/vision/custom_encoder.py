"""Any torch module or timm model as a vision encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmphi.errors import ModelError

TIMM = "timm/"
SHOWN_OUTPUTS, TOLERANCE = 16, 0.02  # Recorded outputs, and their tolerance on other machines, relative.


class CustomEncoder(nn.Module):
    """Frozen module as a vision encoder with features (N, T, D).

    Args:
        module: Module from pixels (N, C, H, W) to features (N, T, D) or (N, D); of transformers' outputs,
            ``last_hidden_state`` is used. It is frozen in place.
        preprocess: Function, transform or transformers image processor, from a PIL image in RGB to pixels (C, H, W).
            Without it, images have to be tensors of pixels.
        name: Name that is recorded with models trained on it; by default the module's class.
        image_size: Side of the input of a module without ``preprocess``, in pixels.

    Attributes:
        tokens: Features per image, T.
        width: Width of a feature, D.
        digest: Digest of name and weights.
        fingerprint: Some of its outputs on a fixed image.

    Raises:
        ModelError: If the module does not give such features.
    """

    def __init__(
        self, module: nn.Module, preprocess: Callable[[Any], Any] | None = None, name: str = "", image_size: int = 224
    ) -> None:
        super().__init__()
        self.module = module.eval().requires_grad_(False)
        self._given, self.name = preprocess, name or type(module).__name__
        self.preprocess: Callable[[Any], Tensor] = self._pixels
        self.tokens: int
        self.width: int
        # A wide image distinguishes cropping from squashing.
        shape = (image_size, image_size * 3 // 2) if preprocess else (image_size, image_size)
        image = _gradient(*shape)
        pixels = self._pixels(Image.fromarray(image)) if preprocess else torch.from_numpy(image).permute(2, 0, 1) / 255
        try:
            found = self(pixels[None])
        except ModelError:
            raise
        except Exception as error:  # The module's own code may raise anything.
            hint = "check preprocess" if preprocess else "give preprocess, or the image_size that it takes"
            raise ModelError(
                f"{self.name} cannot read pixels of shape {tuple(pixels.shape)}: {_line(error)}", hint
            ) from error
        self.tokens, self.width = found.shape[1:]
        self.fingerprint = tuple(float(f"{value:.5g}") for value in _some(found.flatten().float().cpu()))
        self.digest = _digest(self.module, self.name)

    def _pixels(self, image: Any) -> Tensor:
        """Pixels (C, H, W) of a PIL image.

        Raises:
            ModelError: If there is no preprocessing, or it returns another shape.
        """
        given: Any = self._given
        if given is None:
            raise ModelError(
                f"{self.name} has no preprocessing", "give preprocess, or images as tensors of pixels (C, H, W)"
            )
        processor = hasattr(given, "image_mean")  # An image processor of transformers.
        found: Any = given(images=image, return_tensors="pt") if processor else given(image)
        if hasattr(found, "keys") and "pixel_values" in found:
            found = found["pixel_values"][0]
        pixels = torch.as_tensor(found)
        if pixels.ndim != 3:
            raise ModelError(
                f"preprocess gives shape {tuple(pixels.shape)}, not (C, H, W)", "return the pixels of one image"
            )
        return pixels

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Features (N, T, D), float32, of pixels (N, C, H, W)."""
        parameter = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        if parameter is not None:
            pixels = pixels.to(parameter.device)
            pixels = pixels.to(parameter.dtype) if pixels.is_floating_point() else pixels
        found = self.module(pixels)
        found = getattr(found, "last_hidden_state", found)
        if not isinstance(found, Tensor) or found.ndim not in (2, 3) or len(found) != len(pixels):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ModelError(
                f"{self.name} gives {shape} for {len(pixels)} images, not (N, T, D)",
                "wrap it in a module that returns features (images, tokens, width)",
            )
        return (found if found.ndim == 3 else found[:, None]).float()

    def check(self, name: str, fingerprint: Sequence[float]) -> None:
        """Check that this is the encoder that a model was trained with.

        Args:
            name: Recorded name, for the message.
            fingerprint: Recorded outputs.

        Raises:
            ModelError: If its outputs on the fixed image differ.
        """
        scale = max(map(abs, fingerprint), default=0.0)
        same = len(fingerprint) == len(self.fingerprint) and all(
            abs(a - b) <= TOLERANCE * scale for a, b in zip(fingerprint, self.fingerprint, strict=True)
        )
        if not same:
            raise ModelError(
                f"{self.name} is not the encoder {name} that the model was trained with: its features differ",
                "give the same module, weights and preprocess",
            )


def timm_encoder(name: str) -> CustomEncoder:
    """Pretrained timm model with its own preprocessing.

    Args:
        name: ``timm/NAME``, with a NAME of ``timm.list_models``, and optionally ``.TAG``.

    Raises:
        ModelError: If there is no such model, or its weights cannot be loaded.
    """
    import difflib

    import timm

    own = name.removeprefix(TIMM)
    known = timm.list_models()
    if own.partition(".")[0] not in known:
        near = difflib.get_close_matches(own, known, n=3, cutoff=0.3)
        raise ModelError(f"timm has no model {own}", f"did you mean {', '.join(near)}?")
    try:
        model = timm.create_model(own, pretrained=True, num_classes=0)
    except Exception as error:  # timm passes on any exception of its hub client.
        raise ModelError(
            f"timm's weights of {own} cannot be downloaded: {_line(error)}",
            "without network, pass the module itself: vision=timm.create_model(...)",
        ) from error
    data: Any = timm.data
    transform = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    return CustomEncoder(TimmTokens(model), transform, name)


class TimmTokens(nn.Module):
    """Last feature map of a timm model as features (N, T, D), row by row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (N, T, D) of pixels (N, 3, H, W)."""
        found: Tensor = self.model.forward_features(pixels)
        if found.ndim == 4 and found.shape[1] == self.model.num_features:
            return found.flatten(2).transpose(1, 2)
        return found.flatten(1, 2) if found.ndim == 4 else found


def _gradient(height: int, width: int) -> Any:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, rows * 3 + columns * 5], axis=-1).astype(np.uint8)


def _some(values: Tensor) -> list[float]:
    return [float(v) for v in values[torch.linspace(0, len(values) - 1, SHOWN_OUTPUTS).long()]]


def _digest(module: nn.Module, name: str) -> str:
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return f"custom:{digest.hexdigest()}"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
