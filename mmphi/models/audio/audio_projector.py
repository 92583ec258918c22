"""The layers between what is heard and a language model: one that begins as no layer at all, one that reads frames."""

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
class SpeechConfig:
    """Shape of a speech projection.

    Attributes:
        link: What it reads: embeddings of the words that were heard (``transcript``), those of all that may have been
            said, weighted (``soft``), or the frames of Whisper's encoder (``encoder``).
        input_width: Width of a feature: the language model's for words; that of a frame times ``stack`` for frames.
        output_width: Width W of the language model's embeddings.
        width: Inner width; 0 takes ``output_width``.
        stack: Frames laid side by side to one feature; 1 for words.
        temperature: What Whisper's logits are divided by (``soft``).
    """

    link: Link
    input_width: int
    output_width: int
    width: int = 0
    stack: int = 1
    temperature: float = 1.0


class SpeechProjection(nn.Module):
    """Maps what is heard (..., D) of any float type to embeddings (..., W); weights and arithmetic are fp32.

    Words pass a residual layer whose last matrix begins at zero: until it is trained, it gives every bit as it came.
    Frames pass Ultravox's projector: normalised, widened, gated (SwiGLU), normalised and brought to the model's width;
    the last norm begins at the size of the model's own embeddings, so that they are neither lost nor deafening.

    Args:
        config: Its shape.
        scale: Root mean square of the language model's embeddings (``encoder``).
    """

    def __init__(self, config: SpeechConfig, scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        hidden = config.width or config.output_width
        if config.link == "encoder":
            self.norm = nn.RMSNorm(config.input_width)
            self.widen = nn.Linear(config.input_width, 2 * hidden, bias=False)
            self.inner_norm = nn.RMSNorm(hidden)
            self.out = nn.Linear(hidden, config.output_width, bias=False)
            with torch.no_grad():  # Of rows with unit mean square, a matrix of such entries keeps that times scale.
                self.out.weight.normal_(std=scale * hidden**-0.5)
            return
        if config.input_width != config.output_width:
            raise ModelError(f"words of width {config.input_width} do not fit a model of width {config.output_width}")
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
        """Write ``speech.safetensors`` and ``speech.json``, all that :meth:`load` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        (folder / SHAPE).write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> SpeechProjection:
        """Read what :meth:`save` wrote.

        Raises:
            ModelError: If a file is missing, broken, of another shape, or holds values that are not finite.
        """
        try:
            projection = cls(SpeechConfig(**json.loads((folder / SHAPE).read_text())))
            weights = load_file(folder / WEIGHTS)
            projection.load_state_dict(weights)
        except (OSError, TypeError, ValueError, SafetensorError, RuntimeError) as error:
            raise ModelError(
                f"no speech projection can be read from {folder}: {error}", "train it again with --force"
            ) from error
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ModelError(f"{folder / WEIGHTS}: {name} is not finite", "train it again with --force")
        return projection


def identity_projection(width: int, link: Link = "transcript", temperature: float = 1.0) -> SpeechProjection:
    """A projection for words that was not trained: it changes nothing.

    Args:
        width: Of the language model.
        link: ``transcript`` or ``soft``.
        temperature: What Whisper's logits are divided by (``soft``).
    """
    return SpeechProjection(SpeechConfig(link, width, width, temperature=temperature))
