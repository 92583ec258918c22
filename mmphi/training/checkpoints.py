"""Checkpoints that are complete or do not count: a marker file is written last, and only then do older ones go."""

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
STATE = "state."  # Before the names of what is no parameter.


class ExtraCheckpointState(Protocol):
    """What else belongs to a checkpoint than tensors: where a stream of text was."""

    def save(self, checkpoint: Path, step: int) -> None:
        """Write it into a checkpoint, before that counts as complete."""

    def load(self, checkpoint: Path, step: int) -> None:
        """Put it back."""

    def saved(self, checkpoint: Path) -> None:
        """The checkpoint is complete, and older ones are gone."""


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done when a checkpoint was written; its folder is called ``checkpoint-STEP``."""
    return int(checkpoint.name.rpartition("-")[2])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with their marker, oldest first."""
    folders = (p.parent for p in folder.glob(f"checkpoint-*/{MARKER}"))
    return sorted((p for p in folders if p.name.rpartition("-")[2].isdigit()), key=step_of)


def mark_complete(checkpoint: Path) -> None:
    """Write the marker after everything else has reached the disk."""
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (checkpoint / MARKER).touch()
    descriptor = os.open(checkpoint, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and whatever an interrupted save left before them."""
    kept = complete_checkpoints(folder)[-keep:]
    for path in folder.glob("checkpoint-*"):
        if path not in kept and path.name.rpartition("-")[2].isdigit():
            shutil.rmtree(path, ignore_errors=True)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name; tied ones once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def checkpoint_tensors(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What a checkpoint holds: the trained parameters and further state, and nothing that is frozen.

    Args:
        model: What is trained.
        state: Tensors beyond the parameters that training changes, such as running means.
    """
    return {**trained_state(model), **{f"{STATE}{name}": tensor for name, tensor in (state or {}).items()}}


def save_tensors(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Write what :func:`checkpoint_tensors` gave."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, checkpoint / WEIGHTS)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put the trained parameters of a checkpoint into a model that is not trained further.

    Args:
        model: With a parameter for each of the checkpoint, whether it could be trained or not.
        checkpoint: Folder.

    Raises:
        ModelError: If the model has no such parameter, or one of another shape.
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
    """Put the trained parameters and the further state of a checkpoint back.

    Raises:
        ModelError: If names or shapes are not those of this model.
    """
    saved = load_file(checkpoint / WEIGHTS)
    tensors = checkpoint_tensors(model, state)
    wrong = sorted(saved.keys() ^ tensors.keys()) or [n for n, t in saved.items() if t.shape != tensors[n].shape]
    if wrong:
        raise ModelError(f"{checkpoint} was written by another model: {wrong[0]} differs", "start again with --force")
    with torch.no_grad():
        for name, tensor in saved.items():
            tensors[name].copy_(shard_like(tensor, tensors[name]))
