"""Trainer callback of pretraining: losses, speed, milestones, and the end of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmphi.errors import TrainingError
from mmphi.tracking.tracker import Tracker
from mmphi.training.peak_flops import PeakFlops
from mmphi.training.stop_criteria import StopCriteria
from mmphi.training.throughput import StepLoss, Throughput

EVERY_STEP = 200  # Up to this step every loss is recorded; later, means over the logging interval.
RECENT = 3  # Steps of the mean loss that is compared with targets.
INITIAL_TOLERANCE = 0.5  # Maximum distance of the first loss from ln(vocabulary), in nats.
SECONDS, TOKENS, INITIAL, ENDED = range(4)


class PretrainCallback(TrainerCallback):
    """Counts, reports and ends a pretraining; its state is part of every checkpoint.

    A step's loss is that of its batch before the update, so the first one is that of the untrained model.

    Args:
        tracker: The run to record in.
        stop: Stop criteria.
        targets: Losses whose tokens, seconds and steps are recorded when reached, by name.
        step_tokens: Predictions per step.
        vocabulary: Rows of the embedding.
        flops: Returns the training FLOPs of numbers of tokens and attention pairs.
        peak: Peak throughput, the reference of MFU.
        throughput: Token counter of the loop.
        step_loss: Loss accumulator of the loop.

    Attributes:
        state: Tensors for checkpoints.
        reason: Why training ended; empty if it completed all steps.
    """

    def __init__(
        self,
        tracker: Tracker,
        stop: StopCriteria,
        targets: Mapping[str, float],
        *,
        step_tokens: int,
        vocabulary: int,
        flops: Callable[[int, int], float],
        peak: PeakFlops,
        throughput: Throughput,
        step_loss: StepLoss,
    ) -> None:
        self.tracker, self.stop, self.targets = tracker, stop, dict(targets)
        self.step_tokens, self.vocabulary, self.flops, self.peak = step_tokens, vocabulary, flops, peak
        self.throughput, self.step_loss = throughput, step_loss
        self._totals = torch.zeros(4, dtype=torch.float64)
        self._recent = torch.full((RECENT,), math.nan, dtype=torch.float64)
        self._reached = torch.full((len(self.targets) + 1, 3), math.nan, dtype=torch.float64)
        self.state: dict[str, Tensor] = {
            "progress": self._totals,
            "recent": self._recent,
            "reached": self._reached,
        }
        self.reason, self._rate, self._sum, self._count = "", 0.0, 0.0, 0
        self._begun_s = self._logged_s = self._logged_pairs = 0.0

    @property
    def initial(self) -> float:
        """Loss before the first update, in nats per token."""
        return float(self._totals[INITIAL])

    @property
    def ended(self) -> bool:
        """Whether the training is complete; part of every checkpoint."""
        return bool(self._totals[ENDED])

    @property
    def names(self) -> list[str]:
        """Names of the milestones."""
        return ["initial-1", *self.targets]

    def figures(self) -> dict[str, float]:
        """Returns the totals, and tokens, seconds and steps of each milestone reached."""
        found = {"pretrain/initial_loss": self.initial, "pretrain/tokens": float(self._totals[TOKENS])}
        found["pretrain/seconds"] = float(self._totals[SECONDS])
        found["pretrain/supervised_tokens"] = found["pretrain/tokens"]  # Every token is supervised.
        for name, (tokens, seconds, steps) in zip(self.names, self._reached.tolist(), strict=True):
            if not math.isnan(tokens):
                found |= {f"reached/{name}/tokens": tokens, f"reached/{name}/seconds": seconds}
                found[f"reached/{name}/steps"] = steps
        return found

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock where the checkpoint left it."""
        self._begun_s = float(self._totals[SECONDS]) - self.throughput.elapsed_s()
        self._logged_s, self._logged_pairs = float(self._totals[SECONDS]), int(self.throughput.pairs)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Store the learning rate of the coming update."""
        self._rate = float(optimizer.param_groups[-1]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the totals, report, and end the training if a criterion holds."""
        step, loss = state.global_step, self.step_loss.take(args.device)
        if step == 1:
            self._check(loss)
            self._totals[INITIAL] = loss
        self._totals[TOKENS] += self.step_tokens
        self._totals[SECONDS] = self._begun_s + self.throughput.elapsed_s()
        self._recent[(step - 1) % RECENT] = loss
        recent = float(self._recent.nanmean())
        self._note(recent, step)
        self._tell(loss, step, args, state)
        self.reason = self._ended(recent, step, args)
        if self.reason or step >= state.max_steps:
            self._totals[ENDED] = 1
            control.should_training_stop = control.should_save = control.should_evaluate = True

    def _check(self, loss: float) -> None:
        expected = math.log(self.vocabulary)
        if abs(loss - expected) > INITIAL_TOLERANCE:
            raise TrainingError(
                f"the first loss is {loss:.3f} nats; an untrained model has ln {self.vocabulary:,} = {expected:.3f}",
                "check the initial weights and the data; the training was stopped",
            )

    def _ended(self, recent: float, step: int, args: TrainingArguments) -> str:
        seconds, tokens = float(self._totals[SECONDS]), float(self._totals[TOKENS])
        if dist.is_initialized():  # Clocks differ, and all processes must end at the same step.
            clock = torch.tensor(seconds, dtype=torch.float64, device=args.device)
            dist.broadcast(clock, 0)
            seconds = float(clock)
        return self.stop.reason(initial=self.initial, loss=recent, tokens=tokens, steps=step, seconds=seconds)

    def _note(self, recent: float, step: int) -> None:
        """Record milestones that are reached for the first time."""
        limits = [self.initial - 1, *self.targets.values()]
        for i, limit in enumerate(limits):
            if recent <= limit and torch.isnan(self._reached[i, 0]):
                tokens, seconds = float(self._totals[TOKENS]), float(self._totals[SECONDS])
                self._reached[i] = torch.tensor([tokens, seconds, step], dtype=torch.float64)
                self.tracker.say(
                    f"reached {self.names[i]} = {limit:.3f}: {step} updates, {tokens:,.0f} tokens, {seconds:.1f} s"
                )

    def _tell(self, loss: float, step: int, args: TrainingArguments, state: TrainerState) -> None:
        """Print the line of the original run, and record the figures of this step or interval."""
        self._sum, self._count = self._sum + loss, self._count + 1
        due = (step - 1) % args.logging_steps == 0
        if not due and step > EVERY_STEP:
            return
        values = {"train/step_loss": self._sum / self._count, "train/tokens": float(self._totals[TOKENS])}
        if due:
            seconds = float(self._totals[SECONDS]) - self._logged_s
            pairs = (int(self.throughput.pairs) - self._logged_pairs) * args.world_size
            steps = 1 if step == 1 else args.logging_steps
            flops = self.flops(steps * self.step_tokens, int(pairs))
            values["train/mfu"] = flops / max(seconds, 1e-9) / (self.peak.flops * args.world_size)
            values["train/seconds"] = float(self._totals[SECONDS])
            passes = steps * args.gradient_accumulation_steps
            self.tracker.say(
                f"iter {(step - 1) * args.gradient_accumulation_steps} step {step - 1}: loss {loss:.4f}, "
                f"LR: {self._rate:.6f}, iter time: {1000 * seconds / passes:.2f}ms"
            )
            self._logged_s, self._logged_pairs = float(self._totals[SECONDS]), int(self.throughput.pairs)
        self._sum, self._count = 0.0, 0
        self.tracker.metrics(values, step)
        # A resumed training records its log history again.
        state.log_history.append({**values, "step": step})
