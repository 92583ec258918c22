"""Which values of the nuisance settings are tried at each level, and which of them the level is judged at.

The values of a study are where the search begins. Where the best one is the smallest or the largest that was tried, the
next value in geometric order is tried too, until the best one lies between two others or the study's limit is reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ablations.study import Study
from ablations.trials import TrialResult, TrialSpec
from mmphi.errors import MmphiError

DIGITS = 2  # Significant ones of a value that is added.


@dataclass(frozen=True)
class Tuning:
    """How far the tuning of a level is.

    Attributes:
        level: Of the factor.
        grid: Values of each nuisance setting, those that were added included, in order where they are numbers.
        missing: Trials that have not ended, the first first.
        chosen: The values with the least mean; nothing while trials are missing, or where all failed.
    """

    level: str
    grid: Mapping[str, Sequence[Any]]
    missing: Sequence[TrialSpec] = ()
    chosen: Mapping[str, Any] | None = None


def tuning_of(study: Study, level: str, outcomes: Iterable[TrialResult]) -> Tuning:
    """What is tried at a level, given how earlier trials ended.

    Values that failed at any seed are not chosen.
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
    """Every combination of values; one empty one where there is no setting."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def tuning_trials(tunings: Iterable[Tuning]) -> Iterator[TrialSpec]:
    """The trials that are missing: all levels at a seed before the next seed."""
    yield from sorted((cell for tuning in tunings for cell in tuning.missing), key=lambda cell: cell.number)


def _extended(
    study: Study, level: str, grid: dict[str, list[Any]], best: Mapping[str, Any], added: dict[tuple[str, int], int]
) -> bool:
    """Add the value beyond every end that the best point lies at; whether there was one to add."""
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
    """Whether values are two or more positive numbers, which have a next one in geometric order."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    return len(set(values)) > 1 and len(numbers) == len(values)


def next_value(before: float, end: float) -> float:
    """The value after the last one: as many times larger or smaller as that is than the one before it."""
    value = float(f"{end * end / before:.{DIGITS}g}")
    return round(value) if isinstance(before, int) and isinstance(end, int) else value


def _ordered(values: Sequence[Any]) -> list[Any]:
    return sorted(set(values)) if is_extendable(values) else list(dict.fromkeys(values))


def _allowed(study: Study, level: str, point: Mapping[str, Any]) -> bool:
    """Whether settings and stages take a point."""
    try:
        study.check_stages(study.settings(level, nuisance=point))
    except MmphiError:
        return False
    return True
