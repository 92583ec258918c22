"""Memory that a process frees stays with it, for the next tensor of that size."""

from __future__ import annotations

import ctypes
import os

# glibc's malloc.h. A tensor of more than 32 MB is otherwise mapped anew and given back each time, and the kernel
# clears its pages again: on a virtual machine up to four fifths of what a convolution takes.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAPPED_FROM = 1024**3  # Bytes from which a block is mapped by itself: weights, which stay, and no activations.
KEPT = 2**31 - 1  # Bytes at the end of the heap that stay: the most that mallopt can be told.
OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let this process, and those that fork from it, keep what they free; only glibc's allocator can be told to.

    Returns:
        Whether it was told: not where ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES`` or
        ``LD_PRELOAD`` are set, by which a user chooses an allocator and its ways.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(MMAP_THRESHOLD, MAPPED_FROM)) and bool(libc.mallopt(TRIM_THRESHOLD, KEPT))


def give_back() -> None:
    """Give the system what this process keeps and does not use: what comes now needs tensors of other sizes."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if any(os.environ.get(name) for name in OWN):
        return None
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):  # Another system, or another C library.
        return None
    return ctypes.CDLL(None)
