"""Each figure beside an independent way to have it; the whole verdict beside planted truths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from reports.comparison import Comparison, Judging, compare
from reports.paired_tests import (
    combined_p,
    equivalence,
    hodges_lehmann,
    holm,
    interval,
    sign_flip,
    signed_rank_values,
    smallest_p,
    variance_components,
)
from reports.power import power, seeds_needed


def test_sign_flip_is_every_pattern_of_signs_counted() -> None:
    rng = np.random.default_rng(3)
    for n in (2, 3, 5, 8):
        differences = rng.normal(0.3, 1, n)
        seen = abs(differences.mean())
        patterns = [np.mean(differences * signs) for signs in itertools.product((1, -1), repeat=n)]
        assert sign_flip(differences) == pytest.approx(np.mean([abs(x) >= seen - 1e-12 for x in patterns]))
        greater = np.mean([x >= differences.mean() - 1e-12 for x in patterns])
        assert sign_flip(differences, "greater") == pytest.approx(greater)


@pytest.mark.parametrize("n", [4, 9, 11])
@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
def test_sign_flip_is_scipys(n: int, alternative: str) -> None:
    differences = np.random.default_rng(n).normal(0.2, 1, n)
    found = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", alternative=alternative, n_resamples=np.inf
    )
    assert sign_flip(differences, alternative) == pytest.approx(found.pvalue)


@pytest.mark.parametrize("n", [5, 8, 12])
@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
def test_signed_ranks_are_scipys(n: int, alternative: str) -> None:
    differences = np.random.default_rng(n).normal(0.4, 1, n)
    found = stats.wilcoxon(differences, alternative=alternative, method="exact")
    assert sign_flip(signed_rank_values(differences), alternative) == pytest.approx(found.pvalue)


def test_typical_is_the_median_of_the_means_of_two() -> None:
    differences = [1.0, 2.0, 4.0, 100.0]
    pairs = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(differences, 2)]
    assert hodges_lehmann(differences) == np.median(pairs) == 3.5


def test_both_tests_must_agree() -> None:
    ordinary = np.array([0.1, 0.2, 0.15, 0.12, 0.3, 0.22, 0.18, 0.11])
    assert combined_p(ordinary) == sign_flip(ordinary) == pytest.approx(2 / 2**8)
    outlier = np.array([-0.1, -0.2, -0.15, -0.12, -0.3, -0.22, -0.18, 9.0])
    assert combined_p(outlier) == 1.0  # The mean says more, the ranks less.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    for judge in (interval, sign_flip, lambda sample: equivalence(sample, 0.1)):
        with pytest.raises(ValueError, match="1 of 3 values are not finite"):
            judge([0.1, value, 0.2])
    with pytest.raises(ValueError, match="not finite"):
        compare({"a": {0: 1.0, 1: value}, "b": {0: 1.0, 1: 2.0}}, "b")


def test_sign_flip_of_many_draws_patterns() -> None:
    """Beyond 16 pairs the patterns are a sample: near the t-test, never 0."""
    differences = np.random.default_rng(0).normal(0.4, 1, 30)
    assert sign_flip(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)
    assert sign_flip(differences + 9) == 1 / 2**16


def test_smallest_p() -> None:
    for n in (3, 5, 8):
        assert sign_flip(np.arange(1, n + 1)) == pytest.approx(smallest_p(n)) == 2 / 2**n
    assert smallest_p(5) > 0.05 > smallest_p(6)
    assert sign_flip([0.3]) == sign_flip([0.0, 0.0]) == 1.0


def test_holm_by_hand() -> None:
    """Holm (1979): the smallest times 3, the next times 2, and never below the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_power_is_what_a_simulation_finds() -> None:
    rng = np.random.default_rng(0)
    cases = ((1.4, 1.0, 6, 0.05), (0.02, 0.026, 8, 0.0125), (0.02, 0.02, 12, 0.05), (0.0, 1.0, 10, 0.05))
    for effect, deviation, n, alpha in cases:
        found = np.mean([combined_p(rng.normal(effect, deviation, n)) < alpha for _ in range(1500)])
        assert power(effect, deviation, n, alpha) == pytest.approx(found, abs=0.04)
    for effect, n in ((0.5, 20), (0.9, 17), (0.5, 40)):
        drawn = rng.normal(effect, 1.0, (2000, n))
        by_t, by_ranks = stats.ttest_1samp(drawn, 0, axis=1).pvalue, stats.wilcoxon(drawn, axis=1).pvalue
        found = np.mean(np.maximum(by_t, by_ranks) < 0.05)
        assert power(effect, 1.0, n) == pytest.approx(found, abs=0.03)
    by_t = stats.nct.sf(stats.t.ppf(0.975, 5), 5, 1.4 * np.sqrt(6))
    assert by_t - power(1.4, 1.0, 6) > 0.1  # What Student's t would promise of 6 pairs.
    assert power(1.0, 0.1, 3) == 0.0  # No sign-flip test of 3 pairs can reach 0.05.
    assert power(0.1, 0.0, 8) == 1.0


def test_seeds_needed_is_the_first_number_with_the_power() -> None:
    for effect, deviation, alpha in ((0.02, 0.026, 0.05), (0.1, 0.1, 0.0125), (1.0, 0.1, 0.05)):
        needed = seeds_needed(effect, deviation, alpha)
        assert needed is not None
        assert power(effect, deviation, needed, alpha) >= 0.8 > power(effect, deviation, needed - 1, alpha)
    assert seeds_needed(1.0, 0.0) == 6  # However clear: with 5 the smallest p is 0.0625.
    assert seeds_needed(1e-6, 1.0) is None
    assert seeds_needed(0.0, 1.0) is None


