"""Paired comparisons with few seeds: intervals, exact tests, equivalence, the seeds that would be needed.

Everything here is about differences between two levels at the same seeds. Intervals are scipy's bootstrap, tests are
exact sign-flip permutations, several comparisons of one study are corrected by Holm's method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA, CONFIDENCE, POWER = 0.05, 0.95, 0.8
RESAMPLES = 9999
EXACT_UP_TO = 16  # 2^16 sign patterns; beyond, as many at random.
FEW = 6  # With fewer values resampling cannot leave their range, and Student's t is used.
MOST_SEEDS = 10_000
DRAWS, AT_ONCE = 2000, 2**23  # Simulated samples for a power, and sums of them that are in memory at once.

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
    Statistician 69, 2015, section 4.3). Below six values it is Student's t.

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
    means, seen = _patterns(len(sample)) @ sample, sample.sum()
    close = 1e-12 * np.abs(sample).sum()
    greater, less = np.mean(means >= seen - close), np.mean(means <= seen + close)
    if alternative != "two-sided":
        return float(greater if alternative == "greater" else less)
    return float(np.mean(np.abs(means) >= abs(seen) - close))


@cache
def _patterns(n: int) -> NDArray[np.float64]:
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
    """P that a mean difference is as large as a margin: the larger of two one-sided sign-flip tests (TOST).

    Args:
        differences: One a seed.
        margin: The smallest difference that would matter.

    Raises:
        ValueError: If a difference is not finite.
    """
    sample = _sample(differences)
    if margin <= 0 or len(sample) < 2:
        return 1.0
    return max(float(sign_flip(sample + margin, "greater")), sign_flip(sample - margin, "less"))


def holm(ps: Sequence[float]) -> list[float]:
    """P values corrected by Holm's step-down method, in the order given."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = highest
    return corrected


def power(effect: float, deviation: float, n: int, alpha: float = ALPHA) -> float:
    """Chance that the sign-flip test of n pairs shows an effect, if differences are normal.

    Up to :data:`EXACT_UP_TO` pairs it is simulated: the p values of so few pairs are so coarse that Student's t would
    promise more than the test gives (0.83 for 0.66 with 6 pairs). With more pairs the two agree, and it is computed by
    the noncentral t distribution.

    Args:
        effect: The true mean difference.
        deviation: Standard deviation of the paired differences.
        n: Pairs.
        alpha: Of the two-sided test. With so few pairs that no sign-flip test can reach it, the chance is 0.
    """
    if n < 2 or smallest_p(n) > alpha:
        return 0.0
    if deviation == 0:
        return 1.0 if effect else 0.0
    if n <= EXACT_UP_TO:
        return _simulated_power(abs(effect) / deviation, n, alpha)
    shift, critical = effect / deviation * np.sqrt(n), stats.t.ppf(1 - alpha / 2, n - 1)
    upper, lower = stats.nct.sf(critical, n - 1, shift), stats.nct.cdf(-critical, n - 1, shift)
    return float(np.nan_to_num(upper, nan=1.0) + np.nan_to_num(lower))


@lru_cache(1024)
def _simulated_power(ratio: float, n: int, alpha: float) -> float:
    """Share of :data:`DRAWS` samples of n normal differences, of mean ``ratio`` and deviation 1, with p below alpha."""
    patterns = _patterns(n)[: 2 ** (n - 1)].T  # The other half has all signs turned, and the same absolute sums.
    drawn = np.random.default_rng(n).normal(ratio, 1.0, (DRAWS, n))
    shown = 0
    for part in np.array_split(drawn, -(-DRAWS * patterns.shape[1] // AT_ONCE)):
        seen = np.abs(part.sum(axis=1))[:, None]
        p = (np.abs(part @ patterns) >= seen * (1 - 1e-12)).mean(axis=1)
        shown += int((p < alpha).sum())
    return shown / DRAWS


def seeds_needed(effect: float, deviation: float, alpha: float = ALPHA, wanted: float = POWER) -> int | None:
    """The fewest pairs that show an effect with the power wanted; nothing beyond 10,000."""
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


@dataclass(frozen=True)
class Comparison:
    """A level beside the baseline, over the seeds that both have.

    Attributes:
        level: Which.
        n: Pairs.
        difference: Mean of level minus baseline.
        interval: Of it.
        deviation: Standard deviation of the differences.
        p: Of no difference, after Holm.
        p_equivalence: Of a difference as large as the margin, after Holm; 1 where there is no margin.
        comparisons: Of the study, which Holm corrected for.
    """

    level: str
    n: int
    difference: float
    interval: Interval | None
    deviation: float
    p: float
    p_equivalence: float
    comparisons: int

    @property
    def verdict(self) -> str:
        """``different``, ``equivalent`` or ``open``."""
        if self.p < ALPHA:
            return "different"
        return "equivalent" if self.p_equivalence < ALPHA else "open"

    @property
    def small(self) -> bool:
        """Whether there is a difference, and one that is shown to lie within the margin."""
        return self.p < ALPHA and self.p_equivalence < ALPHA


def compare(
    levels: dict[str, dict[int, float]], baseline: str, margin: float = 0.0, seeds: int | None = None
) -> list[Comparison]:
    """Every level beside the baseline.

    Args:
        levels: Value by seed, by level.
        baseline: The one the others are compared with.
        margin: The smallest difference that would matter; 0 for none.
        seeds: Only the first so many.
    """
    others = [level for level in levels if level != baseline]
    pairs = {level: _differences(levels[level], levels.get(baseline, {}), seeds) for level in others}
    ps = holm([sign_flip(pairs[level]) for level in others])
    same = holm([equivalence(pairs[level], margin) for level in others])
    return [
        Comparison(
            level,
            len(pairs[level]),
            float(np.mean(pairs[level])) if len(pairs[level]) else float("nan"),
            interval(pairs[level]),
            float(np.std(pairs[level], ddof=1)) if len(pairs[level]) > 1 else float("nan"),
            p,
            p_same,
            len(others),
        )
        for level, p, p_same in zip(others, ps, same, strict=True)
    ]


def _differences(level: dict[int, float], baseline: dict[int, float], seeds: int | None) -> NDArray[np.float64]:
    both = sorted(set(level) & set(baseline))[:seeds]
    return np.array([level[seed] - baseline[seed] for seed in both])


@dataclass(frozen=True)
class Shares:
    """How the variance of a full grid divides: functional ANOVA, which is exact there.

    Attributes:
        factor: Share that the levels' means explain.
        seed: Share that the seeds' means explain.
        rest: What is left: how differently the levels take the seeds.
    """

    factor: float
    seed: float
    rest: float


def shares(levels: Mapping[str, Mapping[int, float]]) -> Shares | None:
    """Shares of the variance, over the seeds that all levels have; nothing where there is no variance."""
    if not levels:
        return None
    both = sorted(set.intersection(*(set(values) for values in levels.values())))
    grid = np.array([[values[seed] for seed in both] for values in levels.values()])
    if grid.size == 0 or grid.var() == 0:
        return None
    by_level, by_seed = grid.mean(axis=1).var(), grid.mean(axis=0).var()
    whole = grid.var()
    return Shares(float(by_level / whole), float(by_seed / whole), float(max(0.0, 1 - (by_level + by_seed) / whole)))
