"""A lock that a process loses when it dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[str], None] = lambda _: None, every_s: float = 0.5) -> Iterator[bool]:
    """Hold the lock of a file, waiting for whoever holds it; yields whether there was a wait.

    POSIX locks belong to the process: worker processes that outlive a killed parent do not keep it.

    Args:
        path: The file; made where it is missing.
        waiting: Told once, before the wait, what the holder wrote into the file: its process id and host.
        every_s: Seconds between tries.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    with path.open("a+") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not waited:
                    file.seek(0)
                    waiting(file.read().strip())
                waited = True
                time.sleep(every_s)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield waited
