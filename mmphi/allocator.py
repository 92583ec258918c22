"""Memory that a process frees stays with it, for the next tensor of that size."""

from __future__ import annotations

import ctypes
import os

# glibc's malloc.h. A tensor of more than 32 MB is otherwise mapped again and given back each time, and the kernel
# clears its pages again: half of what a convolutional tower took on a virtual machine.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAPPED_FROM = 1024**3  # Bytes from which a block is mapped by itself: weights, which stay, and no activations.
KEPT = 2**31 - 1  # Bytes at the end of the heap that stay: the most that mallopt can be told.
SWITCH = "MMPHI_KEEP_MEMORY"  # 0: as the system has it.
OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let this process, and those that fork from it, keep what they free; only glibc's allocator can be told to.

    Returns:
        Whether it was told: not where ``MMPHI_KEEP_MEMORY`` is 0, nor where one of ``MALLOC_MMAP_THRESHOLD_``,
        ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES`` and ``LD_PRELOAD`` chooses an allocator or its ways.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(MMAP_THRESHOLD, MAPPED_FROM)) and bool(libc.mallopt(TRIM_THRESHOLD, KEPT))


def release_memory() -> None:
    """Give the system what this process keeps and does not use: what comes now needs tensors of other sizes."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0" or any(os.environ.get(name) for name in OWN):
        return None
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):  # Another system, or another C library.
        return None
    return ctypes.CDLL(None)
