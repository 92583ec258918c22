"""Tuning: which nuisance values are tried at each level, and which of them the level is judged at.

Tuning starts with the values that the study declares. If the best value is the smallest or the largest one tried, the
next value of the geometric progression is tried too, until the best value is an inner one or the study's limit is
reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ablations.study import Study
from ablations.trials import TrialResult, TrialSpec
from mmphi.errors import MmphiError

DIGITS = 2  # Significant digits of an added value.


@dataclass(frozen=True)
class Tuning:
    """State of the tuning of a level.

    Attributes:
        level: Level of the factor.
        grid: Declared and added values of each nuisance setting, sorted if they are numbers.
        missing: Trials that have not ended, in the order in which they run.
        chosen: Values with the lowest mean of the tuning metric; ``None`` while trials are missing, or if all failed.
    """

    level: str
    grid: Mapping[str, Sequence[Any]]
    missing: Sequence[TrialSpec] = ()
    chosen: Mapping[str, Any] | None = None


def tuning_of(study: Study, level: str, outcomes: Iterable[TrialResult]) -> Tuning:
    """State of the tuning of a level, given the results of earlier trials.

    Values that failed at any tuning seed are not chosen.
    """
    ended = {outcome.cell.name: outcome for outcome in outcomes}
    grid = {name: _ordered(values) for name, values in study.nuisance.items()}
    added: dict[tuple[str, int], int] = {}
    while True:
        missing, means = [], list[tuple[float, int]]()
        points = grid_points(grid)
        for index, point in enumerate(points if study.nuisance else ()):
            cells = [TrialSpec("tuning", level, number, point) for number in study.tuning_seeds]
            results = [ended.get(cell.name) for cell in cells]
            missing += [cell for cell, result in zip(cells, results, strict=True) if result is None]
            measured = [r.value for r in results if r is not None and r.value is not None]
            if len(measured) == len(cells):
                means.append((sum(measured) / len(measured), index))
        if missing:
            return Tuning(level, grid, sorted(missing, key=lambda cell: cell.number))
        if not study.nuisance:
            return Tuning(level, grid, chosen={})
        if not means:
            return Tuning(level, grid)
        best = points[min(means)[1]]
        if not _extended(study, level, grid, best, added):
            return Tuning(level, grid, chosen=best)


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of values; one empty combination if the grid is empty."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def tuning_trials(tunings: Iterable[Tuning]) -> Iterator[TrialSpec]:
    """Missing tuning trials: all levels at one seed before the next seed."""
    yield from sorted((cell for tuning in tunings for cell in tuning.missing), key=lambda cell: cell.number)


def _extended(
    study: Study, level: str, grid: dict[str, list[Any]], best: Mapping[str, Any], added: dict[tuple[str, int], int]
) -> bool:
    """Extend the grid beyond each end at which the best point is; returns whether a value was added."""
    found = False
    for name, values in grid.items():
        if not is_extendable(values):
            continue
        for end, inner in ((0, 1), (-1, -2)):
            if best[name] != values[end] or added.get((name, end), 0) >= study.tuning_extensions:
                continue
            value = next_value(values[inner], values[end])
            beyond = 0 < value < values[0] if end == 0 else value > values[-1]
            if not beyond or not _allowed(study, level, {**best, name: value}):
                continue
            added[name, end] = added.get((name, end), 0) + 1
            values.insert(0 if end == 0 else len(values), value)
            found = True
    return found


def is_extendable(values: Sequence[Any]) -> bool:
    """Whether values are at least two distinct positive numbers, so that a geometric progression continues them."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    return len(set(values)) > 1 and len(numbers) == len(values)


def next_value(before: float, end: float) -> float:
    """Next value of the geometric progression ``before``, ``end``, rounded to :data:`DIGITS` significant digits.

    Args:
        before: Second-last value.
        end: Last value.

    Returns:
        The value; an integer if both arguments are.
    """
    value = float(f"{end * end / before:.{DIGITS}g}")
    return round(value) if isinstance(before, int) and isinstance(end, int) else value


def _ordered(values: Sequence[Any]) -> list[Any]:
    return sorted(set(values)) if is_extendable(values) else list(dict.fromkeys(values))


def _allowed(study: Study, level: str, point: Mapping[str, Any]) -> bool:
    """Whether the settings and the stages' checks accept a point."""
    try:
        study.check_stages(study.settings(level, nuisance=point))
    except MmphiError:
        return False
    return True
