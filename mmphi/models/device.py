"""The one device that belongs to this process."""

from __future__ import annotations

import os

import torch


def this_device() -> torch.device:
    """The accelerator that belongs to this process, else the CPU; torchrun's processes have one each."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
