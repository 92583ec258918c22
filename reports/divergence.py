"""Detects diverged runs, which are counted separately so that they neither move the means nor go unnoticed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

# Fence in standard deviations, estimated from the better half of the runs. With few runs the estimate is poor, so the
# fence is widened by the factor 1 + FEW / runs: at most 3 % of studies of 4 to 24 seeds with normal noise have a run
# beyond it.
FENCE, FEW = 10.0, 6.0
FEWEST = 4  # Minimum number of runs of a level; with fewer, the outlier cannot be identified.
# For the better half of normal values: its median is 0.6745 standard deviations from the median of all, and the median
# distance from it is 0.4 standard deviations.
HALF_MEDIAN, HALF_DISTANCE = 0.6745, 0.4


def diverged(levels: Mapping[str, Mapping[int, float]], less: bool = True) -> dict[str, set[int]]:
    """Seeds whose run ended far worse than the other runs of its level, by level.

    The noise is that of the better half of a level, or of all levels together if that is larger, so up to half of a
    level's runs may diverge without masking each other. If more diverge, divergence is typical of the level, and no
    run is excluded.

    Args:
        levels: Value by seed, by level.
        less: Whether lower values are better.
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
    overall = _deviation([each for of in distances.values() for each in of])
    fences = {
        level: (FENCE + HALF_MEDIAN) * (1 + FEW / max(1, len(worse[level]))) * max(overall, _deviation(of))
        for level, of in distances.items()
    }
    return {level: {n for n, by in of.items() if 0 < fences[level] < by} for level, of in worse.items()}


def _deviation(distances: list[float]) -> float:
    return float(np.median(distances)) / HALF_DISTANCE if distances else 0.0


def p_of_rates(level: set[int], baseline: set[int]) -> float:
    """Exact two-sided p of McNemar's test; the null hypothesis is that runs of two levels diverge equally often.

    Args:
        level: Seeds at which the level's run diverged or has no value.
        baseline: Seeds at which the baseline's run diverged or has no value, among the same seeds.
    """
    only, other = len(level - baseline), len(baseline - level)
    return float(stats.binomtest(only, only + other).pvalue) if only + other else 1.0
