"""Device of this process, and asynchronous copies from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def this_device() -> torch.device:
    """GPU of this process (``LOCAL_RANK`` under torchrun, else 0), or the CPU without one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def copy_to_cpu_async(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the CPU; returns a function that waits for the copy and returns it.

    It waits only for work queued before the copy, not for all work of the accelerator.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    here.copy_(tensor, non_blocking=True)
    done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # Not annotated in torch.
    done.record()

    def fetched() -> Tensor:
        done.synchronize()
        return here

    return fetched
