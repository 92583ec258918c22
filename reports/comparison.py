"""Comparisons of the levels of a study with its baseline: over which seeds, and with what uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reports.divergence import diverged, p_of_rates
from reports.interim_looks import correct_for_looks
from reports.paired_tests import ALPHA, Interval, combined_p, equivalence, hodges_lehmann, holm, interval


@dataclass(frozen=True)
class Comparison:
    """A level compared with the baseline, over the seeds that both have.

    Attributes:
        level: Which.
        n: Pairs of seeds; pairs of draws where a study has fewer draws than seeds.
        difference: Mean of level minus baseline.
        hodges_lehmann: Hodges-Lehmann estimate of it, which outliers hardly move.
        interval: Of the mean.
        without_one: From where to where the mean lies if any one pair is left out.
        deviation: Standard deviation of the differences.
        p: Of no difference, the larger of two tests, corrected for looks and by Holm.
        p_equivalence: Of a difference as large as the margin, corrected likewise; 1 where there is no margin.
        comparisons: Of the study, which Holm corrected for: all but levels that can get no pair.
        looks: Numbers of seeds that p was corrected for; empty for one look.
        interim: Whether the study has not come to a look yet, so that nothing is judged.
        lost: Runs of the level and of the baseline that diverged or gave no number.
        p_lost: That they do so equally often, by Holm.
        unit: What a pair is of: ``seed``, or ``draw``.
    """

    level: str
    n: int
    difference: float
    hodges_lehmann: float
    interval: Interval | None
    without_one: Interval | None
    deviation: float
    p: float
    p_equivalence: float
    comparisons: int
    looks: Sequence[int] = ()
    interim: bool = False
    lost: tuple[int, int] = (0, 0)
    p_lost: float = 1.0
    unit: str = "seed"

    @property
    def verdict(self) -> str:
        """``different``, ``equivalent``, ``open``, ``interim`` before a look, or ``none`` without a pair."""
        if self.interim:
            return "interim"
        if not self.n:
            return "none"
        if self.p < ALPHA:
            return "different"
        return "equivalent" if self.p_equivalence < ALPHA else "open"

    @property
    def small(self) -> bool:
        """Whether there is a difference, and one that is shown to lie within the margin."""
        return self.p < ALPHA and self.p_equivalence < ALPHA


@dataclass(frozen=True)
class Judging:
    """How a study is judged.

    Attributes:
        margin: The smallest difference that would matter; 0 for none.
        less: Whether less is better.
        looks: Numbers of seeds at which it is judged, the last one included; empty judges what there is.
        until: Of each level how many of the first seeds are judged; nothing where it has come to no look. A level that
            is not among them is judged at all.
        draw: The draw that a seed was built on, where draws are the units.
        failed: Seeds of each level whose run gave no number.
        empty: Levels that can get no pair any more: stopped, or all of their runs ended without a number.
    """

    margin: float = 0.0
    less: bool = True
    looks: Sequence[int] = ()
    until: Mapping[str, int | None] | None = None
    draw: Callable[[int], int] | None = None
    failed: Mapping[str, Collection[int]] | None = None
    empty: Collection[str] = ()


def compare(
    levels: Mapping[str, Mapping[int, float]], baseline: str, margin: float = 0.0, judging: Judging | None = None
) -> list[Comparison]:
    """Every level compared with the baseline.

    Runs that diverged are left out of the differences, and counted.

    Args:
        levels: Value by seed, by level.
        baseline: The one the others are compared with.
        margin: The smallest difference that would matter; 0 for none.
        judging: How else the study is judged.

    Raises:
        ValueError: If a value is not finite.
    """
    how = judging or Judging(margin=margin)
    others = [level for level in levels if level != baseline]
    until = {level: (how.until or {}).get(level) for level in others}
    interim = {level: bool(how.until) and level in (how.until or {}) and until[level] is None for level in others}
    lost = lost_runs(levels, how)
    pairs = {level: _differences(levels, level, baseline, until[level], lost, how.draw) for level in others}
    # A level that can get no pair is no test, and must not make the others harder. One whose runs are still to come is:
    # else the verdicts of an unfinished study would hang on the order of its trials.
    tested = [level for level in others if len(pairs[level]) or level not in how.empty]
    ps = dict.fromkeys(others, 1.0)
    ps |= zip(tested, holm([correct_for_looks(combined_p(pairs[level]), how.looks) for level in tested]), strict=True)
    same = dict.fromkeys(others, 1.0)
    same |= zip(
        tested, holm([correct_for_looks(equivalence(pairs[x], how.margin), how.looks) for x in tested]), strict=True
    )
    both_lost = {level: _lost_of_both(levels, level, baseline, until[level], lost) for level in others}
    rates = holm([p_of_rates(*both_lost[level]) for level in others])
    return [
        Comparison(
            level,
            len(values := pairs[level]),
            float(np.mean(values)) if len(values) else float("nan"),
            hodges_lehmann(values) if len(values) else float("nan"),
            interval(values),
            _without_one(values),
            float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
            ps[level],
            same[level],
            len(tested),
            how.looks if len(how.looks) > 1 else (),
            interim[level],
            (len(both_lost[level][0]), len(both_lost[level][1])),
            p_rate,
            "draw" if how.draw else "seed",
        )
        for level, p_rate in zip(others, rates, strict=True)
    ]


def lost_runs(levels: Mapping[str, Mapping[int, float]], how: Judging) -> dict[str, set[int]]:
    """Seeds of every level whose run diverged or gave no number, among those that are judged."""
    found = diverged(levels, how.less)
    for level, seeds in (how.failed or {}).items():
        found.setdefault(level, set()).update(seeds)
    ends = [end for end in (how.until or {}).values() if end is not None]
    last = max(ends, default=None)
    return {level: {n for n in seeds if last is None or n < last} for level, seeds in found.items()}


def _lost_of_both(
    levels: Mapping[str, Mapping[int, float]],
    level: str,
    baseline: str,
    until: int | None,
    lost: Mapping[str, set[int]],
) -> tuple[set[int], set[int]]:
    """Seeds that a level and the baseline lost, of those at which both have ended and that are judged."""
    own, other = lost.get(level, set()), lost.get(baseline, set())
    ended = (set(levels[level]) | own) & (set(levels.get(baseline, {})) | other)
    judged = {n for n in ended if until is None or n < until}
    return own & judged, other & judged


def _differences(
    levels: Mapping[str, Mapping[int, float]],
    level: str,
    baseline: str,
    until: int | None,
    lost: Mapping[str, set[int]],
    draw: Callable[[int], int] | None,
) -> NDArray[np.float64]:
    one, other = levels[level], levels.get(baseline, {})
    left_out = lost.get(level, set()) | lost.get(baseline, set())
    both = [n for n in sorted(set(one) & set(other)) if n not in left_out and (until is None or n < until)]
    if draw is None:
        return np.array([one[n] - other[n] for n in both])
    of_draw: dict[int, list[float]] = {}
    for n in both:
        of_draw.setdefault(draw(n), []).append(one[n] - other[n])
    return np.array([float(np.mean(of)) for of in of_draw.values()])


def _without_one(values: NDArray[np.float64]) -> Interval | None:
    if len(values) < 2:
        return None
    means = (values.sum() - values) / (len(values) - 1)
    return Interval(float(means.min()), float(means.max()))
