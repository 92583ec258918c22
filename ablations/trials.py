"""Trials of a study, each a level at a seed, and the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["tuning", "verdict", "search"]


@dataclass(frozen=True)
class TrialSpec:
    """Specification of one trial.

    Attributes:
        phase: ``tuning`` for trials that choose nuisance values, ``verdict`` for judged trials, ``search`` for trials
            of a search.
        level: Level of the factor.
        number: Number of the round, which is the index of the paired seed; for tuning trials, the tuning seed.
        nuisance: Values of the nuisance settings, by dotted name.
    """

    phase: Phase
    level: str
    number: int
    nuisance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique name of the trial; there is one result per name."""
        # Strings are written without quotes, because MLflow filters do not support them.
        values = ", ".join(f"{k}={v}" for k, v in sorted(self.nuisance.items())) if self.phase == "tuning" else ""
        return "/".join(filter(None, (self.phase, self.level, str(self.number), values)))


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial.

    Attributes:
        cell: The trial.
        value: Value of the judged or tuned metric; ``None`` without a result.
        reason: Why there is no result.
    """

    cell: TrialSpec
    value: float | None
    reason: str = ""


def verdict_trials(levels: Mapping[str, Mapping[str, Any]], seeds: int) -> Iterator[TrialSpec]:
    """Verdict trials in rounds: all levels at one seed before the next seed.

    Args:
        levels: Chosen nuisance values by level, of the levels whose tuning has ended.
        seeds: Number of seeds.
    """
    for number in range(seeds):
        for level, nuisance in levels.items():
            yield TrialSpec("verdict", level, number, nuisance)
