"""How much more training would take: the law of one run's own curve, and when it can carry no answer.

The law knows the schedule of the learning rate (Tissue et al. 2024, arXiv 2408.11029): after the rates ``r_1 ... r_n``,
as shares of the peak,

    loss = E + A S1^-a - C S2,    S1 = sum of r_i,    S2 = sum over i of sum_{k<=i} (r_{k-1} - r_k) 0.999^(i-k)

so that what cooling down gains is not taken for what tokens gain. Nothing is borrowed from other models: coefficients
of published laws differ by a nat this early (Hoffmann et al. 2022 against its refit, arXiv 2404.10102).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.signal import lfilter

MEMORY = 0.999  # Of the annealing term, as published.
LEAST_UPDATES, LEAST_POINTS, MOST_POINTS = 60, 15, 60
REACH = 30.0  # Times the tokens seen that an answer may lie away.
BACKTEST_SHARE, BACKTEST_NATS = 0.6, 0.1  # The law of so much of the curve must foretell the rest so well.
RESAMPLES, BLOCK = 200, 4
MOST_TRIES = 200  # Of one search for the least squares.
NEVER_SHARE = 0.05  # Of the resamples that may say never.

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes.

    Attributes:
        kind: ``wsd``, ``cosine``, ``linear`` or ``constant``.
        warmup: Share of the steps.
        decay: Share of the steps that cool down (wsd).
        steps: In all.
    """

    kind: str
    warmup: float
    decay: float
    steps: int

    def rates(self, upto: int | None = None, steps: int | None = None) -> Floats:
        """Shares of the peak, step by step: as transformers' schedulers have them.

        Args:
            upto: Only the first so many.
            steps: Of the whole schedule, where it is stretched to another length.
        """
        total = steps or self.steps
        warm = round(self.warmup * total)
        step = np.arange(total if upto is None else upto, dtype=np.float64)
        rising = step / max(1, warm)
        if self.kind == "wsd":
            cooling = max(1, round(self.decay * total))
            past = np.clip((step - (total - cooling)) / cooling, 0, 1) if self.decay else np.zeros_like(step)
            flat = 1 - np.sqrt(past)
        elif self.kind == "cosine":
            flat = 0.5 * (1 + np.cos(np.pi * np.clip((step - warm) / max(1, total - warm), 0, 1)))
        elif self.kind == "linear":
            flat = np.clip((total - step) / max(1, total - warm), 0, 1)
        else:
            flat = np.ones_like(step)
        return np.where(step < warm, rising, flat)


def areas(rates: Floats) -> tuple[Floats, Floats]:
    """S1 and S2 after each step."""
    falls = np.maximum(0.0, -np.diff(rates, prepend=rates[:1]))
    momentum: Floats = lfilter([1.0], [1.0, -MEMORY], falls)
    return np.cumsum(rates), np.cumsum(momentum)


@dataclass(frozen=True)
class Law:
    """Coefficients of the law above."""

    floor: float
    scale: float
    exponent: float
    annealing: float

    def __call__(self, s1: Floats, s2: Floats) -> Floats:
        """The loss, in nats per token."""
        return self.floor + self.scale * np.maximum(s1, 1e-9) ** -self.exponent - self.annealing * s2

    def after(self, steps: int, schedule: Schedule) -> float:
        """The loss at the end of a schedule of so many steps."""
        s1, s2 = areas(schedule.rates(steps=steps))
        return float(self(s1[-1:], s2[-1:])[0])


def fit(s1: Floats, s2: Floats, losses: Floats, weights: Floats, near: Law | None = None) -> Law:
    """The law of least weighted squares, from several beginnings or from a law near it.

    Annealing counts only where some was seen.
    """
    lowest, annealed = float(losses.min()), bool(np.ptp(s2) > 0)
    free = 4 if annealed else 3  # What nothing was seen of cannot be found.

    def law_of(p: Floats) -> Law:
        return Law(*map(float, p), *([] if annealed else [0.0]))

    def misses(p: Floats) -> Floats:
        return (law_of(p)(s1, s2) - losses) * weights

    begins = [] if near is None else [[near.floor, near.scale, near.exponent, near.annealing]]
    for floor, exponent in itertools.product((0.2, 0.6, 0.95), (0.1, 0.4, 0.9)) if near is None else ():
        scale = max(0.1, float(losses[0]) - floor * lowest) * float(s1[0]) ** exponent
        begins.append([floor * lowest, min(scale, 1e4), exponent, 1e-4])
    low, high = np.array([0, 1e-6, 0.02, 0])[:free], np.array([lowest + 0.5, 1e5, 3.0, 1.0])[:free]
    best = None
    for begin in begins:
        start = np.clip(begin[:free], low, high)
        found = least_squares(misses, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=MOST_TRIES)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return law_of(best.x)


