"""Audio projectors: one for word embeddings, initially the identity, and one for Whisper's encoder frames."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmphi.errors import ModelError

Link = Literal["transcript", "soft", "encoder"]
WEIGHTS, SHAPE = "speech.safetensors", "speech.json"


@dataclass(frozen=True)
class AudioProjectorConfig:
    """Shape of an audio projector.

    Attributes:
        link: Kind of features: embeddings of the transcript's tokens (``transcript``), mean embeddings weighted by
            token probabilities (``soft``), or frames of Whisper's encoder (``encoder``).
        input_width: Width D of a feature: the language model's, or that of a frame times ``stack`` (``encoder``).
        output_width: Width W of the language model's embeddings.
        width: Hidden width; 0 takes ``output_width``.
        stack: Frames concatenated to one feature (``encoder``), else 1.
        temperature: Softmax temperature of Whisper's logits (``soft``).
    """

    link: Link
    input_width: int
    output_width: int
    width: int = 0
    stack: int = 1
    temperature: float = 1.0


class AudioProjector(nn.Module):
    """Maps audio features (..., D) of any float type to embeddings (..., W); weights and arithmetic are fp32.

    Word embeddings pass a residual block whose last matrix is initialised to zero: untrained, it is the identity.
    Encoder frames pass Ultravox's projector: RMSNorm, SwiGLU, RMSNorm and a linear layer to the model's width. The
    linear layer is initialised so that its outputs have the same root mean square as the model's embeddings.

    Args:
        config: Shape of the projector.
        scale: Root mean square of the language model's embeddings (``encoder``).
    """

    def __init__(self, config: AudioProjectorConfig, scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        hidden = config.width or config.output_width
        if config.link == "encoder":
            self.norm = nn.RMSNorm(config.input_width)
            self.widen = nn.Linear(config.input_width, 2 * hidden, bias=False)
            self.inner_norm = nn.RMSNorm(hidden)
            self.out = nn.Linear(hidden, config.output_width, bias=False)
            with torch.no_grad():  # Inputs have a root mean square of 1, so that of the outputs is `scale`.
                self.out.weight.normal_(std=scale * hidden**-0.5)
            return
        if config.input_width != config.output_width:
            raise ModelError(
                f"embeddings of width {config.input_width} do not fit a language model of width {config.output_width}"
            )
        self.norm = nn.RMSNorm(config.input_width)
        self.widen = nn.Linear(config.input_width, hidden)
        self.out = nn.Linear(hidden, config.output_width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Project features (..., D) to embeddings (..., W)."""
        with torch.autocast(features.device.type, enabled=False):
            given = features.float()
            if self.config.link != "encoder":
                residual: Tensor = self.out(F.silu(self.widen(self.norm(given))))
                return given + residual
            value, gate = self.widen(self.norm(given)).chunk(2, dim=-1)
            projected: Tensor = self.out(self.inner_norm(F.silu(gate) * value))
        return projected

    def save(self, folder: Path) -> None:
        """Write ``speech.safetensors`` and ``speech.json`` for :meth:`load`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        (folder / SHAPE).write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> AudioProjector:
        """Load a projector that :meth:`save` wrote.

        Raises:
            ModelError: If a file is missing, corrupt, of another shape, or contains non-finite values.
        """
        try:
            projection = cls(AudioProjectorConfig(**json.loads((folder / SHAPE).read_text())))
            weights = load_file(folder / WEIGHTS)
            projection.load_state_dict(weights)
        except (OSError, TypeError, ValueError, SafetensorError, RuntimeError) as error:
            raise ModelError(
                f"the audio projector in {folder} cannot be loaded: {error}", "train it again with --force"
            ) from error
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ModelError(f"{folder / WEIGHTS}: {name} is not finite", "train it again with --force")
        return projection


def identity_audio_projector(width: int, link: Link = "transcript", temperature: float = 1.0) -> AudioProjector:
    """Untrained projector of word embeddings: the identity.

    Args:
        width: Width of the language model's embeddings.
        link: ``transcript`` or ``soft``.
        temperature: Softmax temperature of Whisper's logits (``soft``).
    """
    return AudioProjector(AudioProjectorConfig(link, width, width, temperature=temperature))
