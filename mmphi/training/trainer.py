"""Training loop on transformers' Trainer: exact loss, complete checkpoints, exact resume.

A *task* is a module that takes a batch as keyword arguments and returns its summed loss. ``step_tokens`` of a batch is
the divisor of the loss of the whole optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mmphi.config.shared import TrainingSettings
from mmphi.errors import Stopped
from mmphi.tracking.tracker import Tracker
from mmphi.training.best_checkpoint import BestCheckpoint
from mmphi.training.callbacks import EvaluationCallback, GracefulStopCallback, MetricsCallback
from mmphi.training.checkpoints import (
    ExtraCheckpointState,
    complete_checkpoints,
    load_trained,
    prune,
    step_of,
)
from mmphi.training.hf_trainer import ExactLossTrainer
from mmphi.training.throughput import StepLoss, Throughput
from mmphi.training.training_args import make_optimizer, training_arguments, world_rank


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training.

    Attributes:
        steps: Optimiser steps in total.
        result_step: Step of the resulting weights: that of the best validation if those are loaded, else the last one.
        figures: Figures of that validation; empty if the last weights are the result.
    """

    steps: int
    result_step: int
    figures: Mapping[str, float]


def _only(batch: list[Any]) -> Any:
    """Unwrap a batch: items of the dataset are whole batches."""
    return batch[0]


def train(
    task: nn.Module,
    steps: Dataset[Any],
    settings: TrainingSettings,
    *,
    folder: Path,
    tracker: Tracker,
    title: str,
    validate: Callable[[int], Mapping[str, float]] | None = None,
    state: Mapping[str, Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    epsilon: float = 1e-8,
    callbacks: Sequence[TrainerCallback] = (),
    throughput: Throughput | None = None,
    step_loss: StepLoss | None = None,
    ended: Callable[[], bool] = lambda: False,
    extra_state: ExtraCheckpointState | None = None,
    keep_best: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Train the parameters of ``task`` that require gradients.

    Args:
        task: Takes a batch as keyword arguments and returns its summed loss; frozen parts have ``requires_grad`` off.
        steps: Batches by index; each step has ``accumulation * processes`` consecutive ones.
        settings: Steps, batch, learning rate, ...
        folder: Where checkpoints go; a complete one found there is resumed from.
        tracker: The run to record in.
        title: Label of the progress bar.
        validate: Maps the step to metrics named ``val/...``.
        state: Tensors beyond parameters and optimiser that training changes in place; part of every checkpoint.
        optimizer: Optimiser to use instead of the one in the settings.
        epsilon: Epsilon of AdamW.
        callbacks: Additional callbacks of transformers' Trainer.
        throughput: Token counter, if the caller reads it as well.
        step_loss: Loss accumulator, if the caller reads it.
        ended: Called after ``state`` is restored from a checkpoint; returns whether that training was complete.
        extra_state: Checkpoint state other than tensors.
        keep_best: Whether the result is the weights of the best validation instead of the last ones. They are saved
            below ``folder`` until :func:`mmphi.training.best_checkpoint.remove_kept`.
        progress: Whether a progress bar is shown.

    Raises:
        TrainingError: If the loss stops being finite.
        Stopped: If a signal requested the stop; a checkpoint is written first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = complete_checkpoints(folder)
    if world_rank() == 0:
        prune(folder, settings.keep_checkpoints)
    throughput = throughput or Throughput()
    if done:
        load_trained(task, done[-1], state)
        if ended():
            return TrainingResult(step_of(done[-1]), step_of(done[-1]), {})
        if extra_state is not None:
            extra_state.load(done[-1], step_of(done[-1]))
    best = BestCheckpoint(folder, task, state) if keep_best else None
    with GracefulStopCallback() as stop:
        loop = ExactLossTrainer(
            task,
            state=state or {},
            settings=settings,
            tracker=tracker,
            throughput=throughput,
            step_loss=step_loss or StepLoss(),
            validate=validate,
            extra_state=extra_state,
            best=best,
            args=training_arguments(settings, folder, epsilon),
            train_dataset=steps,
            data_collator=_only,
            optimizers=(optimizer or make_optimizer(task, settings), None),
            callbacks=[
                MetricsCallback(tracker, title, throughput, progress),
                EvaluationCallback(settings.eval_every),
                stop,
                *callbacks,
            ],
        )
        for default in (PrinterCallback, ProgressCallback):
            loop.remove_callback(default)
        if done:
            tracker.say(f"{title}: resuming from step {step_of(done[-1])}")
        try:
            loop.train(resume_from_checkpoint=str(done[-1]) if done else None)
            loop.finite.look()
        finally:
            loop.callback_handler.call_event("on_train_end", loop.args, loop.state, loop.control)
    if stop.stopped:
        raise Stopped(f"stopped after step {loop.state.global_step}; the same command resumes from there")
    taken = loop.state.global_step
    if best is None or best.step < 0 or world_rank() != 0:
        return TrainingResult(taken, taken, {})
    best.take()
    tracker.say(f"{title}: using the weights of step {best.step}, which have the lowest validation loss")
    return TrainingResult(taken, best.step, best.figures)
