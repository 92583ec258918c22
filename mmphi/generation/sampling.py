"""Sampling of the next token, and stop strings."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmphi.errors import GenerationError, SettingsError

GREEDY_BELOW = 0.01  # Temperature; lower ones overflow the logits and would sample the likeliest token anyway.
MAX_TEMPERATURE = 100.0
SEEDS = range(-(2**63), 2**64)  # Range of torch.Generator.


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of an answer.

    Attributes:
        max_tokens: Longest answer, in tokens; at least 1.
        temperature: Divisor of the logits, 0 to :data:`MAX_TEMPERATURE`; greedy below :data:`GREEDY_BELOW`.
        top_p: Cumulative probability of nucleus sampling, in (0, 1] (Holtzman et al. 2020).
        seed: Random seed; ``None`` draws a new one for each answer.
        stop: Stop strings; the answer ends before the first one that occurs.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SettingsError(f"max_tokens = {self.max_tokens}, but it must be at least 1")
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
            raise SettingsError("a stop string is empty")


@dataclass
class TokenSampler:
    """Samples the tokens of one answer.

    Attributes:
        sampling: Sampling parameters.
    """

    sampling: SamplingParams
    _random: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(self.sampling.seed)

    def next(self, logits: Tensor) -> int:
        """Sample the next token ID from logits (V,).

        Raises:
            GenerationError: If the logits contain NaN.
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
            ordered[ordered.cumsum(0) - ordered >= self.sampling.top_p] = 0.0  # The first token always remains.
            odds = torch.zeros_like(odds).scatter(0, places, ordered)
        # Sampled on the CPU, so that a seed gives the same token on every device.
        return int(torch.multinomial(odds.cpu(), 1, generator=self._random))


def find_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Return the index of the earliest stop string in a text; ``None`` if it contains none."""
    places = [text.index(each) for each in stop if each in text]
    return min(places, default=None)


def possible_stop_prefix(text: str, stop: tuple[str, ...]) -> int:
    """Return how many characters at the end of a text may begin a stop string and must be held back."""
    longest = 0
    for each in stop:
        fitting = (n for n in range(min(len(each) - 1, len(text)), 0, -1) if text.endswith(each[:n]))
        longest = max(longest, next(fitting, 0))
    return longest
