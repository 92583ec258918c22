"""Trainer callbacks: progress bar and metrics, graceful stop, validation interval, and the table of losses."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmphi.tracking.tracker import Tracker
from mmphi.training.throughput import Throughput, peak_memory_bytes, reset_peak_memory


class MetricsCallback(TrainerCallback):
    """Shows a progress bar and records metrics; on the main process only.

    Args:
        tracker: The run to record in.
        title: Label of the bar.
        throughput: Token counter, updated by the trainer.
        progress: Whether the bar is shown.
    """

    NAMES: Mapping[str, str] = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/lr"}

    def __init__(self, tracker: Tracker, title: str, throughput: Throughput, progress: bool = True) -> None:
        self.tracker, self.title, self.throughput, self.progress = tracker, title, throughput, progress
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar; record the log history again, because a resumed training has a new run."""
        reset_peak_memory()
        self.throughput.start()
        if not state.is_world_process_zero:
            return
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            unit="step",
            leave=True,
            disable=not self.progress,
        )
        for entry in state.log_history:
            self._record({k: v for k, v in entry.items() if isinstance(v, int | float)}, int(entry["step"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record what the trainer logs."""
        if self.bar is None or not logs or "train_runtime" in logs:
            return
        values = dict(logs)
        if "loss" in logs:
            rate = self.throughput.read() * args.world_size
            if rate:
                values["train/tokens_per_s"] = rate
            values["train/memory_gb"] = peak_memory_bytes() / 1e9
        self._record(values, state.global_step)

    def _record(self, values: Mapping[str, float], step: int) -> None:
        named = {self.NAMES.get(k, k): float(v) for k, v in values.items() if "/" in k or k in self.NAMES}
        self.tracker.metrics(named, step)
        for name, label in (("train/loss", "loss"), ("val/loss", "val"), ("train/tokens_per_s", "tok/s")):
            if name in named:
                self.shown[label] = f"{named[name]:.0f}" if label == "tok/s" else f"{named[name]:.3f}"
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class GracefulStopCallback(TrainerCallback):
    """On SIGTERM or Ctrl-C finishes the step, saves and stops; a second Ctrl-C stops at once.

    Used as a context manager around training; the previous signal handlers are restored on exit.

    Attributes:
        stopped: Whether a signal ended the training.
    """

    def __init__(self) -> None:
        self.stop_requested = self.stopped = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStopCallback:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # Only the main thread may set handlers; elsewhere the caller's own apply.
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this step if any process received a signal; all processes stop at the same step."""
        stop_requested = self.stop_requested
        if args.world_size > 1:
            flag = torch.tensor(int(stop_requested), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            stop_requested = bool(flag.item())
        if stop_requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True


class EvaluationCallback(TrainerCallback):
    """Requests a validation every ``steps`` steps, and after the last one."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a validation at multiples of the interval and at the last step."""
        if state.global_step % self.steps == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True


class StepTableCallback(TrainerCallback):
    """Keeps the training loss of every logged step, as transformers' own table shows it.

    Attributes:
        rows: Step and training loss, one row per logged step; filled at the end of training.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the rows from the log history, which includes the steps before an interruption."""
        self.rows = [
            {"step": int(entry["step"]), "training loss": float(entry["loss"])}
            for entry in state.log_history
            if "loss" in entry
        ]

    def picture(self) -> Any:
        """Returns a matplotlib figure of the training loss over steps."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([row["step"] for row in self.rows], [row["training loss"] for row in self.rows])
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats/token")
        axes.grid(alpha=0.3)
        return figure
