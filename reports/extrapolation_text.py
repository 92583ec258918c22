"""Text and tables about the distance to a reference: the loss reached, and the extrapolated cost of the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from reports.pretraining_query import Pretraining
from reports.references import Reference, phi2_budget, prices
from reports.render import ReportTable
from reports.scaling import Extrapolation, Outlook

ASSUMED_MFU = 0.4  # For the accelerators of the price list; llm-foundry's tables have 0.44 for 3B on H100.
YEAR_S = 365.25 * 24 * 3600


@dataclass(frozen=True)
class ReferenceDistance:
    """Distance of a pretraining to a reference.

    Attributes:
        run: The pretraining.
        reference: Reference that it is compared with.
        outlook: Law of its training loss curve.
    """

    run: Pretraining
    reference: Reference
    outlook: Outlook

    @property
    def loss(self) -> float:
        """Loss on the reference's text in nats per token; the last training loss if that text was not scored."""
        if self.comparable:
            return self.run.metrics["public/loss"]
        return self.run.losses[-1][1] if self.run.losses else math.nan

    @property
    def comparable(self) -> bool:
        """Whether the run was scored on the reference's text."""
        return self.run.scored_on(self.reference.text)

    @property
    def gap(self) -> float:
        """Loss on the reference's text minus training loss (mean of the last 20), in nats; 0 if it was not scored."""
        recent = [loss for _, loss in self.run.losses[-20:]]
        return self.loss - sum(recent) / len(recent) if recent and self.comparable else 0.0

    def targets(self) -> dict[str, float]:
        """Target losses on the reference's text in nats per token, by name."""
        return {"reference + 1": self.reference.loss + 1, "the reference": self.reference.loss}

    def answers(self) -> dict[str, Extrapolation]:
        """Extrapolation for each target, by name; the law is that of the training loss, shifted by the gap."""
        return {name: self.outlook.answer(target - self.gap) for name, target in self.targets().items()}

    def verdict(self) -> str:
        """First sentences of the report: loss reached, first milestone, and remaining training."""
        run, to = self.run, self.reference
        name = run.title[0].upper() + run.title[1:]
        if self.comparable:
            there = f"**{name} reached {self.loss:.3f} nats/token on {to.text}; {to.model} has {to.loss:.3f}.**"
        else:
            there = f"**{name} was not scored on {to.text}, where {to.model} has {to.loss:.3f} nats/token; its own"
            there += f" training loss ended at {self.loss:.3f}.**"
        first = run.reached("initial-1")
        if first:
            tokens, seconds, updates = first
            took = f"{tokens:,.0f} tokens, {seconds:.1f} s and {updates:.0f} updates"
            began = f"`initial - 1` ({run.initial:.3f} - 1) after {took}"
        else:
            began = f"`initial - 1` ({run.initial:.3f} - 1) was not reached"
        return f"{there} {began}. How much more: {self.more()}"

    def more(self) -> str:
        """Remaining training until the reference loss, or why it cannot be extrapolated."""
        answer = self.answers()["the reference"]
        if self.comparable and self.loss <= self.reference.loss:
            return "none."
        if answer.refusal:
            return f"no extrapolation: {answer.refusal}."
        extra = max(0.0, answer.tokens - self.run.tokens)
        return f"{extra:,.0f} tokens more ({answer.low:,.0f} to {answer.high:,.0f} in all, 95 %)."

    def table(self) -> ReportTable:
        """Table of the tokens, time and money that each target takes."""
        rows = []
        for name, answer in self.answers().items():
            target = self.targets()[name]
            if self.comparable and self.loss <= target:
                rows.append([f"{name} ({target:.3f})", "reached", "-", "-", "-"])
            elif answer.refusal:
                rows.append([f"{name} ({target:.3f})", f"is not known: {answer.refusal}", "-", "-", "-"])
            else:
                rows.append([f"{name} ({target:.3f})", *self._costs(answer)])
        return ReportTable(
            ["loss to reach", "tokens in all (95 %)", "hours on this machine", "GPU-hours", "dollars"], rows
        )

    def _costs(self, answer: Extrapolation) -> list[str]:
        per_token = self.run.metrics.get("pretrain/flops_per_token", math.nan)
        amounts = (answer.tokens, answer.low, answer.high)
        hours = [tokens / self.run.tokens_per_s / 3600 for tokens in amounts]
        gpu_hours, dollars = [], []
        for name, each in prices()["accelerators"].items():
            spent = [t * per_token / (each["bf16_tflops"] * 1e12 * ASSUMED_MFU) / 3600 for t in amounts]
            gpu_hours.append(f"{name}: {_between(spent)}")
            dollars.append(f"{name}: {_between([s * each['dollars_per_hour'] for s in spent])}")
        return [_between(list(amounts)), _between(hours), "; ".join(gpu_hours), "; ".join(dollars)]

    def phi2(self) -> str:
        """Time that Phi-2's training budget takes at this run's speed."""
        budget, run = phi2_budget(), self.run
        per_token = run.metrics.get("pretrain/flops_per_token", math.nan)
        speed = run.tokens_per_s * per_token
        text = (
            f"Phi-2 was trained on {budget['tokens']:.3g} tokens with {budget['flops']:.3g} FLOPs"
            f" ({budget['gpus']} for {budget['days']} days; {budget['source']})."
        )
        if math.isnan(speed):
            return text
        years = budget["flops"] / speed / YEAR_S
        tokens_years = budget["tokens"] / run.tokens_per_s / YEAR_S
        return (
            f"{text} At the {speed / 1e9:,.4g} GFLOP/s that this run was measured at, as many FLOPs take {years:,.3g}"
            f" years; as many tokens through a model of this run's size, at its {run.tokens_per_s:,.0f} tokens/s,"
            f" {tokens_years:,.3g} years."
        )

    def notes(self) -> Iterator[str]:
        """Notes on how the figures were obtained and what limits them."""
        if self.outlook.law is not None:
            law = self.outlook.law
            missed = (
                ""
                if math.isnan(self.outlook.backtest)
                else f"; fitted to the first 60 % of it, the law misses the rest by {self.outlook.backtest:.3f} nats"
            )
            cold = ""
            if (law.cooled_floor, law.cooled_scale) != (law.floor, law.scale):
                kind = "whatever the length" if law.kind == "fixed" else "as a share of the reducible loss"
                cold = (
                    f", and {law.cooled_floor:.3g} + {law.cooled_scale:.3g} S^-{law.exponent:.3g} cooled down ({kind})"
                )
            yield (
                f"The law of this run's own curve: {law.floor:.3g} + {law.scale:.3g} S^-{law.exponent:.3g} nats at the"
                f" peak of the learning rate{cold}, S the sum of the learning rates as shares of the peak{missed}."
            )
        if not self.comparable:
            yield f"The law is that of the training loss; {self.reference.text} was not scored, and may be harder."
        elif self.gap:
            yield (
                f"The law is that of the training loss; {self.reference.text} lies {self.gap:.2f} nats above it at the"
                " end of this run, and this gap is assumed to be constant."
            )
        epochs = self.run.tokens / self.run.metrics.get("pretrain/corpus_tokens", math.nan)
        if epochs > 0:
            yield f"The training took {epochs:.2g} epochs; a law fitted to one or two does not hold for many."
        paid = prices()
        yield (
            f"GPU-hours at {ASSUMED_MFU:.0%} of the bf16 peak; prices of {paid['as_of']}: {paid['source']}"
            " (`reports/reference/prices.yaml`)."
        )


def _between(amounts: list[float]) -> str:
    middle, low, high = (f"{a:,.0f}" if a >= 100 else f"{a:.3g}" for a in amounts)
    return f"{middle} ({low} to {high})"
