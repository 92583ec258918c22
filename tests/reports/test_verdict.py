from __future__ import annotations

import numpy as np
import pytest

from reports.comparison import compare
from reports.paired_tests import Interval
from reports.verdict import JudgedMetric, format_number, format_p, format_verdict, headline, interval_text, join_names

LOSS = JudgedMetric("test/loss", "nats/token", less=True, margin=0.02)


def study(**effects: float) -> dict[str, dict[int, float]]:
    """Levels that differ from the baseline by an effect, each seed a little differently."""
    rng = np.random.default_rng(0)
    base = rng.normal(1.0, 0.1, 8)
    levels = {"2 layers": dict(enumerate(base))}
    for name, by in effects.items():
        levels[name] = dict(enumerate(base + by + rng.normal(0, 0.003, 8)))
    return levels


def test_difference_in_words() -> None:
    three, one = compare(study(three=-0.05, one=0.08), "2 layers", 0.02)
    said = format_verdict(three, "2 layers", LOSS)
    assert said.startswith("**three beat 2 layers by 0.0")
    assert "95 % interval 0.05" in said  # Of the size of the improvement: positive, as the number before it.
    assert said.endswith("p = 0.016 after Holm over 2 comparisons, 8 seeds).")
    assert format_verdict(one, "2 layers", LOSS).startswith("**one did worse than 2 layers by 0.0")
    more = JudgedMetric("test/exact_match", "of captions", less=False)
    assert format_verdict(one, "2 layers", more).startswith("**one beat 2 layers by")


def test_difference_too_small_to_matter_in_words() -> None:
    (little,) = compare(study(little=0.009), "2 layers", 0.02)
    said = format_verdict(little, "2 layers", LOSS)
    assert said.startswith("**little did worse than 2 layers by 0.0")
    assert said.endswith("8 seeds; yet shown to lie within 0.02, too little to matter).")


def test_equality_in_words() -> None:
    (same,) = compare(study(same=0.001), "2 layers", 0.02)
    said = format_verdict(same, "2 layers", LOSS)
    assert said.startswith("**same equalled 2 layers within 0.02 nats/token** (difference ")
    assert "two one-sided tests, p = 0.004, 8 seeds" in said


def test_too_few_seeds_in_words() -> None:
    few = {level: {n: v for n, v in values.items() if n < 3} for level, values in study(three=-0.05).items()}
    said = format_verdict(compare(few, "2 layers")[0], "2 layers", LOSS)
    assert said.startswith("**No difference can be shown between three and 2 layers** with 3 seeds (")
    assert "the smallest p possible with 3 is 0.25; at the noise seen, 6 seeds would show 0.02 nats/token" in said
    assert "with power 0.8" in said
    (alone,) = compare({"2 layers": {0: 1.0}, "three": {0: 0.9}}, "2 layers")
    assert "with 1 seed (" in format_verdict(alone, "2 layers", LOSS)
    (none,) = compare({"2 layers": {0: 1.0}, "three": {}}, "2 layers")
    assert (
        format_verdict(none, "2 layers", LOSS)
        == "No statement is possible about three: it has no seed in common with 2 layers."
    )


def test_noise_in_words() -> None:
    rng = np.random.default_rng(1)
    noisy = {"a": dict(enumerate(rng.normal(0, 1, 8))), "b": dict(enumerate(rng.normal(0, 1, 8)))}
    said = format_verdict(compare(noisy, "a", 0.02)[0], "a", LOSS)
    assert "no number of seeds below 10,000 would show 0.02" in said


def test_headline() -> None:
    levels = study(three=-0.05, four=-0.07, same=0.001, one=0.08)
    said = headline(compare(levels, "2 layers", 0.02), "2 layers", LOSS)
    assert said.startswith("**four beat 2 layers by 0.0")
    assert said.endswith("three also beat it. one did worse. same equalled it within 0.02 nats/token.")
    levels = study(one=0.08, two=0.09)
    said = headline(compare(levels, "2 layers"), "2 layers", LOSS)
    assert said == "**No level is shown to be better than 2 layers.** one and two did worse."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.02134, "0.0213"),
        (-0.02134, "−0.0213"),
        (1.23456, "1.235"),
        (0.0000123, "1.2e-05"),
        (float("nan"), "-"),
        (197760.0, "197,760"),
        (0.0, "0"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert format_number(value) == text


def test_p_values_and_intervals() -> None:
    assert [format_p(p) for p in (0.0001, 0.0234, 0.25)] == ["p < 0.001", "p = 0.023", "p = 0.25"]
    assert interval_text(Interval(-0.03, -0.012), -1) == "95 % interval 0.012 to 0.03"
    assert interval_text(None) == "no interval: one seed"


def test_names_with_commas_are_told_apart():
    assert join_names(["a"]) == "a"
    assert join_names(["a", "b", "c"]) == "a, b and c"
    assert join_names(["a, half", "b", "c"]) == "“a, half”, “b” and “c”"
    assert join_names(["a, half"]) == "a, half"
