"""Statistics of paired differences with few seeds: intervals, exact tests, equivalence, shares of the variance.

The differences are between two levels at the same seeds. Intervals are Student's t or scipy's bootstrap; tests are
exact sign-flip permutation tests of the mean and of the signed ranks (Wilcoxon 1945); several comparisons of one study
are corrected by Holm's method.

The tests assume that differences are symmetric about their centre. With few values no test can avoid this assumption:
if one run in eight diverges, a third of samples of eight runs contain no diverged run. Therefore diverged runs are
counted and tested separately (:mod:`reports.divergence`), and levels are different only if both tests agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA, CONFIDENCE = 0.05, 0.95
RESAMPLES = 9999
EXACT_UP_TO = 16  # Values up to which all sign patterns are used; beyond, 2^16 random ones.
FEW = 12  # Below, Student's t is used: resampling hardly leaves the range of few values (6 to 8 values: 91 % coverage).

Values = Sequence[float] | NDArray[np.float64]


def _sample(values: Values) -> NDArray[np.float64]:
    """Convert values to an array.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    sample = np.asarray(values, dtype=float)
    if not np.isfinite(sample).all():
        raise ValueError(f"{int((~np.isfinite(sample)).sum())} of {len(sample)} values are not finite")
    return sample


@dataclass(frozen=True)
class Interval:
    """Confidence interval."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the interval contains a value."""
        return self.low <= value <= self.high


def interval(values: Values, confidence: float = CONFIDENCE) -> Interval | None:
    """Confidence interval of a mean, by scipy's percentile bootstrap, expanded for small samples.

    A plain 95 % percentile interval of 8 values covers 89 %, because it ignores that the variance is estimated too. The
    level is raised as in Hesterberg (What Teachers Should Know About the Bootstrap, The American Statistician 69, 2015,
    section 4.3). Below :data:`FEW` values the interval is Student's t.

    Args:
        values: One value per seed.
        confidence: Confidence level.

    Returns:
        The interval; ``None`` for fewer than two values.

    Raises:
        ValueError: If a value is not finite.
    """
    sample = _sample(values)
    n = len(sample)
    if n < 2:
        return None
    if np.ptp(sample) == 0:
        return Interval(float(sample[0]), float(sample[0]))
    t = stats.t.ppf((1 + confidence) / 2, n - 1)
    if n < FEW:
        half = t * sample.std(ddof=1) / np.sqrt(n)
        return Interval(float(sample.mean() - half), float(sample.mean() + half))
    raised = 2 * stats.norm.cdf(np.sqrt(n / (n - 1)) * t) - 1
    found = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=raised,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def sign_flip(differences: Values, alternative: str = "two-sided") -> float:
    """P value of the exact sign-flip test; the null hypothesis is that paired differences are symmetric about 0.

    Args:
        differences: One difference per seed.
        alternative: ``two-sided``, ``less`` or ``greater``.

    Returns:
        The p value; the smallest possible with n seeds is ``2 / 2**n`` (two-sided). 1 for fewer than two differences.

    Raises:
        ValueError: If a difference is not finite.
    """
    sample = _sample(differences)
    if len(sample) < 2 or not np.any(sample):
        return 1.0
    # Sums that are equal up to rounding must count as equal.
    means, seen = sign_patterns(len(sample)) @ sample, sample.sum()
    close = 1e-12 * np.abs(sample).sum()
    greater, less = np.mean(means >= seen - close), np.mean(means <= seen + close)
    if alternative != "two-sided":
        return float(greater if alternative == "greater" else less)
    return float(np.mean(np.abs(means) >= abs(seen) - close))


def signed_rank_values(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signed ranks of the absolute differences; ties get their mean rank, and differences of 0 get 0.

    The sign-flip test of the signed ranks is Wilcoxon's signed-rank test, exact also with ties.

    Args:
        differences: Shape (..., n).
    """
    ranks = stats.rankdata(np.abs(differences), axis=-1)
    return np.asarray(np.sign(differences) * ranks, dtype=float)


def hodges_lehmann(differences: Values) -> float:
    """Hodges-Lehmann estimate: the median of the means of all pairs of differences, which is robust to outliers."""
    sample = _sample(differences)
    first, second = np.triu_indices(len(sample))
    return float(np.median((sample[first] + sample[second]) / 2))


def combined_p(differences: Values, alternative: str = "two-sided") -> float:
    """Larger p of the sign-flip tests of the differences and of their signed ranks.

    A few outliers decide only the first test, so no verdict depends on them alone. A two-sided p is 1 if the sums of
    the differences and of their signed ranks have opposite signs.
    """
    sample = _sample(differences)
    if len(sample) < 2:
        return 1.0
    ranks = signed_rank_values(sample)
    if alternative == "two-sided" and sample.sum() * ranks.sum() < 0:
        return 1.0
    return max(sign_flip(sample, alternative), sign_flip(ranks, alternative))


@cache
def sign_patterns(n: int, most: int = EXACT_UP_TO) -> NDArray[np.float64]:
    """All patterns of n signs, shape (2^n, n), the identity first; above ``most`` signs, 2^most random ones."""
    if n <= most:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    else:
        bits = np.random.default_rng(0).integers(0, 2, (2**most, n))
        bits[0] = 0
    signs: NDArray[np.float64] = (1.0 - 2.0 * bits).astype(np.float64)
    return signs


def smallest_p(n: int) -> float:
    """Smallest possible two-sided p of n pairs."""
    return float(min(1.0, 2.0 ** (1 - n)))


def equivalence(differences: Values, margin: float) -> float:
    """P value of equivalence: the larger p of two one-sided tests (TOST) against differences of plus or minus a margin.

    Each one-sided p is that of :func:`combined_p`.

    Args:
        differences: One difference per seed.
        margin: Smallest difference of practical relevance; the p value is 1 if it is not positive.

    Raises:
        ValueError: If a difference is not finite.
    """
    sample = _sample(differences)
    if margin <= 0 or len(sample) < 2:
        return 1.0
    return max(combined_p(sample + margin, "greater"), combined_p(sample - margin, "less"))


def holm(ps: Sequence[float]) -> list[float]:
    """P values corrected by Holm's step-down method, in the order given."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = highest
    return corrected


@dataclass(frozen=True)
class VarianceShares:
    """Shares of the variance of a full grid of levels and seeds, by functional ANOVA, which is exact for it.

    Attributes:
        factor: Share explained by the means of the levels.
        seed: Share explained by the means of the seeds.
        rest: Remaining share, the interaction of level and seed.
    """

    factor: float
    seed: float
    rest: float


def variance_components(levels: Mapping[str, Mapping[int, float]]) -> VarianceShares | None:
    """Shares of the variance, over the seeds that all levels have.

    Returns:
        The shares; ``None`` without variance, or with fewer than two levels or common seeds.
    """
    if len(levels) < 2:
        return None
    both = sorted(set.intersection(*(set(values) for values in levels.values())))
    grid = np.array([[values[seed] for seed in both] for values in levels.values()])
    if len(both) < 2 or grid.var() == 0:
        return None
    by_level, by_seed = grid.mean(axis=1).var(), grid.mean(axis=0).var()
    whole = grid.var()
    return VarianceShares(
        float(by_level / whole), float(by_seed / whole), float(max(0.0, 1 - (by_level + by_seed) / whole))
    )
