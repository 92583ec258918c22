"""Extrapolates a training loss curve: fits a law to the curve of one run, and decides when it supports no answer.

After updates whose learning rates sum to ``S`` (as shares of the peak), and with the rate cooled down by ``g`` from its
peak (0 to 1), the loss is one of

    loss = (1 - g) E + g E' + A S^-a                    the gain of cooling down is fixed
    loss = E + ((1 - g) A + g A') S^-a                  the gain is a share of the reducible loss

with all coefficients non-negative, ``E' <= E`` and ``A' <= A``: the gain of cooling down is bounded by the observed
gain, and no predicted loss is below 0. (The sum of the learning rates measures progress as in Tissue et al. 2024, arXiv
2408.11029; their annealing term grows without limit with the length of the schedule.) No coefficients of other models
are used: published laws differ by a nat this early (Hoffmann et al. 2022 against its refit, arXiv 2404.10102).

The interval of an answer comes from simulated curves: laws of both kinds that explain the curve, plus its noise, are
fitted in the same way, and the errors of their answers estimate the error of the answer.
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
REACH = 30.0  # Maximum extrapolation, as a multiple of the tokens seen.
BACKTEST_SHARE, BACKTEST_NATS = 0.6, 0.1  # Share of the curve that is fitted; largest error allowed on the rest.
RESAMPLES, BLOCK = 120, 4
WIDER = 1.25  # Factor on the errors of simulated curves, which underestimate the error of the answer.
FAILED_SHARE = 0.1  # Largest share of simulated curves that may give no answer or one too far away.
EXPONENTS, FINER = np.geomspace(0.03, 2.0, 30), 9
AS_GOOD = 6.0  # Difference of the weighted squares, in units of the noise, up to which both kinds explain a curve.
COOLED = 0.02  # Smallest decrease of the rate, as a share of the peak, that cooling down can be fitted to.
CONFIDENCE = 0.95

Kind = Literal["fixed", "proportional"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """Learning rate schedule.

    Attributes:
        kind: ``wsd``, ``cosine``, ``linear`` or ``constant``.
        warmup: Share of the steps that warm up.
        decay: Share of the steps that cool down (wsd).
        steps: Total number of steps.
    """

    kind: str
    warmup: float
    decay: float
    steps: int

    def rates(self, upto: int | None = None, steps: int | None = None) -> Floats:
        """Learning rates as shares of the peak, per step, as transformers' schedulers compute them.

        Args:
            upto: Number of leading steps to return; ``None`` for all.
            steps: Total number of steps, if the schedule is stretched to another length.
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
    """Sum of the learning rates before each update, and the decrease of the previous rate from its peak.

    The loss of a batch is measured before its update, so the first entries are 0.
    """
    total = np.concatenate([[0.0], np.cumsum(rates)])[:-1]
    cooled = np.concatenate([[0.0], np.maximum.accumulate(rates) - rates])[:-1]
    return total, cooled


@dataclass(frozen=True)
class LawCoefficients:
    """Coefficients of one of the laws above.

    Attributes:
        kind: Kind of the law.
        floor: E, the irreducible loss at the peak of the learning rate, in nats per token.
        scale: A, at the peak of the learning rate, in nats per token.
        exponent: a.
        cooled_floor: E', the floor at rate 0; equal to E if nothing cooled down.
        cooled_scale: A', the scale at rate 0; equal to A if nothing cooled down.
    """

    kind: Kind
    floor: float
    scale: float
    exponent: float
    cooled_floor: float
    cooled_scale: float

    def __call__(self, total: Floats, cooled: Floats) -> Floats:
        """Loss in nats per token, for arrays of the sum of rates and of the cooling."""
        floor = (1 - cooled) * self.floor + cooled * self.cooled_floor
        scale = (1 - cooled) * self.scale + cooled * self.cooled_scale
        return floor + scale * np.maximum(total, 1e-9) ** -self.exponent

    def updates(self, target: float, schedule: Schedule) -> float:
        """Length in updates of the shortest stretched schedule that ends at a loss; infinite if none does."""
        whole = schedule.rates(steps=10_000)  # Any length works: only shares of it are used.
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
    """A law fitted to a curve, and the weighted sum of its squared residuals."""

    law: LawCoefficients
    squares: float


