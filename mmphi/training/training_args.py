"""Arguments and optimiser of transformers' Trainer."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from mmphi.config.shared import TrainingSettings
from mmphi.training.optimizers import MuonAdamW

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}


def world_rank() -> int:
    """Returns the rank of this process among those that train together."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of processes that train together, as set by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_arguments(settings: TrainingSettings, folder: Path, epsilon: float) -> TrainingArguments:
    """Returns the Trainer's arguments, with its own evaluation, reports and progress bar turned off."""
    cuda = torch.cuda.is_available()
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.lr_scheduler],
        lr_scheduler_kwargs=(
            {"num_decay_steps": round(settings.decay * settings.steps), "decay_type": "1-sqrt"}
            if settings.lr_scheduler == "wsd"
            else {}
        ),
        warmup_steps=round(settings.warmup_ratio * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16,
        adam_epsilon=epsilon,
        seed=settings.seed,
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
        accelerator_config={"non_blocking": cuda},  # Copies from pinned memory overlap with computation.
        dataloader_num_workers=settings.workers,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # One device per process; the Trainer would take all.
    return arguments


def make_optimizer(task: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer | None:
    """Returns Muon with AdamW if the settings select it; ``None`` selects the Trainer's own AdamW."""
    if settings.optimizer == "adamw":
        return None
    return MuonAdamW(
        task,
        learning_rate=settings.learning_rate,
        muon_learning_rate=settings.muon_learning_rate,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
    )
