"""transformers' Trainer for tasks that return a summed loss, with checkpoints that have a completion marker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from mmphi.config.shared import TrainingSettings
from mmphi.tracking.tracker import Tracker
from mmphi.training.best_checkpoint import BestCheckpoint
from mmphi.training.checkpoints import (
    ExtraCheckpointState,
    checkpoint_tensors,
    load_trained,
    mark_complete,
    prune,
    save_tensors,
)
from mmphi.training.fsdp import gather_full, is_sharded, load_sharded
from mmphi.training.nan_guard import FiniteLoss
from mmphi.training.throughput import StepLoss, Throughput


class TaskWrapper(nn.Module):
    """Wraps a task, so that accelerate patches the wrapper and not the task."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, **batch: Any) -> Tensor:
        """The task's summed loss, shape ()."""
        loss: Tensor = self.task(**batch)
        return loss


class ExactLossTrainer(Trainer):
    """transformers' Trainer for tasks, with one item of the dataset per forward pass.

    Args:
        task: Module to train.
        state: Tensors other than parameters that training changes; part of every checkpoint.
        settings: Training settings.
        tracker: The run to record in.
        throughput: Token counter.
        step_loss: Accumulator of each step's loss.
        extra_state: Checkpoint state other than tensors.
        best: Keeps the weights of the best validation.
        validate: Returns metrics named ``val/...``; called on the main process at each evaluation, or on all processes
            if the task's parameters are sharded.
        **kwargs: Arguments of transformers' Trainer.
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
        extra_state: ExtraCheckpointState | None = None,
        best: BestCheckpoint | None = None,
        **kwargs: Any,
    ) -> None:
        # With a loss function, the Trainer takes the loss as normalised over the accumulated batch.
        super().__init__(model=TaskWrapper(task), compute_loss_func=lambda outputs, *_, **__: outputs, **kwargs)
        self.task, self.state_tensors, self.settings, self.tracker = task, state, settings, tracker
        self.throughput, self.step_loss, self.validate = throughput, step_loss, validate
        self.extra_state, self.best = extra_state, best
        self.sharded = is_sharded(task)
        if self.sharded:  # FSDP2 averages the gradients: accelerate must not wrap the task in DDP.
            prepare: Any = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)
        self.folder = Path(self.args.output_dir)
        self.finite = FiniteLoss(self.folder)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """This batch's share of the step's loss per supervised token, in nats.

        The summed loss is divided by the supervised tokens of the whole step over all passes and processes, and
        multiplied by the number of processes, because DDP averages their gradients.

        Raises:
            TrainingError: If the loss (on an accelerator, that of the previous pass) is not finite; its batch is saved
                first.
        """
        self.throughput.count(inputs)
        loss: Tensor = model(**inputs) * (self.args.world_size / inputs["step_tokens"])
        self.finite.note(self.state.global_step + 1, loss, inputs)
        self.step_loss.add(loss.detach() / self.args.world_size)
        return (loss, loss) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Run ``validate`` and log its metrics."""
        self.control.should_evaluate = False  # Else the end of the epoch evaluates the last step again.
        self.finite.look()
        if self.validate is None or not (self.is_world_process_zero() or self.sharded):
            return {}
        model: nn.Module = self.model
        training = model.training
        model.eval()
        with self.throughput.paused():
            metrics = dict(self.validate(self.state.global_step))
        model.train(training)
        if self.best is not None:
            self.best.offer(self.state.global_step, metrics)
        self.log(dict(metrics))
        return metrics

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the names of parameters with weight decay: all but vectors, scalars and embeddings."""
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return [n for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in embeddings]

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # The dataset defines the order.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors; sharded parameters are gathered first."""
        tensors = gather_full(checkpoint_tensors(self.task, self.state_tensors))  # Collective: called by all processes.
        if self.args.should_save:
            save_tensors(tensors, Path(output_dir or self.folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_full(self.optimizer.state_dict())
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
        self.finite.look()  # Before the weights could replace an older checkpoint.
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
            if self.extra_state is not None:
                self.extra_state.save(checkpoint, self.state.global_step)
            mark_complete(checkpoint)
            if self.settings.share_checkpoints:
                self.tracker.checkpoint(checkpoint)
            prune(self.folder, self.settings.keep_checkpoints)
            if self.extra_state is not None:
                self.extra_state.saved(checkpoint)
        self.accelerator.wait_for_everyone()
