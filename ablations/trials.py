"""What a study is made of: cells, each a level at a seed, and the order they come in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["tuning", "verdict", "search"]


@dataclass(frozen=True)
class TrialSpec:
    """One trial that a study asks for.

    Attributes:
        phase: ``tuning`` finds nuisance values, ``verdict`` is judged.
        level: Of the factor.
        number: The round: which of the paired seeds.
        nuisance: Values of the nuisance settings.
    """

    phase: Phase
    level: str
    number: int
    nuisance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is found by; of one name there is one result."""
        # Without the quotes of a text, which a filter of MLflow cannot hold.
        values = ", ".join(f"{k}={v}" for k, v in sorted(self.nuisance.items())) if self.phase == "tuning" else ""
        return "/".join(filter(None, (self.phase, self.level, str(self.number), values)))


@dataclass(frozen=True)
class TrialResult:
    """How a cell ended.

    Attributes:
        cell: Which.
        value: What is judged, or nothing where there is no result.
        reason: Why there is none.
    """

    cell: TrialSpec
    value: float | None
    reason: str = ""


def verdict_trials(levels: Mapping[str, Mapping[str, Any]], seeds: int) -> Iterator[TrialSpec]:
    """The trials that are judged, in rounds: one seed of all levels before the next.

    Args:
        levels: Those whose nuisance values are known: these.
        seeds: How many.
    """
    for number in range(seeds):
        for level, nuisance in levels.items():
            yield TrialSpec("verdict", level, number, nuisance)
