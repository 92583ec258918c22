"""Checkpoints with a completion marker, which is written last; only then are older checkpoints removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmphi.errors import ModelError
from mmphi.training.fsdp import shard_like

MARKER = "complete"
WEIGHTS = "trained.safetensors"
STATE = "state."  # Name prefix of tensors that are not parameters.


class ExtraCheckpointState(Protocol):
    """Checkpoint state other than tensors, such as the position in a text stream."""

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the state into a checkpoint, before it is marked complete."""

    def load(self, checkpoint: Path, step: int) -> None:
        """Restore the state from a checkpoint."""

    def saved(self, checkpoint: Path) -> None:
        """Called when the checkpoint is complete and older ones are removed."""


def step_of(checkpoint: Path) -> int:
    """Returns the optimiser step of a checkpoint, from its folder name ``checkpoint-STEP``."""
    return int(checkpoint.name.rpartition("-")[2])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints that have a marker, oldest first."""
    folders = (p.parent for p in folder.glob(f"checkpoint-*/{MARKER}"))
    return sorted((p for p in folders if p.name.rpartition("-")[2].isdigit()), key=step_of)


def mark_complete(checkpoint: Path) -> None:
    """Flush all files of a checkpoint to disk, then write the marker."""
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (checkpoint / MARKER).touch()
    descriptor = os.open(checkpoint, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints, complete or not, except the newest ``keep`` complete ones."""
    kept = complete_checkpoints(folder)[-keep:]
    for path in folder.glob("checkpoint-*"):
        if path not in kept and path.name.rpartition("-")[2].isdigit():
            shutil.rmtree(path, ignore_errors=True)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the trainable parameters by name; tied ones once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def checkpoint_tensors(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint: trainable parameters and additional state, without frozen weights.

    Args:
        model: The trained module.
        state: Tensors other than parameters that training changes, such as running means.
    """
    return {**trained_state(model), **{f"{STATE}{name}": tensor for name, tensor in (state or {}).items()}}


def save_tensors(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Write the result of :func:`checkpoint_tensors` into a checkpoint."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, checkpoint / WEIGHTS)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load the trained parameters of a checkpoint, without its additional state.

    Args:
        model: Module with a parameter for each one in the checkpoint, frozen or not.
        checkpoint: Checkpoint folder.

    Raises:
        ModelError: If a parameter is missing from the model or has another shape, or the checkpoint has none.
    """
    saved = {name: t for name, t in load_file(checkpoint / WEIGHTS).items() if not name.startswith(STATE)}
    own = dict(model.named_parameters())
    wrong = sorted(saved.keys() - own.keys()) or [n for n, t in saved.items() if t.shape != own[n].shape]
    if wrong or not saved:
        raise ModelError(
            f"{checkpoint} was written by another model: {(wrong or ['everything'])[0]} differs",
            "train again with --force",
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


def load_trained(model: nn.Module, checkpoint: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Restore the trained parameters and the additional state of a checkpoint.

    Raises:
        ModelError: If names or shapes differ from those of this model.
    """
    saved = load_file(checkpoint / WEIGHTS)
    tensors = checkpoint_tensors(model, state)
    wrong = sorted(saved.keys() ^ tensors.keys()) or [n for n, t in saved.items() if t.shape != tensors[n].shape]
    if wrong:
        raise ModelError(f"{checkpoint} was written by another model: {wrong[0]} differs", "start again with --force")
    with torch.no_grad():
        for name, tensor in saved.items():
            tensors[name].copy_(shard_like(tensor, tensors[name]))
