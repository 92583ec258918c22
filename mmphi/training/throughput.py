"""Throughput, loss and peak memory of training."""

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
    """Tokens per second of training, including waits for data, without validation and checkpoints.

    Tokens include the positions of features and exclude padding.

    Attributes:
        tokens: Tokens processed since the last reading, on this process; counted on the batches' device, so that an
            accelerator is synchronised only when the count is read.
        pairs: Pairs of a position and one that it attends to, since the beginning, on this process; counted likewise.
        total_s: Seconds of training up to the last pause.
    """

    def __init__(self) -> None:
        self.tokens: int | Tensor = 0
        self.pairs: int | Tensor = 0
        self._seconds = self.total_s = 0.0
        self._begun: float | None = None

    def count(self, batch: Mapping[str, Any]) -> None:
        """Count a batch by its ``segments`` and ``borders``, if it has them."""
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
        """Stop the clock inside the context."""
        running = self._begun is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def read(self) -> float:
        """Returns the tokens per second since the last reading; 0 if none were counted."""
        running = self._begun is not None
        self.stop()
        rate = float(self.tokens) / self._seconds if self._seconds else 0.0
        self.tokens, self._seconds = 0, 0.0
        if running:
            self.start()
        return rate


class StepLoss:
    """Sum of an optimiser step's loss over its forward passes."""

    def __init__(self) -> None:
        self._sum: float | Tensor = 0.0

    def add(self, share: float | Tensor) -> None:
        """Add the share of one forward pass of this process, without synchronising an accelerator."""
        self._sum = self._sum + share

    def take(self, device: torch.device) -> float:
        """Returns the loss of the completed step, summed over all processes, and resets the sum."""
        total, self._sum = torch.tensor(float(self._sum), dtype=torch.float64), 0.0
        if dist.is_initialized():
            total = total.to(device)
            dist.all_reduce(total)
        return float(total)


def reset_peak_memory() -> None:
    """Reset the peak memory of the GPU and, on Linux, of this process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    release_memory()  # Freed memory that the allocator keeps would count.
    with contextlib.suppress(OSError):
        CLEAR.write_text(CLEAR_PEAK)


def peak_memory_bytes() -> int:
    """Returns the peak memory since the last reset: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = STATUS.read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
