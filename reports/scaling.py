"""How much more training would take: the law of one run's own curve, and when it can carry no answer.

After updates whose learning rates sum to ``S`` (as shares of the peak), and with the rate cooled down by ``g`` from its
peak (0 to 1), the loss is one of

    loss = (1 - g) E + g E' + A S^-a                    the gain of cooling down is fixed
    loss = E + ((1 - g) A + g A') S^-a                  it is a share of the reducible loss

with all coefficients non-negative, ``E' <= E`` and ``A' <= A``: what cooling down gains is bounded by what was seen of
it, and no loss is predicted below 0. (The sum of the learning rates is the progress of Tissue et al. 2024, arXiv
2408.11029; its annealing term grows without limit with the length of the schedule.) Nothing is borrowed from other
models: coefficients of published laws differ by a nat this early (Hoffmann et al. 2022 against its refit, arXiv
2404.10102).

The interval of an answer comes from simulated curves: laws of both kinds that explain the curve, with its noise, are
fitted as the curve was, and the error of their answers is taken for that of the answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

LEAST_UPDATES, LEAST_POINTS, MOST_POINTS, COOLING_POINTS = 60, 15, 60, 12
REACH = 30.0  # Times the tokens seen that an answer may lie away.
BACKTEST_SHARE, BACKTEST_NATS = 0.6, 0.1  # The law of so much of the curve must foretell the rest so well.
RESAMPLES, BLOCK = 120, 4
WIDER = 1.25  # Errors of simulated curves are taken so many times as large: their truths are known too well.
FAILED_SHARE = 0.1  # Of the simulated curves that may say never, or too far.
EXPONENTS, FINER = np.geomspace(0.03, 2.0, 30), 9
AS_GOOD = 6.0  # Difference of the weighted squares, in units of the noise, up to which both kinds explain a curve.
COOLED = 0.02  # Of the rate: less is no cooling down that could be fitted.
CONFIDENCE = 0.95

Kind = Literal["fixed", "proportional"]
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


def state_before(rates: Floats) -> tuple[Floats, Floats]:
    """The sum of the learning rates before each update, and by how much the last one had cooled down from its peak.

    The loss of a batch is measured before the update that it is for, so the first entries are 0.
    """
    total = np.concatenate([[0.0], np.cumsum(rates)])[:-1]
    cooled = np.concatenate([[0.0], np.maximum.accumulate(rates) - rates])[:-1]
    return total, cooled


@dataclass(frozen=True)
class LawCoefficients:
    """Coefficients of one of the laws above.

    Attributes:
        kind: Which.
        floor: E, the irreducible loss at the peak of the learning rate, in nats per token.
        scale: A, likewise.
        exponent: a.
        cooled_floor: E', when the rate is 0; that of the peak where nothing cooled down.
        cooled_scale: A', likewise.
    """

    kind: Kind
    floor: float
    scale: float
    exponent: float
    cooled_floor: float
    cooled_scale: float

    def __call__(self, total: Floats, cooled: Floats) -> Floats:
        """The loss, in nats per token."""
        floor = (1 - cooled) * self.floor + cooled * self.cooled_floor
        scale = (1 - cooled) * self.scale + cooled * self.cooled_scale
        return floor + scale * np.maximum(total, 1e-9) ** -self.exponent

    def updates(self, target: float, schedule: Schedule) -> float:
        """Updates of the shortest stretched schedule that ends at a loss; infinite where none does."""
        whole = schedule.rates(steps=10_000)  # Shares of its length are all that matters.
        cooled = float(whole.max() - whole[-1])
        floor = (1 - cooled) * self.floor + cooled * self.cooled_floor
        scale = (1 - cooled) * self.scale + cooled * self.cooled_scale
        if target <= floor:
            return math.inf
        if scale <= 0:
            return 0.0
        exponent = math.log(scale / (target - floor)) / self.exponent
        return math.exp(exponent) / float(whole.mean()) if exponent < 100 else math.inf


@dataclass(frozen=True)
class LawFit:
    """A law and how well it explains a curve: the sum of its weighted squares."""

    law: LawCoefficients
    squares: float


def fit_laws(total: Floats, cooled: Floats, losses: Floats, weights: Floats) -> list[LawFit]:
    """The law of each kind of least weighted squares, the better one first; one alone where nothing cooled down."""
    kinds: tuple[Kind, ...] = ("fixed", "proportional") if np.ptp(cooled) > COOLED else ("fixed",)
    found = [_fit(kind, total, cooled, losses, weights) for kind in kinds]
    return sorted(found, key=lambda fit: fit.squares)


def _fit(kind: Kind, total: Floats, cooled: Floats, losses: Floats, weights: Floats) -> LawFit:
    coarse = _best(kind, EXPONENTS, total, cooled, losses, weights)
    ratio = float(EXPONENTS[1] / EXPONENTS[0])
    near = coarse.law.exponent * np.geomspace(1 / ratio, ratio, FINER)
    finer = _best(kind, near, total, cooled, losses, weights)
    finest = finer.law.exponent * np.geomspace(ratio ** (-2 / FINER), ratio ** (2 / FINER), FINER)
    found = _best(kind, finest, total, cooled, losses, weights)
    return min((coarse, finer, found), key=lambda fit: fit.squares)


def _best(kind: Kind, exponents: Floats, total: Floats, cooled: Floats, losses: Floats, weights: Floats) -> LawFit:
    """The best law of some exponents: with one given, the other coefficients are a problem of least squares."""
    best = LawFit(LawCoefficients(kind, 0.0, 0.0, 1.0, 0.0, 0.0), math.inf)
    seen, target = np.ptp(cooled) > COOLED, losses * weights
    for exponent in exponents:
        power = np.maximum(total, 1e-9) ** -exponent
        parts = (1 - cooled, cooled) if seen else (np.ones_like(cooled), None)
        split, whole = (np.ones_like(power), power) if kind == "fixed" else (power, np.ones_like(power))
        columns = [part * split for part in parts if part is not None] + [whole]
        found, rest = nnls(np.stack(columns, axis=1) * weights[:, None], target)
        if seen and found[1] > found[0]:  # Cooling down cannot cost anything.
            (both, other), rest = nnls(np.stack([split, whole], axis=1) * weights[:, None], target)
            found = np.array([both, both, other])
        at_peak, cold, other = (found[0], found[1], found[2]) if seen else (found[0], found[0], found[1])
        if rest**2 < best.squares:
            values = (at_peak, other, cold, other) if kind == "fixed" else (other, at_peak, other, cold)
            floor, scale, cold_floor, cold_scale = map(float, values)
            best = LawFit(LawCoefficients(kind, floor, scale, float(exponent), cold_floor, cold_scale), float(rest**2))
    return best


@dataclass(frozen=True)
class Extrapolation:
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
        steps: The update that each loss was recorded at, from 1. A loss is the mean of those of the batches since the
            record before, each measured before the update that it is for.
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
        """Sum of rates, cooling, mean loss and weight of bins, once learning is past its first nat and its warm-up.

        Bins are even on a log scale of the updates, and finer where the rate cools down at the end.
        """
        steps, losses = np.asarray(self.steps), np.asarray(self.losses, dtype=np.float64)
        total, cooled = state_before(self.schedule.rates(upto=int(steps.max())))
        counts = np.diff(steps, prepend=0)
        means = [_means(of, steps, counts) for of in (total, cooled)]
        below = np.flatnonzero(losses <= self.initial - 1)
        first = int(steps[below[0]]) if len(below) else int(steps.max())
        first = max(first, round(self.schedule.warmup * self.schedule.steps) + 1)
        edges = np.geomspace(max(first, 2), steps.max() + 1, MOST_POINTS)
        if self.schedule.kind == "wsd" and cooled[-1] > COOLED:
            begin = int(np.flatnonzero(cooled > 0)[0])
            edges = np.concatenate([edges, np.linspace(begin, steps.max() + 1, COOLING_POINTS)])
        rows = []
        for low, high in itertools.pairwise(np.unique(edges.astype(int))):
            inside = (steps >= low) & (steps < high)
            if inside.any():
                share = counts[inside] / counts[inside].sum()
                values = [float((of[inside] * share).sum()) for of in (*means, losses)]
                rows.append((*values, math.sqrt(counts[inside].sum())))
        table = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
        return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def _means(values: Floats, steps: NDArray[np.int64], counts: NDArray[np.int64]) -> Floats:
    """Mean of values, one an update, over the updates that each record is of."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[steps] - sums[steps - counts]) / counts)


