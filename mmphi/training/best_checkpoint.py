"""Best-validation weights: saved during training and loaded at its end."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmphi.training.checkpoints import checkpoint_tensors, load_trained, save_tensors

FOLDER, NOTE, BY = "best", "best.json", "val/loss"
PART, FORMER = ".part", ".former"  # Suffixes of folders that are being written or replaced.


class BestCheckpoint:
    """Keeps the trained weights with the lowest validation loss so far.

    They are written to a temporary folder that is then renamed, so that partly written weights are never loaded.

    Args:
        folder: Training folder; the weights are saved below it until :func:`remove_kept`.
        task: Module whose trainable parameters are saved.
        state: Tensors other than parameters that training changes.
    """

    def __init__(self, folder: Path, task: nn.Module, state: Mapping[str, Tensor] | None = None) -> None:
        self.folder, self.task, self.state = folder / FOLDER, task, state
        former = self.folder.with_suffix(FORMER)
        if former.exists() and not self.folder.exists():  # A process was killed between the two renames of `offer`.
            with contextlib.suppress(FileNotFoundError):  # Another process of the same training has done it.
                former.rename(self.folder)

    @property
    def step(self) -> int:
        """Step of the saved weights; -1 if there are none."""
        return int(self._note().get("step", -1))

    @property
    def figures(self) -> dict[str, float]:
        """Validation figures of the saved weights; empty if there are none."""
        return dict(self._note().get("figures", {}))

    def offer(self, step: int, figures: Mapping[str, float]) -> None:
        """Save the current weights if their ``val/loss`` is the lowest so far."""
        loss = figures.get(BY, math.nan)
        if not loss < self.figures.get(BY, math.inf):  # Also skips NaN.
            return
        part = self.folder.with_suffix(PART)
        shutil.rmtree(part, ignore_errors=True)
        save_tensors(checkpoint_tensors(self.task, self.state), part)
        (part / NOTE).write_text(json.dumps({"step": step, "figures": dict(figures)}))
        former = self.folder.with_suffix(FORMER)
        shutil.rmtree(former, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(former)
        part.rename(self.folder)
        shutil.rmtree(former, ignore_errors=True)

    def take(self) -> None:
        """Load the saved weights; if there are none, the current ones stay."""
        if self.step >= 0:
            load_trained(self.task, self.folder, self.state)

    def _note(self) -> dict[str, Any]:
        path = self.folder / NOTE
        return dict(json.loads(path.read_text())) if path.exists() else {}


def remove_kept(folder: Path) -> None:
    """Remove the weights saved below a training's folder, once its result is stored."""
    for name in (FOLDER, f"{FOLDER}{PART}", f"{FOLDER}{FORMER}"):
        shutil.rmtree(folder / name, ignore_errors=True)
