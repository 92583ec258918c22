"""transformers' Trainer as tasks need it: a loss that is summed, checkpoints that are complete or do not count."""

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
    """Holds a task, so that what accelerate wraps and patches is this, and the task stays as it was."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, **batch: Any) -> Tensor:
        """The task's summed loss, shape ()."""
        loss: Tensor = self.task(**batch)
        return loss


class ExactLossTrainer(Trainer):
    """transformers' Trainer for tasks, one batch of the dataset a forward pass.

    Args:
        task: What is trained.
        state: Tensors beyond its parameters that training changes; part of every checkpoint.
        settings: Of the training.
        tracker: The run to record in.
        throughput: Counts the tokens that passed.
        step_loss: Adds up the loss of each step.
        beside: What else belongs to a checkpoint.
        best: Keeps the weights of the best validation.
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
        beside: ExtraCheckpointState | None = None,
        best: BestCheckpoint | None = None,
        **kwargs: Any,
    ) -> None:
        # A loss function that is given tells the Trainer that the loss is normalised over the accumulated batch.
        super().__init__(model=TaskWrapper(task), compute_loss_func=lambda outputs, *_, **__: outputs, **kwargs)
        self.task, self.state_tensors, self.settings, self.tracker = task, state, settings, tracker
        self.throughput, self.step_loss, self.validate = throughput, step_loss, validate
        self.beside, self.best = beside, best
        self.sharded = is_sharded(task)
        if self.sharded:  # Spread parameters average their own gradients: accelerate must not wrap them in DDP.
            prepare: Any = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)
        self.folder = Path(self.args.output_dir)
        self.finite = FiniteLoss(self.folder)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """This batch's share of the step's loss per supervised token, in nats.

        The summed loss is divided by the supervised tokens of the whole step over all passes and processes; times the
        processes, because DDP averages their gradients.

        Raises:
            TrainingError: If the loss, or on an accelerator that of the pass before, is not finite; its batch is saved
                first.
        """
        self.throughput.count(inputs)
        loss: Tensor = model(**inputs) * (self.args.world_size / inputs["step_tokens"])
        self.finite.note(self.state.global_step + 1, loss, inputs)
        self.step_loss.add(loss.detach() / self.args.world_size)
        return (loss, loss) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Run the validation given, and log what it returns."""
        self.control.should_evaluate = False  # Else the end of the epoch asks for the last step's once more.
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
        """Weight decay is for matrices: it spares norms, biases and embeddings."""
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return [n for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in embeddings]

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # The order is the dataset's own matter.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; parameters that are spread over processes are put together first."""
        tensors = gather_full(checkpoint_tensors(self.task, self.state_tensors))  # By all processes.
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
        self.finite.look()  # Before what it made of the weights takes an older checkpoint's place.
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
