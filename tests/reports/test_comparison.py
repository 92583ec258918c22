from __future__ import annotations

import numpy as np
import pytest

from reports.comparison import Judging, compare
from reports.divergence import diverged, p_of_rates
from reports.interim_looks import correct_for_looks, looks_reached
from reports.verdict import JudgedMetric, format_verdict

VALUES = {"base": {n: 1.0 + n / 100 for n in range(8)}, "other": {n: 0.9 + n / 90 for n in range(8)}}


def test_runs_that_end_far_worse_are_diverged() -> None:
    rng = np.random.default_rng(0)
    levels = {name: dict(enumerate(rng.normal(1, 0.02, 8))) for name in ("a", "b", "few")}
    levels["a"][5] = 9.0
    levels["b"][2] = -9.0  # Far better is none.
    levels["few"] = {0: 1.0, 1: 9.0}  # Of two runs it is not known which one is the outlier.
    assert diverged(levels) == {"a": {5}, "b": set(), "few": set()}
    assert diverged(levels, less=False) == {"a": set(), "b": {2}, "few": set()}
    assert diverged({"a": dict.fromkeys(range(8), 1.0), "b": {}}) == {"a": set(), "b": set()}


def test_rates_are_compared_by_pairs_that_differ() -> None:
    assert p_of_rates({1, 2, 3}, {1, 2, 3}) == 1.0
    assert p_of_rates({1, 2, 3, 4, 5, 6}, set()) == pytest.approx(2 / 2**6)
    assert p_of_rates({1, 2}, {3, 4}) == 1.0


def test_diverged_and_failed_runs_are_left_out_and_counted() -> None:
    levels = {name: dict(of) for name, of in VALUES.items()}
    levels["other"][7] = 50.0
    del levels["base"][0]
    (found,) = compare(levels, "base", judging=Judging(failed={"base": {0}}))
    assert (found.n, found.lost) == (6, (1, 1))
    assert found.difference == pytest.approx(np.mean([VALUES["other"][n] - VALUES["base"][n] for n in range(1, 7)]))


def test_the_mean_without_any_one_pair() -> None:
    (found,) = compare({"base": dict.fromkeys(range(4), 0.0), "other": {0: 1.0, 1: 2.0, 2: 3.0, 3: 6.0}}, "base")
    assert found.without_one is not None
    assert (found.without_one.low, found.without_one.high) == (2.0, pytest.approx(11 / 3))


def test_nothing_is_judged_before_a_look() -> None:
    (found,) = compare(VALUES, "base", judging=Judging(looks=(12, 16), until={"other": None}))
    assert (found.verdict, found.n) == ("interim", 8)
    (found,) = compare(VALUES, "base", judging=Judging(looks=(7, 16), until={"other": 7}))
    assert (found.verdict, found.n, found.looks) == ("different", 7, (7, 16))


def test_looks_that_are_reached() -> None:
    assert [looks_reached(n, [4, 8]) for n in (0, 3, 4, 7, 8, 20)] == [None, None, 4, 4, 8, 8]


def test_correction_for_looks_lies_between_none_and_bonferronis() -> None:
    for p in (0.004, 0.02, 0.05):
        assert p < correct_for_looks(p, (8, 12, 16)) < 3 * p
        assert correct_for_looks(p, (16,)) == correct_for_looks(p, ()) == p
    assert correct_for_looks(1.0, (8, 16)) == 1.0
    # With 4 pairs no p is below 0.125: looking there cannot be wrong.
    assert correct_for_looks(0.03, (4, 12)) == pytest.approx(0.03, abs=0.004)


def test_only_pairs_count_for_rates_of_divergence() -> None:
    """A level of five seeds says nothing of the seeds at which the baseline alone was run."""
    levels = {"base": {n: 1.0 + n / 9 for n in range(5)}, "other": {n: 1.1 + n / 9 for n in range(5)}}
    (found,) = compare(levels, "base", judging=Judging(failed={"base": set(range(5, 12))}))
    assert (found.lost, found.p_lost) == ((0, 0), 1.0)


def test_a_level_that_lost_all_its_runs_is_said_so() -> None:
    levels = {"base": {n: 1.0 + n / 9 for n in range(8)}, "other": {}}
    (found,) = compare(levels, "base", judging=Judging(failed={"other": set(range(8))}))
    said = format_verdict(found, "base", JudgedMetric("test/loss", "nats/token", less=True))
    assert said.startswith("No statement is possible about other: no pair of runs gave a number. Left out")
    assert "8 runs of other and 0 of base (exact McNemar test, p = 0.008)" in said


def test_draws_are_called_draws() -> None:
    (found,) = compare(VALUES, "base", judging=Judging(draw=lambda n: n % 4))
    assert "with 4 draws (" in format_verdict(
        found, "base", JudgedMetric("test/loss", "nats/token", less=True, margin=0.001)
    )
