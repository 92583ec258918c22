"""Training of any part of a packed model on transformers' Trainer: exact loss, complete checkpoints, exact resume."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from mmphi.data.packing import PackedSteps
from mmphi.data.sequences import Sample
from mmphi.errors import Stopped, TrainingError
from mmphi.models.multimodal import PackedModel
from mmphi.settings import TrainingSettings
from mmphi.stage import Tracker
from mmphi.training.callbacks import EvaluateEvery, Monitor, StopWhenAsked, Throughput
from mmphi.training.checkpoints import complete_checkpoints, load_trained, mark_complete, prune, save_trained, step_of

if TYPE_CHECKING:
    from mmphi.data.features import ImageFeatures

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class PackedTrainer(Trainer):
    """transformers' Trainer for packs, one pack a batch.

    Args:
        throughput: Counts the tokens that passed.
        validate: Returns metrics named ``val/...``; called on the main process at each evaluation.
        keep_checkpoints: Complete checkpoints kept.
        **kwargs: The Trainer's own.
    """

    def __init__(
        self,
        *,
        throughput: Throughput,
        validate: Callable[[int], Mapping[str, float]] | None,
        keep_checkpoints: int,
        **kwargs: Any,
    ) -> None:
        # A loss function that is given tells the Trainer that the loss is normalised over the accumulated batch.
        super().__init__(compute_loss_func=lambda outputs, *_, **__: outputs, **kwargs)
        self.throughput, self.validate, self.keep_checkpoints = throughput, validate, keep_checkpoints
        self.folder = Path(self.args.output_dir)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """This pack's share of the step's loss per supervised token, in nats.

        The summed loss is divided by the supervised tokens of the whole step over all passes and processes; times the
        processes, because DDP averages their gradients.

        Raises:
            TrainingError: If the loss is not finite; the pack is saved first.
        """
        self.throughput.tokens += inputs["input_ids"].numel()
        loss: Tensor = model(**inputs) * (self.args.world_size / inputs["step_tokens"])
        if not torch.isfinite(loss):
            where = self.folder / "bad_batch.safetensors"
            save_file({name: t.detach().cpu().contiguous() for name, t in inputs.items()}, where)
            raise TrainingError(
                f"the loss at step {self.state.global_step + 1} is {loss.item()}; the batch is saved as {where}",
                "a lower learning rate, a longer warm-up or fp32 usually mends this",
            )
        return (loss, loss) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Run the validation given, and log what it returns."""
        if self.validate is None or not self.is_world_process_zero():
            return {}
        model: nn.Module = self.model
        training = model.training
        model.eval()
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

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_trained(self.accelerator.unwrap_model(self.model), Path(output_dir or self.folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(self.folder / f"checkpoint-{self.state.global_step}")
            prune(self.folder, self.keep_checkpoints)
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


def world_size() -> int:
    """Processes that train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _arguments(settings: TrainingSettings, folder: Path, seed: int) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16,
        seed=seed,
        use_cpu=not cuda,
        ddp_backend=None if cuda or world_size() == 1 else "gloo",
        ddp_find_unused_parameters=False,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
    )


def _only(batch: list[Any]) -> Any:
    """The pack of a batch of one."""
    return batch[0]


def train(
    model: PackedModel,
    samples: Sequence[Sample],
    features: ImageFeatures | None,
    settings: TrainingSettings,
    *,
    seed: int,
    folder: Path,
    tracker: Tracker,
    title: str,
    validate: Callable[[int], Mapping[str, float]] | None = None,
) -> Trained:
    """Train whatever in ``model`` requires gradients.

    Args:
        model: Its frozen parts have ``requires_grad`` off.
        samples: What to train on.
        features: Where image features come from.
        settings: Steps, batch, learning rate, ...
        seed: Seed of the data order.
        folder: Where checkpoints go; a complete one found there is resumed from.
        tracker: The run to record in.
        title: What stands before the progress bar.
        validate: Given the step, returns metrics named ``val/...``.

    Raises:
        TrainingError: If the loss stops being finite.
        Stopped: If a signal asked to stop; a checkpoint was written first.
    """
    steps: Dataset[Any] = PackedSteps(
        samples,
        features,
        steps=settings.steps,
        batch_size=settings.batch_size,
        packs_per_step=settings.accumulation * world_size(),
        seed=seed,
    )
    folder.mkdir(parents=True, exist_ok=True)
    if settings.gradient_checkpointing:
        model.recompute_activations()
    found = complete_checkpoints(folder)
    prune(folder, settings.keep_checkpoints)
    throughput = Throughput()
    with StopWhenAsked() as stop:
        trainer = PackedTrainer(
            throughput=throughput,
            validate=validate,
            keep_checkpoints=settings.keep_checkpoints,
            model=model,
            args=_arguments(settings, folder, seed),
            train_dataset=steps,
            data_collator=_only,
            callbacks=[Monitor(tracker, title, throughput), EvaluateEvery(settings.eval_every), stop],
        )
        for default in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(default)
        if found:
            tracker.say(f"{title}: going on from step {step_of(found[-1])}")
        try:
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
        finally:
            trainer.callback_handler.call_event("on_train_end", trainer.args, trainer.state, trainer.control)
    if stop.stopped:
        raise Stopped(f"stopped after step {trainer.state.global_step}; the same command goes on from there")
    return Trained(trainer.state.global_step, step_of(found[-1]) if found else 0)