@dataclass(frozen=True)
class Outlook:
    """The law of a curve, and how far it can be trusted.

    Attributes:
        curve: Whose it is.
        fits: Its laws, the better one first; none where there is too little of it.
        backtest: Nats by which the law of the first part misses the rest.
        refusal: Why no answer can be had at all.
    """

    curve: Curve
    fits: Sequence[LawFit]
    backtest: float
    refusal: str

    @property
    def law(self) -> LawCoefficients | None:
        """The law that explains the curve best."""
        return self.fits[0].law if self.fits else None

    @classmethod
    def of(cls, curve: Curve) -> Outlook:
        """Fit a curve, and try the fit on its own end."""
        if not curve.steps or max(curve.steps) < LEAST_UPDATES:
            return cls(curve, (), math.nan, f"it has fewer than {LEAST_UPDATES} updates")
        total, cooled, losses, weights = curve.points()
        if len(losses) < LEAST_POINTS:
            return cls(curve, (), math.nan, "hardly any of it lies below its first nat")
        found = fit_laws(total, cooled, losses, weights)
        # A cooling down that the first part has not seen cannot be foretold from it: it is no part of the test.
        tried = cooled < COOLED if curve.schedule.kind == "wsd" else np.ones(len(total), dtype=bool)
        early = tried & (total <= BACKTEST_SHARE * total[tried].max()) if tried.any() else tried
        late = tried & ~early
        if early.sum() < LEAST_POINTS // 2 or not late.any():
            return cls(curve, found, math.nan, "too little of it lies in its first part to try the law on the rest")
        before = fit_laws(total[early], cooled[early], losses[early], weights[early])[0].law
        foretold = before(total[late], cooled[late])
        missed = float(np.average(np.abs(foretold - losses[late]), weights=weights[late] ** 2))
        refusal = ""
        if missed > BACKTEST_NATS:
            refusal = (
                f"the law of its first {BACKTEST_SHARE:.0%} misses the rest by {missed:.2f} nats, and more than "
                f"{BACKTEST_NATS:g} is no ground to foretell from"
            )
        return cls(curve, found, missed, refusal)

    @cached_property
    def simulated(self) -> list[tuple[LawCoefficients, LawCoefficients]]:
        """Laws that explain the curve, each with the law that is fitted to a curve simulated from it.

        The noise is that of moving blocks of the residuals (Künsch 1989).
        """
        if not self.fits:
            return []
        total, cooled, _, weights = self.curve.points()
        pairs = []
        for law, residuals, rng in self._truths():
            starts = rng.integers(0, max(1, len(residuals) - BLOCK + 1), -(-len(residuals) // BLOCK))
            drawn = np.concatenate([residuals[a : a + BLOCK] for a in starts])[: len(residuals)]
            losses = law(total, cooled) + drawn / weights
            pairs.append((law, fit_laws(total, cooled, losses, weights)[0].law))
        return pairs

    def _truths(self) -> Iterator[tuple[LawCoefficients, Floats, np.random.Generator]]:
        total, cooled, losses, weights = self.curve.points()
        free = max(1, len(losses) - 4)
        noise = self.fits[0].squares / free
        likely = [fit for fit in self.fits if fit.squares - self.fits[0].squares <= AS_GOOD * noise]
        rng = np.random.default_rng(0)
        for number in range(RESAMPLES):
            law = likely[number % len(likely)].law
            residuals = (losses - law(total, cooled)) * weights * math.sqrt(len(losses) / free)
            yield law, residuals - residuals.mean(), rng

    @property
    def resampled(self) -> list[LawCoefficients]:
        """The laws that are fitted to simulated curves."""
        return [found for _, found in self.simulated]

    def answer(self, target: float) -> Extrapolation:
        """How many tokens reach a loss, with its interval, or why there is no answer."""
        if self.law is None or self.refusal:
            return Extrapolation(target, self.refusal)
        seen = max(self.curve.steps) * self.curve.tokens_per_step
        far = f"{REACH:g} times the {seen:,.0f} tokens seen"
        middle = self._tokens(self.law, target)
        if middle > REACH * seen:
            return Extrapolation(target, f"the law does not reach {target:.2f} nats within {far}")
        errors, failed = [], 0
        for true, found in self.simulated:
            truth, estimate = self._tokens(true, target), self._tokens(found, target)
            if min(truth, estimate) <= 0 or max(truth, estimate) > 2 * REACH * seen:
                failed += 1
            else:
                errors.append(math.log(estimate / truth))
        if failed > FAILED_SHARE * len(self.simulated):
            share = failed / len(self.simulated)
            return Extrapolation(
                target, f"of simulated curves of this kind {share:.0%} do not find {target:.2f} nats within {far}"
            )
        tail = (1 - CONFIDENCE) / 2
        low, high = (middle / math.exp(WIDER * _quantile(errors, share)) for share in (1 - tail, tail))
        low, high = min(low, middle), max(high, middle)
        if high > REACH * seen:
            return Extrapolation(
                target, f"it lies at least {low:,.0f} tokens away, too far from the {seen:,.0f} that were seen"
            )
        return Extrapolation(target, "", middle, low, high)

    def _tokens(self, law: LawCoefficients, target: float) -> float:
        """Tokens of the shortest schedule that ends at a loss; infinite where none does."""
        return law.updates(target, self.curve.schedule) * self.curve.tokens_per_step


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else math.inf
