"""Which token comes next, and where an answer ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmphi.errors import GenerationError, SettingsError

GREEDY_BELOW = 0.01  # Temperature; logits divided by less overflow, and what is drawn is the likeliest token anyway.
MAX_TEMPERATURE = 100.0
SEEDS = range(-(2**63), 2**64)  # What torch.Generator takes.


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is chosen.

    Attributes:
        max_tokens: Longest answer, in tokens.
        temperature: The logits are divided by it; below :data:`GREEDY_BELOW`, as at 0, the likeliest token is taken.
        top_p: Only the likeliest tokens that together have this share are drawn from (Holtzman et al. 2020).
        seed: Equal seeds give equal answers; drawn again where there is none.
        stop: Texts before which an answer ends.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SettingsError(f"max_tokens = {self.max_tokens}, but an answer has a token at least")
        if not 0.0 <= self.temperature <= MAX_TEMPERATURE:
            raise SettingsError(
                f"temperature = {self.temperature} is not between 0 and {MAX_TEMPERATURE:.0f}",
                "0 is greedy, 1 draws from the model's own distribution",
            )
        if not 0.0 < self.top_p <= 1.0:
            raise SettingsError(f"top_p = {self.top_p} is not above 0 and up to 1", "1 draws from all tokens")
        if self.seed is not None and self.seed not in SEEDS:
            raise SettingsError(f"seed = {self.seed} is not between -2^63 and 2^64")
        if any(not text for text in self.stop):
            raise SettingsError("a text to stop at is empty")


@dataclass
class TokenSampler:
    """Chooses the tokens of one answer.

    Attributes:
        sampling: How.
    """

    sampling: SamplingParams
    _random: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(self.sampling.seed)

    def next(self, logits: Tensor) -> int:
        """The next token, of logits (V,).

        Raises:
            GenerationError: If the logits are not numbers.
        """
        if torch.isnan(logits).any():
            raise GenerationError(
                "the language model's logits are NaN", "load it with precision fp32 or bf16, not fp16"
            )
        if self.sampling.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        odds = torch.softmax(logits.float() / self.sampling.temperature, dim=-1)
        if self.sampling.top_p < 1.0:
            ordered, places = odds.sort(descending=True)
            ordered[ordered.cumsum(0) - ordered >= self.sampling.top_p] = 0.0  # The first one always stays.
            odds = torch.zeros_like(odds).scatter(0, places, ordered)
        # Drawn on the CPU, so that a seed says the same on every device.
        return int(torch.multinomial(odds.cpu(), 1, generator=self._random))


def find_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first of some texts begins in another; ``None`` where none is in it."""
    places = [text.index(each) for each in stop if each in text]
    return min(places, default=None)


def possible_stop_prefix(text: str, stop: tuple[str, ...]) -> int:
    """How many letters at the end of a text may be the begin of a text to stop at, and cannot be given out yet."""
    longest = 0
    for each in stop:
        fitting = (n for n in range(min(len(each) - 1, len(text)), 0, -1) if text.endswith(each[:n]))
        longest = max(longest, next(fitting, 0))
    return longest
