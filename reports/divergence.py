"""Runs that diverged: a result of their own, which no mean of the others shall hide or be moved by."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

# Standard deviations, as the better half of the runs shows them. Those of few runs are known so badly that the fence is
# further out, by FEW / runs: of studies of 4 to 24 seeds with normal noise at most 3 % have a run beyond it.
FENCE, FEW = 10.0, 6.0
FEWEST = 4  # Runs of a level; of fewer it is not known which of them is the outlier.
# Of the better half of normal values: its median lies 0.6745 standard deviations from that of all, and the median
# distance from it is 0.4 of them.
HALF_MEDIAN, HALF_DISTANCE = 0.6745, 0.4


def diverged(levels: Mapping[str, Mapping[int, float]], less: bool = True) -> dict[str, set[int]]:
    """Seeds whose run ended far worse than the others of its level.

    The noise is that of the better half of a level, or of all levels together where that is more, so that up to half of
    a level's runs may diverge without hiding one another. Where more do, diverging is what the level does, and its runs
    are judged as they are.

    Args:
        levels: Value by seed, by level.
        less: Whether less is better.
    """
    sign = 1.0 if less else -1.0
    worse: dict[str, dict[int, float]] = {}
    distances: dict[str, list[float]] = {}
    for level, values in levels.items():
        losses = {n: sign * value for n, value in values.items()} if len(values) >= FEWEST else {}
        better = sorted(losses.values())[: -(-len(losses) // 2)]
        middle = float(np.median(better)) if better else 0.0
        distances[level] = [abs(value - middle) for value in better]
        worse[level] = {n: value - middle for n, value in losses.items()}
    together = _deviation([each for of in distances.values() for each in of])
    fences = {
        level: (FENCE + HALF_MEDIAN) * (1 + FEW / max(1, len(worse[level]))) * max(together, _deviation(of))
        for level, of in distances.items()
    }
    return {level: {n for n, by in of.items() if 0 < fences[level] < by} for level, of in worse.items()}


def _deviation(distances: list[float]) -> float:
    return float(np.median(distances)) / HALF_DISTANCE if distances else 0.0


def p_of_rates(level: set[int], baseline: set[int]) -> float:
    """Exact two-sided p of McNemar's test that runs of two levels diverge equally often.

    Args:
        level: Seeds at which its run diverged or gave no number.
        baseline: Those of the other level, at the same seeds.
    """
    only, other = len(level - baseline), len(baseline - level)
    return float(stats.binomtest(only, only + other).pvalue) if only + other else 1.0
