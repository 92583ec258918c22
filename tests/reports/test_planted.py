"""Whole comparisons of simulated studies: false positives, power, and coverage of the intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from reports.comparison import Comparison, Judging, compare
from reports.interim_looks import correct_for_looks
from reports.paired_tests import ALPHA, combined_p
from reports.power import power

STUDIES, SEEDS = 400, 8
AT_MOST = ALPHA + 2 * np.sqrt(ALPHA * (1 - ALPHA) / STUDIES)
Noise = Callable[[np.random.Generator, int], NDArray[np.float64]]


def normal(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.normal(0, 0.02, n)


def heavy(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return 0.02 * rng.standard_t(3, n)


def lognormal(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return 0.02 * rng.lognormal(0, 1, n)


def diverging(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """One run in eight ends at the loss that it began with."""
    return np.where(rng.random(n) < 1 / 8, 3.0, rng.normal(0, 0.02, n))


def ties(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """As accuracies of few answers are."""
    return np.round(rng.normal(0, 0.02, n), 2)


def planted(
    number: int,
    effect: float = 0.0,
    *,
    base: Noise = normal,
    level: Noise = normal,
    n: int = SEEDS,
    missing: bool = False,
    judging: Judging | None = None,
) -> Comparison:
    """One study of a baseline and a level, whose seeds move both alike."""
    rng = np.random.default_rng(number)
    shared = rng.normal(1.0, 0.1, n)
    levels = {
        "base": dict(enumerate(shared + base(rng, n))),
        "other": dict(enumerate(shared + effect + level(rng, n))),
    }
    if missing:
        del levels["other"][3]
    return compare(levels, "base", judging=judging)[0]


@pytest.mark.parametrize(
    ("base", "level", "n", "missing"),
    [
        (normal, normal, SEEDS, False),
        (heavy, heavy, SEEDS, False),
        (lognormal, lognormal, SEEDS, False),
        (diverging, diverging, SEEDS, False),
        (normal, diverging, SEEDS, False),  # Only one level diverges: its other runs are no different.
        (normal, normal, SEEDS, True),
        (ties, ties, SEEDS, False),
        (normal, normal, 3, False),
        (heavy, heavy, 16, False),
    ],
)
def test_what_is_the_same_is_not_called_different(base: Noise, level: Noise, n: int, missing: bool) -> None:
    found = [planted(k, base=base, level=level, n=n, missing=missing) for k in range(STUDIES)]
    assert sum(c.verdict == "different" for c in found) / STUDIES <= AT_MOST
    covered = sum(c.interval is not None and c.interval.holds(0.0) for c in found) / STUDIES
    assert covered >= 0.92


@pytest.mark.parametrize(("ratio", "n"), [(1.2, 8), (1.6, 8), (0.9, 12)])
def test_an_effect_is_found_as_often_as_is_stated(ratio: float, n: int) -> None:
    deviation = 0.02 * np.sqrt(2)
    found = [planted(10_000 + k, -ratio * deviation, n=n) for k in range(2 * STUDIES)]
    shown = sum(c.verdict == "different" and c.difference < 0 for c in found) / len(found)
    assert shown == pytest.approx(power(ratio * deviation, deviation, n), abs=0.05)
    covered = sum(c.interval is not None and c.interval.holds(-ratio * deviation) for c in found) / len(found)
    assert covered >= 0.92


def test_an_effect_is_found_though_runs_diverge() -> None:
    found = [planted(k, -0.08, level=diverging, n=12) for k in range(STUDIES)]
    assert sum(c.verdict == "different" and c.difference < 0 for c in found) / STUDIES >= 0.95
    lost = np.mean([c.lost[0] / 12 for c in found])
    assert lost == pytest.approx(1 / 8, abs=0.02)
    assert sum(c.interval is not None and c.interval.holds(-0.08) for c in found) / STUDIES >= 0.92


def test_rates_of_divergence_are_compared() -> None:
    both = [planted(k, base=diverging, level=diverging, n=16).p_lost < ALPHA for k in range(STUDIES)]
    assert sum(both) / STUDIES <= AT_MOST

    def mostly(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
        return np.where(rng.random(n) < 0.4, 3.0, rng.normal(0, 0.02, n))

    one = [planted(k, level=mostly, n=24).p_lost < ALPHA for k in range(100)]
    assert sum(one) / 100 >= 0.8


def test_three_looks_are_wrong_no_more_often_than_one() -> None:
    """Stopped when it shows something, else continued with more seeds."""
    looks, studies = (8, 12, 16), 4 * STUDIES
    corrected_wrong = plain_wrong = 0
    for k in range(studies):
        differences = np.random.default_rng(k).normal(0, 1, max(looks))
        ps = [combined_p(differences[:look]) for look in looks]
        corrected_wrong += min(correct_for_looks(p, looks) for p in ps) < ALPHA
        plain_wrong += min(ps) < ALPHA
    assert corrected_wrong / studies <= ALPHA + 2 * np.sqrt(ALPHA * (1 - ALPHA) / studies)
    assert plain_wrong / studies > 0.07  # As if each were the only look.


def test_a_draw_is_the_unit_where_draws_are_fewer_than_seeds() -> None:
    """Draws of what levels are built on move their difference: seeds of one draw are not independent."""
    wrong = {True: 0, False: 0}
    covered = 0
    for k in range(STUDIES):
        rng = np.random.default_rng(k)
        moved = np.repeat(rng.normal(0, 0.05, 8)[:, None], 3, axis=1).T.ravel()  # Seed n is built on draw n % 8.
        levels = {
            "base": dict(enumerate(rng.normal(1, 0.02, 24))),
            "other": dict(enumerate(rng.normal(1, 0.02, 24) + moved)),
        }
        for by_draw in (True, False):
            (found,) = compare(levels, "base", judging=Judging(draw=(lambda n: n % 8) if by_draw else None))
            wrong[by_draw] += found.verdict == "different"
            if by_draw:
                assert found.n == 8
                assert found.interval is not None
                covered += found.interval.holds(0.0)
    assert wrong[True] / STUDIES <= AT_MOST
    assert wrong[False] / STUDIES > 0.15
    assert covered / STUDIES >= 0.92


@pytest.mark.parametrize("n", [4, 6, 8, 16])
def test_normal_noise_is_not_called_diverged(n: int) -> None:
    assert sum(any(planted(k, n=n).lost) for k in range(2 * STUDIES)) / (2 * STUDIES) <= 0.03
