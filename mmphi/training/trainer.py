"""The one loop, on transformers' Trainer: exact loss, complete checkpoints, exact resume.

What is trained is a *task*: a module that takes a batch by name and gives its summed loss. A batch also says by
``step_tokens`` what the loss of the whole optimiser step is divided by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from mmphi.errors import Stopped, TrainingError
from mmphi.settings.shared import TrainingSettings
from mmphi.tracking.tracker import Tracker
from mmphi.training.arguments import arguments_of, optimizer_of, world_rank
from mmphi.training.callbacks import EvaluateEvery, Monitor, StopWhenAsked
from mmphi.training.checkpoints import (
    Beside,
    checkpoint_tensors,
    complete_checkpoints,
    load_trained,
    mark_complete,
    prune,
    save_tensors,
    step_of,
)
from mmphi.training.meters import StepLoss, Throughput
from mmphi.training.sharding import is_sharded, load_sharded, whole


class Borrowed(nn.Module):
    """Holds a task, so that what accelerate wraps and patches is this, and the task stays as it was."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, **batch: Any) -> Tensor:
        """The task's summed loss, shape ()."""
        loss: Tensor = self.task(**batch)
        return loss


class Loop(Trainer):
    """transformers' Trainer for tasks, one batch of the dataset a forward pass.

    Args:
        task: What is trained.
        state: Tensors beyond its parameters that training changes; part of every checkpoint.
        settings: Of the training.
        tracker: The run to record in.
        throughput: Counts the tokens that passed.
        step_loss: Adds up the loss of each step.
        beside: What else belongs to a checkpoint.
        validate: Returns metrics named ``val/...``; called on the main process at each evaluation, on all of them where
            the task's parameters are spread over them.
        **kwargs: The Trainer's own.
    """

    def __init__(
        self,
        task: nn.Module,
        *,
        state: Mapping[str, Tensor],
        settings: TrainingSettings,
        tracker: Tracker,
        throughput: Throughput,
        step_loss: StepLoss,
        validate: Callable[[int], Mapping[str, float]] | None,
        beside: Beside | None = None,
        **kwargs: Any,
    ) -> None:
        # A loss function that is given tells the Trainer that the loss is normalised over the accumulated batch.
        super().__init__(model=Borrowed(task), compute_loss_func=lambda outputs, *_, **__: outputs, **kwargs)
        self.task, self.state_tensors, self.settings, self.tracker = task, state, settings, tracker
        self.throughput, self.step_loss, self.validate = throughput, step_loss, validate
        self.beside = beside
        self.sharded = is_sharded(task)
        if self.sharded:  # Spread parameters average their own gradients: accelerate must not wrap them in DDP.
            prepare: Any = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)
        self.folder = Path(self.args.output_dir)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """This batch's share of the step's loss per supervised token, in nats.

        The summed loss is divided by the supervised tokens of the whole step over all passes and processes; times the
        processes, because DDP averages their gradients.

        Raises:
            TrainingError: If the loss is not finite; the batch is saved first.
        """
        if "segments" in inputs:
            self.throughput.tokens += int((inputs["segments"] >= 0).sum())
        if "borders" in inputs:
            lengths = inputs["borders"].diff().long()
            self.throughput.pairs += int((lengths * (lengths + 1) // 2).sum())
        loss: Tensor = model(**inputs) * (self.args.world_size / inputs["step_tokens"])
        if not torch.isfinite(loss):
            where = self.folder / "bad_batch.safetensors"
            save_file(dict(_flat(inputs)), where)
            raise TrainingError(
                f"the loss at step {self.state.global_step + 1} is {loss.item()}; the batch is saved as {where}",
                "a lower learning rate, a longer warm-up or fp32 usually mends this",
            )
        self.step_loss.add(loss.item() / self.args.world_size)
        return (loss, loss) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Run the validation given, and log what it returns."""
        if self.validate is None or not (self.is_world_process_zero() or self.sharded):
            return {}
        model: nn.Module = self.model
        training = model.training
        model.eval()
        with self.throughput.paused():
            metrics = dict(self.validate(self.state.global_step))
        model.train(training)
        self.log(dict(metrics))
        return metrics

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for matrices: it spares norms, biases and embeddings."""
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return [n for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in embeddings]

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # The order is the dataset's own matter.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; parameters that are spread over processes are put together first."""
        tensors = whole(checkpoint_tensors(self.task, self.state_tensors))  # By all processes.
        if self.args.should_save:
            save_tensors(tensors, Path(output_dir or self.folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        load_sharded(self.optimizer, state, [p for g in self.optimizer.param_groups for p in g["params"]])
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.task, Path(resume_from_checkpoint), self.state_tensors)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.throughput.paused():
            self._save_whole(model, trial)

    def _save_whole(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
            if self.beside is not None:
                self.beside.save(checkpoint, self.state.global_step)
            mark_complete(checkpoint)
            if self.settings.share_checkpoints:
                self.tracker.checkpoint(checkpoint)
            prune(self.folder, self.settings.keep_checkpoints)
            if self.beside is not None:
                self.beside.saved(checkpoint)
        self.accelerator.wait_for_everyone()


@dataclass(frozen=True)
class Trained:
    """How a training ended.

    Attributes:
        steps: Optimiser steps done in all.
        resumed_from: Step it went on from; 0 where it began anew.
    """

    steps: int
    resumed_from: int


def _flat(batch: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in batch.items():
        if isinstance(value, Tensor):
            yield prefix + name, value.detach().cpu().contiguous()
        else:
            yield from _flat(value, f"{prefix}{name}.")


def _only(batch: list[Any]) -> Any:
    """The batch that the dataset gives is whole already."""
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
    beside: Beside | None = None,
) -> Trained:
    """Train whatever in ``task`` requires gradients.

    Args:
        task: Takes a batch by name and gives its summed loss; its frozen parts have ``requires_grad`` off.
        steps: Batches by index: those of step k are ``accumulation * processes`` of them, one after the other.
        settings: Steps, batch, learning rate, ...
        folder: Where checkpoints go; a complete one found there is resumed from.
        tracker: The run to record in.
        title: What stands before the progress bar.
        validate: Given the step, returns metrics named ``val/...``.
        state: Tensors beyond parameters and optimiser that training changes in place; part of every checkpoint.
        optimizer: In place of the one that the settings name.
        epsilon: AdamW's.
        callbacks: Called beside the loop.
        throughput: Counts tokens, where somebody else reads it too.
        step_loss: Adds up the loss of each step, where somebody reads it.
        ended: Asked after ``state`` was put back from a checkpoint: whether that training had come to its end.
        beside: What else belongs to a checkpoint.

    Raises:
        TrainingError: If the loss stops being finite.
        Stopped: If a signal asked to stop; a checkpoint was written first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = complete_checkpoints(folder)
    if world_rank() == 0:
        prune(folder, settings.keep_checkpoints)
    throughput = throughput or Throughput()
    if done:
        load_trained(task, done[-1], state)
        if ended():
            return Trained(step_of(done[-1]), step_of(done[-1]))
        if beside is not None:
            beside.load(done[-1], step_of(done[-1]))
    with StopWhenAsked() as stop:
        loop = Loop(
            task,
            state=state or {},
            settings=settings,
            tracker=tracker,
            throughput=throughput,
            step_loss=step_loss or StepLoss(),
            validate=validate,
            beside=beside,
            args=arguments_of(settings, folder, epsilon),
            train_dataset=steps,
            data_collator=_only,
            optimizers=(optimizer or optimizer_of(task, settings), None),
            callbacks=[Monitor(tracker, title, throughput), EvaluateEvery(settings.eval_every), stop, *callbacks],
        )
        for default in (PrinterCallback, ProgressCallback):
            loop.remove_callback(default)
        if done:
            tracker.say(f"{title}: going on from step {step_of(done[-1])}")
        try:
            loop.train(resume_from_checkpoint=str(done[-1]) if done else None)
        finally:
            loop.callback_handler.call_event("on_train_end", loop.args, loop.state, loop.control)
    if stop.stopped:
        raise Stopped(f"stopped after step {loop.state.global_step}; the same command goes on from there")
    return Trained(loop.state.global_step, step_of(done[-1]) if done else 0)
