"""Stop criteria of a pretraining: loss, tokens, steps or time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mmphi.errors import SettingsError

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
HINT = "write initial-1, loss 5, tokens 2M, steps 1000 or time 20m; or several, separated by commas"


@dataclass(frozen=True)
class StopCriteria:
    """Conditions, of which the first to hold ends the training.

    Attributes:
        below_initial: Reduction from the loss before the first update, in nats per token.
        loss: Loss in nats per token.
        tokens: Tokens trained on.
        steps: Optimiser steps.
        seconds: Seconds of training, without validations and checkpoints.
    """

    below_initial: float = math.inf
    loss: float = -math.inf
    tokens: float = math.inf
    steps: float = math.inf
    seconds: float = math.inf

    def most_steps(self, tokens_per_step: int, otherwise: int) -> int:
        """Returns the maximum number of steps, which is the length of the learning rate schedule.

        Args:
            tokens_per_step: Tokens of an optimiser step.
            otherwise: Result if neither tokens nor steps are limited.
        """
        least = min(self.steps, math.ceil(self.tokens / tokens_per_step) if self.tokens < math.inf else math.inf)
        return int(least) if least < math.inf else otherwise

    def target(self, initial: float) -> float:
        """Returns the loss that ends the training, in nats per token."""
        return max(self.loss, initial - self.below_initial)

    def reason(self, *, initial: float, loss: float, tokens: float, steps: int, seconds: float) -> str:
        """Returns why the training ends now; empty if it continues."""
        if loss <= self.target(initial):
            return f"a loss of {loss:.3f} (target {self.target(initial):.3f})"
        if tokens >= self.tokens:
            return f"{tokens:,.0f} tokens"
        if steps >= self.steps:
            return f"{steps} steps"
        return f"{seconds:.0f} s of training" if seconds >= self.seconds else ""


def parse_stop(text: str) -> StopCriteria:
    """Parse conditions.

    >>> parse_stop("initial-1, tokens 2M")
    StopCriteria(below_initial=1.0, loss=-inf, tokens=2000000.0, steps=inf, seconds=inf)

    Raises:
        SettingsError: If a condition cannot be parsed.
    """
    found: dict[str, float] = {}
    for part in filter(None, (p.strip().lower() for p in text.split(","))):
        if match := re.fullmatch(r"initial\s*-\s*([\d.]+)", part):
            found["below_initial"] = _number(match[1], part)
        elif match := re.fullmatch(r"(?:loss\s*)?([\d.]+)", part):
            found["loss"] = _number(match[1], part)
        elif match := re.fullmatch(r"(tokens|steps)\s*([\d.]+)\s*([kmbt]?)", part):
            found[match[1]] = _number(match[2], part) * UNITS[match[3]]
        elif match := re.fullmatch(r"(?:time\s*)?([\d.]+)\s*(s|m|min|h)", part):
            found["seconds"] = _number(match[1], part) * SECONDS[match[2]]
        else:
            raise SettingsError(f"pretrain.stop: {part!r} is not a valid condition", HINT)
    if not found:
        raise SettingsError("pretrain.stop is empty", HINT)
    return StopCriteria(**found)


def _number(text: str, part: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if number <= 0:
        raise SettingsError(f"pretrain.stop: {part!r} needs a number above zero", HINT)
    return number
