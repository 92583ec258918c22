"""Statistical power of a study, and the number of seeds that it needs, simulated with the same test."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from reports.paired_tests import ALPHA, sign_patterns, signed_rank_values, smallest_p

POWER = 0.8
MOST_SEEDS = 10_000
EXACT_UP_TO = 12  # Pairs up to which all sign patterns are counted; beyond, as many random ones.
SIMULATED_UP_TO = 24
DRAWS, AT_ONCE = 4000, 2**22  # Simulated samples; numbers in memory at once.
RANK_EFFICIENCY = 3 / np.pi  # Asymptotic efficiency of Wilcoxon's test relative to the t test, for normal values.


def power(effect: float, deviation: float, n: int, alpha: float = ALPHA) -> float:
    """Probability that a comparison of n pairs has the verdict ``different``, for normal differences.

    That is, that the p values of the sign-flip tests of the differences and of their signed ranks are both below alpha.
    Up to :data:`SIMULATED_UP_TO` pairs it is simulated: the p values of few pairs are so coarse that Student's t would
    overestimate the power (0.83 instead of 0.66 with 6 pairs). With more pairs the noncentral t distribution is
    accurate enough.

    Args:
        effect: True mean difference.
        deviation: Standard deviation of the paired differences.
        n: Number of pairs.
        alpha: Significance level of the two-sided test. The power is 0 if n pairs cannot give a p value this small.
    """
    if n < 2 or smallest_p(n) > alpha:
        return 0.0
    if deviation == 0:
        return 1.0 if effect else 0.0
    if n <= SIMULATED_UP_TO:
        return _simulated(abs(effect) / deviation, n, alpha)
    shift = effect / deviation * np.sqrt(n * RANK_EFFICIENCY)
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    upper, lower = stats.nct.sf(critical, n - 1, shift), stats.nct.cdf(-critical, n - 1, shift)
    return float(np.nan_to_num(upper, nan=1.0) + np.nan_to_num(lower))


@lru_cache(1024)
def _simulated(ratio: float, n: int, alpha: float) -> float:
    """Share of simulated samples of n normal differences (mean ``ratio``, deviation 1) with p below alpha."""
    drawn = np.random.default_rng(n).normal(ratio, 1.0, (DRAWS, n))
    return float(np.mean(p_values(drawn) < alpha))


def p_values(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """:func:`reports.paired_tests.combined_p` of many samples at once: shape (samples, n) to shape (samples,)."""
    signs = _half(samples.shape[1])
    found = []
    for part in np.array_split(samples, -(-len(samples) * len(signs) // AT_ONCE)):
        of_part = []
        for values in (part, signed_rank_values(part)):
            sums = np.abs(values @ signs.T)
            of_part.append((sums >= np.abs(values.sum(axis=1))[:, None] * (1 - 1e-12)).mean(axis=1))
        found.append(np.max(of_part, axis=0))
    return np.concatenate(found)


def _half(n: int) -> NDArray[np.float64]:
    """Half of the sign patterns, the identity first; the other half negates them and gives the same absolute sums."""
    return sign_patterns(n)[: 2 ** (n - 1)] if n <= EXACT_UP_TO else sign_patterns(n, EXACT_UP_TO - 1)


def seeds_needed(effect: float, deviation: float, alpha: float = ALPHA, wanted: float = POWER) -> int | None:
    """Smallest number of pairs that shows an effect with the wanted power; ``None`` above 10,000."""
    if effect <= 0:
        return None
    low, high = 1, 2
    while power(effect, deviation, high, alpha) < wanted:
        low, high = high, high * 2
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, deviation, middle, alpha) >= wanted else (middle, high)
    return high
