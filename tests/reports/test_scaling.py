"""How much more: planted laws are found with their intervals, and what cannot be known is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers.optimization import get_scheduler

from reports.scaling import Curve, Extrapolation, LawCoefficients, Outlook, Schedule, state_before

LAW = LawCoefficients("fixed", 3.0, 9.0, 0.35, 2.9, 9.0)
INITIAL = 10.8


def curve(kind: str = "wsd", steps: int = 400, noise: float = 0.05, seed: int = 0, law: LawCoefficients = LAW) -> Curve:
    """Losses of a planted law, recorded as trainings do: each of the first 100, then means of ten."""
    schedule = Schedule(kind, 0.02, 0.2, steps)
    total, cooled = state_before(schedule.rates())
    losses = law(np.maximum(total, 1), cooled) + np.random.default_rng(seed).normal(0, noise, steps)
    losses = np.minimum(losses, INITIAL)
    losses[0] = INITIAL
    recorded = [step for step in range(1, steps + 1) if step <= 100 or (step - 1) % 10 == 0]
    means = [float(losses[before:step].mean()) for before, step in zip([0, *recorded], recorded, strict=False)]
    return Curve(recorded, means, 8192, schedule, INITIAL)


def drawn(number: int) -> tuple[LawCoefficients, Curve, float]:
    """One of many laws, kinds, lengths and noises: the law, its curve, and a loss that it comes to later."""
    kinds = (("constant", "fixed"), *itertools.product(("cosine", "wsd"), ("fixed", "proportional")))
    kind, gain = kinds[number % len(kinds)]
    rng = np.random.default_rng(number)
    steps = int(math.exp(rng.uniform(math.log(300), math.log(20_000))))
    floor, exponent, scale = rng.uniform(1.5, 3.2), rng.uniform(0.2, 0.6), rng.uniform(5, 9)
    lower, share = rng.uniform(0.05, 0.3), rng.uniform(0.75, 0.95)
    cold = (floor - lower, scale) if gain == "fixed" else (floor, scale * share)
    law = LawCoefficients(gain, floor, scale, exponent, *(cold if kind != "constant" else (floor, scale)))
    made = curve(kind, steps, rng.uniform(0.03, 0.1), number, law)
    total, cooled = state_before(made.schedule.rates())
    end = float(law(total[-1:], cooled[-1:])[0])
    target = end - rng.uniform(0.05, 0.5) * (end - (law.floor if kind == "constant" else law.cooled_floor))
    return law, made, target


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear", "constant"])
def test_rates_are_transformers_own(kind):
    names = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    extra = {"num_decay_steps": 20, "decay_type": "1-sqrt"} if kind == "wsd" else {}
    scheduler = get_scheduler(
        names.get(kind, kind), optimizer, num_warmup_steps=10, num_training_steps=100, scheduler_specific_kwargs=extra
    )
    theirs = []
    for _ in range(100):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert Schedule(kind, 0.1, 0.2, 100).rates() == pytest.approx(theirs, abs=1e-6)


def test_the_state_before_an_update_is_that_after_the_one_before() -> None:
    rates = Schedule("wsd", 0.1, 0.3, 40).rates()
    total, cooled = state_before(rates)
    assert (total[0], cooled[0]) == (0.0, 0.0)
    for i in (1, 5, 30, 39):
        assert total[i] == pytest.approx(sum(rates[:i]))
        assert cooled[i] == pytest.approx(max(rates[:i]) - rates[i - 1])
    assert cooled[:20].max() == 0.0  # Warming up is no cooling down.


def test_a_record_is_of_all_updates_since_the_one_before() -> None:
    """Of a law without noise the means are paired with the sums of rates that they belong to, and weighted."""
    made = curve("constant", 2000, 0.0)
    total, cooled, losses, weights = made.points()
    assert LAW(total, cooled) == pytest.approx(losses, rel=2e-3)
    assert (weights**2).sum() == pytest.approx(2000 - round(0.02 * 2000), abs=12)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("gain", ["fixed", "proportional"])
def test_a_law_without_noise_is_found(kind: str, gain: str) -> None:
    law = LAW if gain == "fixed" else LawCoefficients("proportional", 3.0, 9.0, 0.35, 3.0, 8.0)
    outlook = Outlook.of(curve(kind, 3000, 1e-6, law=law))
    assert outlook.refusal == ""
    assert outlook.backtest < 0.02
    found = outlook.law
    assert found is not None
    assert (found.floor, found.exponent) == pytest.approx((3.0, 0.35), rel=0.05)
    if kind != "constant":
        assert found.kind == gain
        cold = (found.cooled_floor, found.cooled_scale)
        assert cold == pytest.approx((law.cooled_floor, law.cooled_scale), rel=0.05)


def test_what_cooling_down_gains_is_bounded() -> None:
    """Sixty times the tokens: no loss below what was seen of the gain, and none below 0."""
    for law in (LAW, LawCoefficients("proportional", 0.0, 9.0, 0.3, 0.0, 8.5)):
        for found in Outlook.of(curve(law=law, noise=0.02)).resampled:
            assert 0 <= found.cooled_floor <= found.floor
            assert 0 <= found.cooled_scale <= found.scale
            assert math.isinf(found.updates(0.0, Schedule("wsd", 0.02, 0.2, 400)))


def test_updates_are_those_at_which_a_stretched_schedule_ends_at_the_loss() -> None:
    for kind in ("wsd", "cosine", "constant"):
        updates = round(LAW.updates(3.9, Schedule(kind, 0.02, 0.2, 400)))
        total, cooled = state_before(Schedule(kind, 0.02, 0.2, updates).rates())
        assert float(LAW(total[-1:], cooled[-1:])[0]) == pytest.approx(3.9, abs=0.01)


@pytest.mark.parametrize("curves", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_intervals_hold_the_truth(curves: int) -> None:
    """Constant, cosine and WSD, fixed and proportional gain, 300 to 20,000 updates, noise of 0.03 to 0.1 nats."""
    answered = held = 0
    for number in range(curves):
        law, made, target = drawn(number)
        answer = Outlook.of(made).answer(target)
        if not answer.refusal:
            truth = law.updates(target, made.schedule) * made.tokens_per_step
            answered += 1
            held += answer.low <= truth <= answer.high
    assert answered >= curves / 2
    assert held / answered >= 0.9


def refused(outlook: Outlook, target: float, words: str) -> None:
    answer = outlook.answer(target)
    assert math.isnan(answer.tokens)
    assert words in answer.refusal


def test_what_cannot_be_known_is_refused():
    good = Outlook.of(curve("constant"))
    refused(good, 2.273, "2.27 nats within")  # The floor is at 3.
    refused(Outlook.of(curve(steps=40)), 3.9, "fewer than 60 updates")
    flat = Curve(list(range(1, 200)), [10.5] * 199, 8192, Schedule("constant", 0.0, 0.0, 199), 10.6)
    refused(Outlook.of(flat), 3.9, "hardly any of it")
    far = Outlook.of(curve("constant", law=LawCoefficients("fixed", 0.0, 10.5, 0.08, 0.0, 10.5), noise=0.01))
    assert far.answer(4.0) != Extrapolation(4.0)
    assert far.answer(4.0).refusal


def test_a_curve_that_breaks_its_own_law_is_refused():
    """It stops learning half-way: what was seen first foretells nothing."""
    made = curve("constant", steps=400, noise=0.01)
    broken = [
        loss if step < 200 else loss + (step - 200) * 0.006 for step, loss in zip(made.steps, made.losses, strict=True)
    ]
    outlook = Outlook.of(Curve(made.steps, broken, 8192, made.schedule, INITIAL))
    assert outlook.backtest > 0.1
    refused(outlook, 3.9, "misses the rest by")
