"""What a study is made of: cells, each a level at a seed, and the order they come in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from ablations.study import Study

Phase = Literal["tuning", "verdict", "search"]


@dataclass(frozen=True)
class Cell:
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
class Outcome:
    """How a cell ended.

    Attributes:
        cell: Which.
        value: What is judged, or nothing where there is no result.
        reason: Why there is none.
    """

    cell: Cell
    value: float | None
    reason: str = ""


def choices(study: Study) -> list[dict[str, Any]]:
    """Every combination of nuisance values; one empty one where there is no nuisance."""
    return [dict(zip(study.nuisance, values, strict=True)) for values in product(*study.nuisance.values())]


def tuning_cells(study: Study, levels: Iterable[str]) -> Iterator[Cell]:
    """The trials that find nuisance values: every value at every level before the next seed."""
    if study.nuisance:
        for number in study.tuning_seeds:
            for values, level in product(choices(study), levels):
                yield Cell("tuning", level, number, values)


def verdict_cells(levels: Mapping[str, Mapping[str, Any]], seeds: int) -> Iterator[Cell]:
    """The trials that are judged, in rounds: one seed of all levels before the next.

    Args:
        levels: Those whose nuisance values are known: these.
        seeds: How many.
    """
    for number in range(seeds):
        for level, nuisance in levels.items():
            yield Cell("verdict", level, number, nuisance)


def chosen(study: Study, levels: Iterable[str], outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """The nuisance values of each level whose tuning is over: those with the least mean.

    Values that failed at any seed are not taken; a level at which all failed is not among the result.
    """
    ended = {o.cell.name: o for o in outcomes}
    found = {}
    for level in levels:
        means: list[tuple[float, int]] = []
        over = True
        for index, values in enumerate(choices(study)):
            cells = [Cell("tuning", level, n, values) for n in study.tuning_seeds]
            results = [ended.get(cell.name) for cell in cells] if study.nuisance else []
            over &= all(r is not None for r in results)
            measured = [r.value for r in results if r is not None and r.value is not None]
            if len(measured) == len(results):
                means.append((sum(measured) / len(measured) if measured else 0.0, index))
        if over and means:
            found[level] = choices(study)[min(means)[1]]
    return found
