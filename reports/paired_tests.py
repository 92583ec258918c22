"""Paired differences with few seeds: intervals, exact tests, equivalence, shares of the variance.

Everything here is about differences between two levels at the same seeds. Intervals are scipy's bootstrap, tests are
exact sign-flip permutations of their mean and of their signed ranks (Wilcoxon 1945), several comparisons of one study
are corrected by Holm's method.

The tests assume that differences are symmetric about their centre. No test of a few values can do without: of eight
runs, of which one in eight diverges, a third show no sign of it. So runs that diverged are counted and judged apart
(:mod:`reports.divergence`), and levels are called different only where both tests agree.
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
EXACT_UP_TO = 16  # 2^16 sign patterns; beyond, as many at random.
FEW = 12  # With fewer values resampling hardly leaves their range (6 to 8 values: 91 %), and Student's t is used.

Values = Sequence[float] | NDArray[np.float64]


def _sample(values: Values) -> NDArray[np.float64]:
    """Values as an array.

    Raises:
        ValueError: If one is NaN or infinite: it is no result that could be compared.
    """
    sample = np.asarray(values, dtype=float)
    if not np.isfinite(sample).all():
        raise ValueError(f"{int((~np.isfinite(sample)).sum())} of {len(sample)} values are not finite")
    return sample


@dataclass(frozen=True)
class Interval:
    """Where a mean lies, with 95 % confidence."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value lies in it."""
        return self.low <= value <= self.high


def interval(values: Values, confidence: float = CONFIDENCE) -> Interval | None:
    """Interval of a mean, by scipy's percentile bootstrap, expanded for small samples.

    A plain percentile interval of 8 values covers 89 % where it says 95: it takes no account of the variance being
    estimated too. Its level is raised as Hesterberg does (What Teachers Should Know About the Bootstrap, The American
    Statistician 69, 2015, section 4.3). Below :data:`FEW` values it is Student's t.

    Args:
        values: One a seed.
        confidence: That the interval holds the mean.

    Returns:
        The interval; nothing of fewer than two values.

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
    """P of the exact sign-flip test that paired differences are symmetric about 0.

    Args:
        differences: One a seed.
        alternative: ``two-sided``, ``less`` or ``greater``.

    Returns:
        p; the smallest possible with n seeds is ``2 / 2**n`` (two-sided). 1 of fewer than two.

    Raises:
        ValueError: If a difference is not finite.
    """
    sample = _sample(differences)
    if len(sample) < 2 or not np.any(sample):
        return 1.0
    # Equal means of different patterns must count as equal, whatever order they were summed in.
    means, seen = sign_patterns(len(sample)) @ sample, sample.sum()
    close = 1e-12 * np.abs(sample).sum()
    greater, less = np.mean(means >= seen - close), np.mean(means <= seen + close)
    if alternative != "two-sided":
        return float(greater if alternative == "greater" else less)
    return float(np.mean(np.abs(means) >= abs(seen) - close))


def signed_rank_values(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks of the sizes of differences, with their signs; of differences of one size the mean rank, of 0 none.

    Their sign-flip test is Wilcoxon's signed-rank test, exact with ties, too.

    Args:
        differences: Shape (..., n).
    """
    ranks = stats.rankdata(np.abs(differences), axis=-1)
    return np.asarray(np.sign(differences) * ranks, dtype=float)


def hodges_lehmann(differences: Values) -> float:
    """The Hodges-Lehmann estimate: the median of all means of two differences, which outliers hardly move."""
    sample = _sample(differences)
    first, second = np.triu_indices(len(sample))
    return float(np.median((sample[first] + sample[second]) / 2))


def combined_p(differences: Values, alternative: str = "two-sided") -> float:
    """The larger p of the sign-flip tests of the differences and of their signed ranks; 1 where their signs differ.

    A few values that lie far off decide the first alone, so that no verdict rests on them.
    """
    sample = _sample(differences)
    if len(sample) < 2:
        return 1.0
    ranks = signed_rank_values(sample)
    if alternative == "two-sided" and sample.sum() * ranks.sum() < 0:
        return 1.0
    return max(sign_flip(sample, alternative), sign_flip(ranks, alternative))


@cache
def sign_patterns(n: int) -> NDArray[np.float64]:
    """All patterns of n signs, shape (2^n, n); for many values as many at random, the pattern that was seen first."""
    if n <= EXACT_UP_TO:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    else:
        bits = np.random.default_rng(0).integers(0, 2, (2**EXACT_UP_TO, n))
        bits[0] = 0
    signs: NDArray[np.float64] = (1.0 - 2.0 * bits).astype(np.float64)
    return signs


def smallest_p(n: int) -> float:
    """The smallest two-sided p that n pairs can give."""
    return float(min(1.0, 2.0 ** (1 - n)))


def equivalence(differences: Values, margin: float) -> float:
    """P that a difference is as large as a margin: the larger of two one-sided sign-flip tests (TOST).

    Each is the larger of those of the differences and of their signed ranks.

    Args:
        differences: One a seed.
        margin: The smallest difference that would matter.

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
    """How the variance of a full grid divides: functional ANOVA, which is exact there.

    Attributes:
        factor: Share that the levels' means explain.
        seed: Share that the seeds' means explain.
        rest: What is left: how differently the levels take the seeds.
    """

    factor: float
    seed: float
    rest: float


def variance_components(levels: Mapping[str, Mapping[int, float]]) -> VarianceShares | None:
    """Shares of the variance, over the seeds that all levels have.

    Nothing where there is no variance, or fewer than two levels or seeds: one seed explains nothing, whatever it gives.
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
