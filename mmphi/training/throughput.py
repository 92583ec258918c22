"""How fast training is and how much memory it takes."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmphi.allocator import release_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"  # Documented in proc(5): resets the peak of the resident set.


class Throughput:
    """Tokens per second of training: what waits for data counts, validation and checkpoints do not.

    Tokens are those of sequences, features in their places included; what fills rows up is none.

    Attributes:
        tokens: Tokens that passed through the model since the last reading, on this process; counted where the batches
            are, so that nobody waits for an accelerator before the count is read.
        pairs: Pairs of a position and one that it sees, since the beginning, on this process; likewise.
        total_s: Seconds of training up to the last pause.
    """

    def __init__(self) -> None:
        self.tokens: int | Tensor = 0
        self.pairs: int | Tensor = 0
        self._seconds = self.total_s = 0.0
        self._begun: float | None = None

    def count(self, batch: Mapping[str, Any]) -> None:
        """Count a batch that passes, by its ``segments`` and ``borders``, where it has them."""
        if "segments" in batch:
            self.tokens = self.tokens + (batch["segments"] >= 0).sum()
        if "borders" in batch:
            lengths = batch["borders"].diff().long()
            self.pairs = self.pairs + (lengths * (lengths + 1) // 2).sum()

    def start(self) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        if self._begun is not None:
            passed = time.perf_counter() - self._begun
            self._seconds += passed
            self.total_s += passed
        self._begun = None

    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return self.total_s + (0.0 if self._begun is None else time.perf_counter() - self._begun)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let what happens inside not count."""
        running = self._begun is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def read(self) -> float:
        """Tokens per second since the last reading; 0 where none were counted."""
        running = self._begun is not None
        self.stop()
        rate = float(self.tokens) / self._seconds if self._seconds else 0.0
        self.tokens, self._seconds = 0, 0.0
        if running:
            self.start()
        return rate


class StepLoss:
    """The loss of an optimiser step, added up over its forward passes."""

    def __init__(self) -> None:
        self._sum: float | Tensor = 0.0

    def add(self, share: float | Tensor) -> None:
        """Add what one forward pass of this process has of it; on an accelerator nobody waits for it."""
        self._sum = self._sum + share

    def take(self, device: torch.device) -> float:
        """The loss of the step that ended, over all processes; the next begins at nothing."""
        total, self._sum = torch.tensor(float(self._sum), dtype=torch.float64), 0.0
        if dist.is_initialized():
            total = total.to(device)
            dist.all_reduce(total)
        return float(total)


def reset_peak_memory() -> None:
    """Forget what was used before: the peak is that of what follows. Only Linux can do so for a process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    release_memory()  # What is kept of what was used before.
    with contextlib.suppress(OSError):
        CLEAR.write_text(CLEAR_PEAK)


def peak_memory_bytes() -> int:
    """Most memory used at once since the last reset: the accelerator's where there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = STATUS.read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
