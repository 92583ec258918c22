"""Profile of a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

ROWS = 20


class LastStep(TrainerCallback):
    """Profiles the last step of a training with torch's profiler.

    Args:
        steps: Number of training steps.
    """

    def __init__(self, steps: int) -> None:
        self.last, self.table = steps - 1, ""
        self._watching: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the profiler at the last step."""
        if state.global_step == self.last:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._watching = profile(activities=kinds)
            self._watching.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Keep the table of operations, the most expensive first."""
        if self._watching is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._watching.__exit__(None, None, None)
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self.table = self._watching.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        self._watching = None