@dataclass(frozen=True)
class Answer:
    """How many tokens reach a loss, or why nothing honest can be said.

    Attributes:
        target: The loss, in nats per token.
        refusal: Why not; empty where there is an answer.
        tokens: In all, from nothing, on the same schedule stretched.
        low: End of the 95 % interval of it.
        high: Other end.
    """

    target: float
    refusal: str = ""
    tokens: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Curve:
    """The losses of a run.

    Attributes:
        steps: Updates done after each loss was measured, from 1.
        losses: Nats per token.
        tokens_per_step: Of an update.
        schedule: Of its learning rate.
        initial: The first loss.
    """

    steps: Sequence[int]
    losses: Sequence[float]
    tokens_per_step: int
    schedule: Schedule
    initial: float

    def points(self) -> tuple[Floats, Floats, Floats, Floats]:
        """S1, S2, mean loss and weight of bins that are even on a log scale, once learning is past its first nat."""
        steps, losses = np.asarray(self.steps), np.asarray(self.losses, dtype=np.float64)
        s1, s2 = areas(self.schedule.rates(upto=int(steps.max())))
        below = np.flatnonzero(losses <= self.initial - 1)
        first = int(steps[below[0]]) if len(below) else int(steps.max())
        edges = np.unique(np.geomspace(max(first, 2), steps.max() + 1, MOST_POINTS).astype(int))
        rows = []
        for low, high in itertools.pairwise(edges):
            inside = (steps >= low) & (steps < high)
            if inside.any():
                at = steps[inside] - 1
                rows.append((s1[at].mean(), s2[at].mean(), losses[inside].mean(), math.sqrt(inside.sum())))
        table = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
        return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


@dataclass(frozen=True)
class Outlook:
    """The law of a curve, and how far it can be trusted.

    Attributes:
        curve: Whose it is.
        law: Its law; ``None`` where there is too little of it.
        backtest: Nats by which the law of the first part misses the rest.
        refusal: Why no answer can be had at all.
    """

    curve: Curve
    law: Law | None
    backtest: float
    refusal: str

    @classmethod
    def of(cls, curve: Curve) -> Outlook:
        """Fit a curve, and try the fit on its own end."""
        if not curve.steps or max(curve.steps) < LEAST_UPDATES:
            return cls(curve, None, math.nan, f"it has fewer than {LEAST_UPDATES} updates")
        s1, s2, losses, weights = curve.points()
        if len(losses) < LEAST_POINTS:
            return cls(curve, None, math.nan, "hardly any of it lies below its first nat")
        law = fit(s1, s2, losses, weights)
        early = s1 <= BACKTEST_SHARE * s1.max()
        if early.sum() < LEAST_POINTS // 2:
            return cls(curve, law, math.nan, "too little of it lies in its first part to try the law on the rest")
        before = fit(s1[early], s2[early], losses[early], weights[early])
        # What cooling down gains was not seen before it began: it is taken from the whole.
        late = Law(before.floor, before.scale, before.exponent, law.annealing)(s1[~early], s2[~early])
        missed = float(np.average(np.abs(late - losses[~early]), weights=weights[~early] ** 2))
        refusal = ""
        if missed > BACKTEST_NATS:
            refusal = (
                f"the law of its first {BACKTEST_SHARE:.0%} misses the rest by {missed:.2f} nats, and more than "
                f"{BACKTEST_NATS:g} is no ground to foretell from"
            )
        return cls(curve, law, missed, refusal)

    @cached_property
    def resampled(self) -> list[Law]:
        """Laws of moving-block bootstraps of the residuals (Künsch 1989)."""
        if self.law is None:
            return []
        s1, s2, losses, weights = self.curve.points()
        fitted = self.law(s1, s2)
        residuals, rng, laws = losses - fitted, np.random.default_rng(0), []
        for _ in range(RESAMPLES):
            starts = rng.integers(0, max(1, len(residuals) - BLOCK + 1), -(-len(residuals) // BLOCK))
            drawn = np.concatenate([residuals[a : a + BLOCK] for a in starts])[: len(residuals)]
            laws.append(fit(s1, s2, fitted + drawn, weights, self.law))
        return laws

    def answer(self, target: float) -> Answer:
        """How many tokens reach a loss, with the interval of the resampled laws."""
        if self.law is None or self.refusal:
            return Answer(target, self.refusal)
        seen = max(self.curve.steps) * self.curve.tokens_per_step
        middle, found = self._tokens(self.law, target), [self._tokens(law, target) for law in self.resampled]
        never = float(np.mean(np.isinf(found)))
        if math.isinf(middle) or never > NEVER_SHARE:
            least = _quantile([x for x in found if not math.isinf(x)] or [math.inf], 0.025)
            more = "" if math.isinf(least) else f"; if ever, after at least {least:,.0f} tokens"
            share = "the law does" if math.isinf(middle) else f"{never:.0%} of the resampled laws do"
            far = f"{2 * REACH:g} times the {seen:,.0f} tokens seen"
            return Answer(target, f"{share} not reach {target:.2f} nats within {far}{more}")
        low, high = _quantile(found, 0.025), _quantile(found, 0.975)
        if high > REACH * seen:
            return Answer(
                target, f"it lies at least {low:,.0f} tokens away, too far from the {seen:,.0f} that were seen"
            )
        return Answer(target, "", middle, low, high)

    def _tokens(self, law: Law, target: float) -> float:
        """Tokens of the shortest schedule that ends at a loss; infinite beyond what is looked at."""
        most = int(2 * REACH * max(self.curve.steps))
        if law.after(most, self.curve.schedule) > target:
            return math.inf
        low, high = 2, most
        while high - low > max(1, low // 1000):
            middle = (low + high) // 2
            if law.after(middle, self.curve.schedule) > target:
                low = middle
            else:
                high = middle
        return float(high * self.curve.tokens_per_step)


def _quantile(values: Sequence[float], share: float) -> float:
    """One of the values themselves: some may be infinite."""
    return sorted(values)[round(share * (len(values) - 1))]