def test_interval_of_many_values_is_students() -> None:
    """With many values the bootstrap and Student's t agree; with few it is Student's t."""
    sample = np.random.default_rng(1).normal(5, 2, 60)
    low, high = stats.t.interval(0.95, 59, sample.mean(), stats.sem(sample))
    found = interval(sample)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12)
    few = interval([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1.0, 2.0, 4.0]))
    assert few is not None
    assert (few.low, few.high) == pytest.approx((low, high))
    assert interval([1.0]) is None
    assert interval([2.0, 2.0, 2.0]) == interval([2.0] * 9)


def test_equivalence_needs_both_sides() -> None:
    rng = np.random.default_rng(0)
    near = rng.normal(0.0, 0.004, 8)
    assert equivalence(near, 0.02) == pytest.approx(1 / 2**8)
    assert equivalence(near + 0.03, 0.02) > 0.5
    assert equivalence(near - 0.03, 0.02) > 0.5
    assert equivalence(near, 0.0) == 1.0


def test_shares_are_the_two_way_analysis_of_variance() -> None:
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(3, 8)) + np.array([[0.0], [2.0], [1.0]])
    found = variance_components({str(i): dict(enumerate(row)) for i, row in enumerate(grid)})
    assert found is not None
    total = ((grid - grid.mean()) ** 2).sum()
    assert found.factor == pytest.approx(8 * ((grid.mean(axis=1) - grid.mean()) ** 2).sum() / total)
    assert found.seed == pytest.approx(3 * ((grid.mean(axis=0) - grid.mean()) ** 2).sum() / total)
    assert found.factor + found.seed + found.rest == pytest.approx(1)
    assert variance_components({"a": {0: 1.0}, "b": {0: 1.0}}) is None
    assert (
        variance_components({"a": {0: 1.0}, "b": {0: 2.0, 1: 3.0}}) is None
    )  # One seed that all have explains nothing.
    assert variance_components({"a": {0: 1.0, 1: 2.0}}) is None


def planted(seed: int, effect: float, n: int = 8, noise: float = 0.02, margin: float = 0.0) -> list[Comparison]:
    """A study of three levels: seeds move all levels alike by more than anything else does, one level is better."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(1.0, 0.1, n)
    truth = {"base": 0.0, "same": 0.0, "better": effect}
    levels = {name: dict(enumerate(shared - by + rng.normal(0, noise, n))) for name, by in truth.items()}
    return compare(levels, "base", margin)


STUDIES = range(100)


def test_a_planted_effect_is_found_as_often_as_the_stated_power() -> None:
    """An effect whose stated power is 0.97 is found in 95 of 100 studies."""
    deviation, n = 0.02 * np.sqrt(2), 12
    effect = next(e for e in np.arange(0.01, 0.2, 0.0005) if power(e, deviation, n, 0.05 / 2) >= 0.97)
    found = sum(planted(seed, effect, n)[1].verdict == "different" for seed in STUDIES)
    assert found >= 95


def test_no_effect_is_called_a_difference_in_at_most_five_of_a_hundred() -> None:
    wrong = sum(any(c.verdict == "different" for c in planted(1000 + seed, 0.0)) for seed in STUDIES)
    assert wrong <= 5


def test_intervals_cover_the_truth() -> None:
    for n in (4, 8, 16):
        holds = 0
        for seed in STUDIES:
            found = planted(2000 + seed, 0.05, n)[1].interval
            assert found is not None
            holds += found.holds(-0.05)
        assert holds >= 90


def test_sameness_is_found_and_not_claimed_at_the_margin() -> None:
    """Levels that are the same are called so; one that differs by the margin is in at most 5 of 100."""
    same = sum(planted(seed, 0.0, 16, 0.01, margin=0.03)[0].verdict == "equivalent" for seed in STUDIES)
    assert same >= 95
    at_margin = sum(planted(3000 + seed, 0.03, 16, 0.01, margin=0.03)[1].p_equivalence < 0.05 for seed in STUDIES)
    assert at_margin <= 5


def test_only_seeds_that_both_have_are_compared() -> None:
    levels = {"base": {0: 1.0, 1: 2.0, 2: 3.0}, "other": {1: 2.5, 2: 3.5, 7: 100.0}, "none": {}}
    other, none = compare(levels, "base")
    assert (other.n, other.difference) == (2, 0.5)
    assert (none.n, none.verdict, none.interval) == (0, "none", None)
    # A level without results is no test, and does not make the others harder.
    many = {"base": dict.fromkeys(range(8), 1.0), "other": {n: 1.1 + n / 1000 for n in range(8)}}
    alone, *_ = compare(many, "base")
    beside, empty = compare({**many, "none": {}}, "base", judging=Judging(empty={"none"}))
    assert beside == alone
    assert (empty.verdict, empty.p, empty.comparisons) == ("none", 1.0, 1)
    # One whose runs are still to come counts, so that verdicts do not hang on the order of trials.
    waiting, _ = compare({**many, "none": {}}, "base")
    assert (waiting.comparisons, waiting.p) == (2, 2 * alone.p)
