"""The one device that belongs to this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def this_device() -> torch.device:
    """The accelerator that belongs to this process, else the CPU; torchrun's processes have one each."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def copy_to_cpu_async(tensor: Tensor) -> Callable[[], Tensor]:
    """A tensor on the CPU, waiting for no more than what computes it.

    To ask an accelerator for a tensor at once is to wait until it has nothing left to do at all.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    here.copy_(tensor, non_blocking=True)
    done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives it no types.
    done.record()

    def fetched() -> Tensor:
        done.synchronize()
        return here

    return fetched
