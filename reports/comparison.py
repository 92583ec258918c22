"""Paired comparisons of the levels of a study with its baseline."""

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
    """Comparison of a level with the baseline, over the seeds that both have.

    Attributes:
        level: Name of the level.
        n: Number of pairs of seeds, or of draws if the study has fewer draws than seeds.
        difference: Mean of level minus baseline.
        hodges_lehmann: Hodges-Lehmann estimate of the difference, which is robust to outliers.
        interval: Interval of the mean difference.
        without_one: Range of the mean difference if any single pair is left out.
        deviation: Standard deviation of the differences.
        p: P value of the null hypothesis of no difference: the larger of two tests, corrected for looks and by Holm.
        p_equivalence: P value of the null hypothesis of a difference of at least the margin, corrected likewise; 1
            without a margin.
        comparisons: Number of comparisons that Holm's method corrects for: all except levels that cannot get a pair.
        looks: Numbers of seeds of the looks that p is corrected for; empty for one look.
        interim: Whether the study has not reached its first look, so that there is no verdict.
        lost: Numbers of runs of the level and of the baseline that diverged or have no value.
        p_lost: P value of the null hypothesis that both lose runs equally often, corrected by Holm.
        unit: Unit of the pairs: ``seed`` or ``draw``.
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
        """Whether the difference is significant and also significantly within the margin."""
        return self.p < ALPHA and self.p_equivalence < ALPHA


@dataclass(frozen=True)
class Judging:
    """How a study is judged.

    Attributes:
        margin: Smallest difference of practical relevance; 0 for none.
        less: Whether lower values are better.
        looks: Numbers of seeds at which the study is judged, including the final one; empty for no correction.
        until: Number of leading seeds that are judged, by level; ``None`` for a level that has not reached a look. All
            seeds are judged for levels that are not in the mapping.
        draw: Function from a seed to its draw, if draws are the unit of the tests.
        failed: Seeds whose run has no value, by level.
        empty: Levels that cannot get a pair any more: stopped, or all of their runs ended without a value.
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
    """Compare every other level with the baseline.

    Diverged runs are left out of the differences and counted.

    Args:
        levels: Value by seed, by level.
        baseline: Name of the baseline.
        margin: Smallest difference of practical relevance; 0 for none. Ignored if ``judging`` is given.
        judging: How the study is judged; the default is all seeds and no correction for looks.

    Raises:
        ValueError: If a difference is not finite.
    """
    how = judging or Judging(margin=margin)
    others = [level for level in levels if level != baseline]
    until = {level: (how.until or {}).get(level) for level in others}
    interim = {level: bool(how.until) and level in (how.until or {}) and until[level] is None for level in others}
    lost = lost_runs(levels, how)
    pairs = {level: _differences(levels, level, baseline, until[level], lost, how.draw) for level in others}
    # Levels that cannot get a pair do not count for Holm's correction. Levels whose runs are pending do; otherwise the
    # verdicts of an unfinished study would depend on the order of its trials.
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
    """Seeds whose run diverged or has no value, by level; seeds beyond the last look are left out."""
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
    """Lost seeds of a level and of the baseline, among the judged seeds at which both have ended."""
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
