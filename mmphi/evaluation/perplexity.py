"""The loss of a language model on a text, under a stated protocol."""

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
    """How a text is read.

    The whole text is tokenised at once, with nothing added, and cut into windows; each window is read alone. Its first
    token is only given. With a stride shorter than the window, a token is scored in the first window that it is in, and
    has at least ``window - stride`` tokens before it (but in the first window).

    Attributes:
        window: Tokens that the model sees at once.
        stride: Tokens from one window's beginning to the next's.
        tail: Whether a last window shorter than the others counts. Published figures for WikiText-2 leave it out.
        most_windows: Score at most so many; 0 scores all.
    """

    window: int = 2048
    stride: int = 2048
    tail: bool = False
    most_windows: int = 0

    def windows(self, tokens: int) -> Iterator[tuple[int, int, int]]:
        """Begin, end and first scored token of each window."""
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
    """What a model loses on a text.

    Attributes:
        nats: Summed loss.
        tokens: Scored.
        bytes: Of the text that these tokens are, in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """What no tokenizer changes."""
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def text_loss(
    model: Any,
    tokenizer: Any,
    text: str,
    protocol: PerplexityProtocol,
    progress: Callable[[int], object] = lambda _: None,
) -> TextLoss:
    """Score a text.

    Args:
        model: A Hugging Face causal LM, in eval mode.
        tokenizer: Its tokenizer.
        text: Of any length.
        protocol: How it is read.
        progress: Told the tokens of each window scored.

    Raises:
        DataError: If there is less than two tokens of it.
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
    """In chunks: all logits in fp32 would be as many again."""
    parts = zip(torch.split(logits_KV, CHUNK), torch.split(targets_K, CHUNK), strict=True)
    return sum(float(F.cross_entropy(logits.float(), targets, reduction="sum")) for logits, targets in parts)