def fit_laws(total: Floats, cooled: Floats, losses: Floats, weights: Floats) -> list[LawFit]:
    """Weighted least-squares fits of both kinds of law, the better one first; one fit if nothing cooled down."""
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
    """Best law over the given exponents; with the exponent fixed, the coefficients are a least-squares problem."""
    best = LawFit(LawCoefficients(kind, 0.0, 0.0, 1.0, 0.0, 0.0), math.inf)
    seen, target = np.ptp(cooled) > COOLED, losses * weights
    for exponent in exponents:
        power = np.maximum(total, 1e-9) ** -exponent
        parts = (1 - cooled, cooled) if seen else (np.ones_like(cooled), None)
        split, whole = (np.ones_like(power), power) if kind == "fixed" else (power, np.ones_like(power))
        columns = [part * split for part in parts if part is not None] + [whole]
        found, rest = nnls(np.stack(columns, axis=1) * weights[:, None], target)
        if seen and found[1] > found[0]:  # Enforce E' <= E or A' <= A.
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
    """Number of tokens that reach a loss, or why it cannot be extrapolated.

    Attributes:
        target: Target loss, in nats per token.
        refusal: Why there is no answer; empty if there is one.
        tokens: Total tokens of a training from scratch, with the same schedule stretched; NaN without an answer.
        low: Lower end of the 95 % interval of ``tokens``.
        high: Upper end of the interval.
    """

    target: float
    refusal: str = ""
    tokens: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Curve:
    """Training loss curve of a run.

    Attributes:
        steps: Update at which each loss was recorded, from 1. A loss is the mean over the batches since the previous
            record, each measured before its update.
        losses: Losses in nats per token.
        tokens_per_step: Tokens per update.
        schedule: Learning rate schedule.
        initial: Initial loss in nats per token.
    """

    steps: Sequence[int]
    losses: Sequence[float]
    tokens_per_step: int
    schedule: Schedule
    initial: float

    def points(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Sum of rates, cooling, mean loss and weight of bins, each of shape (bins,).

        Bins start after the warm-up and after the loss has fallen by one nat. They are even on a log scale of the
        updates, with additional ones where the rate cools down at the end.
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
    """Mean of per-update values over the updates of each record."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[steps] - sums[steps - counts]) / counts)


@dataclass(frozen=True)
class Outlook:
    """Law of a curve, with a test of its extrapolation.

    Attributes:
        curve: The loss curve.
        fits: Fitted laws, the better one first; empty if the curve is too short.
        backtest: Mean absolute error, in nats, of the law of the first part on the rest; NaN if not tested.
        refusal: Why the curve supports no extrapolation; empty if it does.
    """

    curve: Curve
    fits: Sequence[LawFit]
    backtest: float
    refusal: str

    @property
    def law(self) -> LawCoefficients | None:
        """Best-fitting law; ``None`` without fits."""
        return self.fits[0].law if self.fits else None

    @classmethod
    def of(cls, curve: Curve) -> Outlook:
        """Fit laws to a curve, and backtest the fit of its first part on the rest."""
        if not curve.steps or max(curve.steps) < LEAST_UPDATES:
            return cls(curve, (), math.nan, f"it has fewer than {LEAST_UPDATES} updates")
        total, cooled, losses, weights = curve.points()
        if len(losses) < LEAST_POINTS:
            return cls(curve, (), math.nan, "hardly any of it lies below its first nat")
        found = fit_laws(total, cooled, losses, weights)
        # The cooled part is excluded from the test, because the first part has no data to predict it from.
        tried = cooled < COOLED if curve.schedule.kind == "wsd" else np.ones(len(total), dtype=bool)
        early = tried & (total <= BACKTEST_SHARE * total[tried].max()) if tried.any() else tried
        late = tried & ~early
        if early.sum() < LEAST_POINTS // 2 or not late.any():
            return cls(curve, found, math.nan, "too little of it lies in its first part to try the law on the rest")
        before = fit_laws(total[early], cooled[early], losses[early], weights[early])[0].law
        predicted = before(total[late], cooled[late])
        missed = float(np.average(np.abs(predicted - losses[late]), weights=weights[late] ** 2))
        refusal = ""
        if missed > BACKTEST_NATS:
            refusal = (
                f"the law of its first {BACKTEST_SHARE:.0%} misses the rest by {missed:.2f} nats, and more than "
                f"{BACKTEST_NATS:g} is too much to extrapolate from"
            )
        return cls(curve, found, missed, refusal)

    @cached_property
    def simulated(self) -> list[tuple[LawCoefficients, LawCoefficients]]:
        """Laws that explain the curve, each paired with the law fitted to a curve simulated from it.

        The noise is drawn as moving blocks of the residuals (Künsch 1989).
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
        """Laws fitted to the simulated curves."""
        return [found for _, found in self.simulated]

    def answer(self, target: float) -> Extrapolation:
        """Tokens that reach a target loss in nats per token, with their interval, or why there is no answer."""
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
        """Tokens of the shortest schedule that ends at a loss; infinite if none does."""
        return law.updates(target, self.curve.schedule) * self.curve.tokens_per_step


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else math.inf
