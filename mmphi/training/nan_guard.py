"""Checks that every loss is finite, without synchronising with the accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mmphi.errors import TrainingError
from mmphi.models.device import copy_to_cpu_async


class FiniteLoss:
    """Checks the loss of each forward pass one pass later, when it is already computed; on a CPU at once.

    An immediate check would make the CPU wait until the accelerator is idle, and then the accelerator until the next
    pass is prepared.

    Args:
        folder: Folder for the batch of the first non-finite loss.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: tuple[int, Callable[[], Tensor], Mapping[str, Any]] | None = None

    def note(self, step: int, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Register the loss of a pass, and check the previous one.

        Args:
            step: Optimiser step.
            loss: Loss, shape ().
            inputs: Batch of the loss.

        Raises:
            TrainingError: If the loss of the previous pass, or on a CPU this one, is not finite.
        """
        self.look()
        self._waiting = (step, copy_to_cpu_async(loss.detach()), inputs)
        if not loss.is_cuda:
            self.look()

    def look(self) -> None:
        """Check the last registered loss, waiting for its value if necessary.

        Raises:
            TrainingError: If it is not finite; its batch is saved first.
        """
        if self._waiting is None:
            return
        (step, value, inputs), self._waiting = self._waiting, None
        loss = float(value())
        if loss - loss == 0:
            return
        where = self.folder / "bad_batch.safetensors"
        save_file(dict(_flat(inputs)), where)
        raise TrainingError(
            f"the loss at step {step} is {loss}; the batch is saved as {where}",
            "a lower learning rate, a longer warm-up or fp32 usually fixes this",
        )


def _flat(batch: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in batch.items():
        if isinstance(value, Tensor):
            yield prefix + name, value.detach().cpu().contiguous()
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
