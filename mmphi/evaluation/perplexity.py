"""Loss of a language model on a text, under a stated protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmphi.errors import DataError

CHUNK = 1024


@dataclass(frozen=True)
class PerplexityProtocol:
    """Windows in which a text is scored.

    The whole text is tokenised at once without special tokens and cut into windows, each a separate forward pass. A
    window's first token is not scored. With a stride shorter than the window, a token is scored in the first window
    that contains it, with at least ``window - stride`` tokens of context (except in the first window).

    Attributes:
        window: Window length, in tokens.
        stride: Distance between the beginnings of windows, in tokens.
        tail: Whether a shorter last window is scored. Published figures for WikiText-2 leave it out.
        most_windows: Largest number of windows; 0 scores all.
    """

    window: int = 2048
    stride: int = 2048
    tail: bool = False
    most_windows: int = 0

    def windows(self, tokens: int) -> Iterator[tuple[int, int, int]]:
        """Yield begin, end and first scored token of each window of a text with ``tokens`` tokens."""
        scored, count = 1, 0
        for begin in range(0, tokens - 1, self.stride):
            end = min(begin + self.window, tokens)
            short = end - begin < self.window
            if (short and not self.tail and begin > 0) or (self.most_windows and count >= self.most_windows):
                break
            first = max(begin + 1, scored)
            if end > first:
                yield begin, end, first
            scored, count = end, count + 1
            if end == tokens:
                break

    def __str__(self) -> str:
        ends = "the last short one included" if self.tail else "the last short one left out"
        few = f", the first {self.most_windows}" if self.most_windows else ""
        return f"windows of {self.window:,} tokens every {self.stride:,}{few}, {ends}; the text tokenised as one"


@dataclass(frozen=True)
class TextLoss:
    """Loss of a model on a text.

    Attributes:
        nats: Summed loss, in nats.
        tokens: Number of scored tokens.
        bytes: UTF-8 length of the scored tokens' text.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean loss, in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, which are comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def text_loss(
    model: Any,
    tokenizer: Any,
    text: str,
    protocol: PerplexityProtocol,
    progress: Callable[[int], object] = lambda _: None,
) -> TextLoss:
    """Compute the loss of a language model on a text.

    Args:
        model: A Hugging Face causal LM, in eval mode.
        tokenizer: Its tokenizer.
        text: Text of any length.
        protocol: Windows to score.
        progress: Called with the number of scored tokens after each window.

    Raises:
        DataError: If the text has fewer than two tokens.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = list(protocol.windows(len(ids)))
    if not windows:
        raise DataError("the text is too short to score", "give one of at least two tokens")
    device, nats, tokens, scored = next(model.parameters()).device, 0.0, 0, []
    for begin, end, first in windows:
        window = ids[begin:end].to(device)
        places = torch.arange(first - begin - 1, end - begin - 1, device=device)
        logits = model(input_ids=window[None], use_cache=False, logits_to_keep=places).logits[0]
        nats += _summed(logits, window[first - begin :])
        tokens += end - first
        scored.append(ids[first:end])
        progress(end - first)
    decoded = tokenizer.decode(torch.cat(scored), skip_special_tokens=False)
    return TextLoss(nats, tokens, len(decoded.encode()))


def _summed(logits_KV: Tensor, targets_K: Tensor) -> float:
    """Summed cross-entropy, in chunks so that not all logits are converted to fp32 at once."""
    parts = zip(torch.split(logits_KV, CHUNK), torch.split(targets_K, CHUNK), strict=True)
    return sum(float(F.cross_entropy(logits.float(), targets, reduction="sum")) for logits, targets in parts)
