"""How much more: planted laws are found with their intervals, and what cannot be known is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.optimization import get_scheduler

from reports.scaling import Answer, Curve, Law, Outlook, Schedule, areas

LAW = Law(3.0, 9.0, 0.35, 0.0008)
INITIAL = 10.8


def curve(kind: str = "wsd", steps: int = 400, noise: float = 0.05, seed: int = 0, law: Law = LAW) -> Curve:
    schedule = Schedule(kind, 0.02, 0.2, steps)
    s1, s2 = areas(schedule.rates())
    losses = np.minimum(law(s1, s2) + np.random.default_rng(seed).normal(0, noise, steps), INITIAL)
    losses[0] = INITIAL
    return Curve(list(range(1, steps + 1)), losses.tolist(), 8192, schedule, INITIAL)


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


def test_areas_are_the_sums_written_out():
    rates = Schedule("wsd", 0.1, 0.3, 40).rates()
    s1, s2 = areas(rates)
    falls = [max(0.0, rates[k - 1] - rates[k]) if k else 0.0 for k in range(40)]
    for i in (5, 30, 39):
        assert s1[i] == pytest.approx(sum(rates[: i + 1]))
        assert s2[i] == pytest.approx(sum(falls[k] * 0.999 ** (j - k) for j in range(i + 1) for k in range(j + 1)))


@pytest.mark.parametrize(
    ("kind", "curves", "least"),
    [
        ("cosine", 3, 2),
        *(pytest.param(kind, 10, 8, marks=pytest.mark.slow) for kind in ("wsd", "cosine", "constant")),
    ],
)
def test_a_planted_law_is_found(kind, curves, least):
    """The interval holds the truth in most curves, and the estimate is near the truth in all."""
    target, held = 3.9, 0
    for seed in range(curves):
        outlook = Outlook.of(curve(kind, seed=seed))
        assert outlook.refusal == ""
        assert outlook.backtest < 0.1
        true = Outlook(outlook.curve, LAW, 0.0, "")._tokens(LAW, target)
        answer = outlook.answer(target)
        assert answer.refusal == ""
        assert answer.low <= answer.tokens <= answer.high
        assert answer.tokens == pytest.approx(true, rel=0.25)
        held += answer.low <= true <= answer.high
    assert held >= least


def test_cooling_down_is_not_taken_for_tokens():
    """Ten times the annealing: the end of the curve falls steeply, and the law knows why."""
    strong = Law(3.0, 9.0, 0.35, 0.008)
    outlook = Outlook.of(curve(law=strong, noise=0.02))
    assert outlook.law is not None
    assert outlook.law.annealing == pytest.approx(0.008, rel=0.3)
    assert outlook.law.exponent == pytest.approx(0.35, rel=0.3)


def refused(outlook: Outlook, target: float, words: str) -> None:
    answer = outlook.answer(target)
    assert math.isnan(answer.tokens)
    assert words in answer.refusal


def test_what_cannot_be_known_is_refused():
    good = Outlook.of(curve("constant"))
    refused(good, 2.273, "not reach 2.27 nats")  # The floor is at 3.
    refused(Outlook.of(curve(steps=40)), 3.9, "fewer than 60 updates")
    flat = Curve(list(range(1, 200)), [10.5] * 199, 8192, Schedule("constant", 0.0, 0.0, 199), 10.6)
    refused(Outlook.of(flat), 3.9, "hardly any of it")
    far = Outlook.of(curve("constant", law=Law(0.0, 10.5, 0.08, 0.0), noise=0.01))
    assert far.answer(4.0) != Answer(4.0)
    assert far.answer(4.0).refusal


def test_a_curve_that_breaks_its_own_law_is_refused():
    """It stops learning half-way: what was seen first foretells nothing."""
    made = curve("constant", steps=400, noise=0.01)
    broken = [
        loss if step < 200 else loss + (step - 200) * 0.004 for step, loss in zip(made.steps, made.losses, strict=True)
    ]
    outlook = Outlook.of(Curve(made.steps, broken, 8192, made.schedule, INITIAL))
    assert outlook.backtest > 0.1
    refused(outlook, 3.9, "misses the rest by")
