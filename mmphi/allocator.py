"""Settings of glibc's allocator: a process keeps freed memory for the next tensor of that size."""

from __future__ import annotations

import ctypes
import os

# Constants of glibc's malloc.h. By default, a tensor of more than 32 MB is mapped and unmapped each time, and the
# kernel clears its pages: half of the time of a convolutional vision encoder on a virtual machine.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAPPED_FROM = 1024**3  # Bytes from which a block is mapped separately: long-lived weights, but no activations.
KEPT = 2**31 - 1  # Free bytes that stay at the end of the heap: the maximum of mallopt.
SWITCH = "MMPHI_KEEP_MEMORY"  # 0 keeps the system's defaults.
OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Make this process and its forks keep freed memory; only glibc's allocator supports this.

    Returns:
        Whether the allocator was configured: not if ``MMPHI_KEEP_MEMORY`` is 0, or if one of
        ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES`` and ``LD_PRELOAD`` is set.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(MMAP_THRESHOLD, MAPPED_FROM)) and bool(libc.mallopt(TRIM_THRESHOLD, KEPT))


def release_memory() -> None:
    """Return unused memory to the system, before work that needs tensors of other sizes."""
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
