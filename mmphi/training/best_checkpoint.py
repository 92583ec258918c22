"""The weights of the best validation, kept beside a training and taken in its end."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmphi.training.checkpoints import checkpoint_tensors, load_trained, save_tensors

FOLDER, NOTE, BY = "best", "best.json", "val/loss"


class BestCheckpoint:
    """Keeps what was trained where the validation loss is lowest so far.

    Written whole or not at all, so that a killed training continues with the best that it had.

    Args:
        folder: Of the training; the weights are kept below it, until :meth:`remove_kept`.
        task: What is trained.
        state: Tensors beyond its parameters that training changes.
    """

    def __init__(self, folder: Path, task: nn.Module, state: Mapping[str, Tensor] | None = None) -> None:
        self.folder, self.task, self.state = folder / FOLDER, task, state

    @property
    def step(self) -> int:
        """Of the best; -1 where there is none."""
        return int(self._note().get("step", -1))

    @property
    def figures(self) -> dict[str, float]:
        """Of the validation that found it; empty where there is none."""
        return dict(self._note().get("figures", {}))

    def offer(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep the present weights if their ``val/loss`` is lower than all before it."""
        loss = figures.get(BY, math.nan)
        if not loss < self.figures.get(BY, math.inf):  # Nor where it is not a number.
            return
        part = self.folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        save_tensors(checkpoint_tensors(self.task, self.state), part)
        (part / NOTE).write_text(json.dumps({"step": step, "figures": dict(figures)}))
        shutil.rmtree(self.folder, ignore_errors=True)
        part.rename(self.folder)

    def take(self) -> None:
        """Put the best weights in; where there are none, the last ones stay."""
        if self.step >= 0:
            load_trained(self.task, self.folder, self.state)

    def _note(self) -> dict[str, Any]:
        path = self.folder / NOTE
        return dict(json.loads(path.read_text())) if path.exists() else {}


def remove_kept(folder: Path) -> None:
    """Remove what is kept below a training's folder: its result was saved."""
    for name in (FOLDER, f"{FOLDER}.part"):
        shutil.rmtree(folder / name, ignore_errors=True)
