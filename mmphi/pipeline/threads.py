"""The number of threads that a training runs with, which decides the last bits of its sums.

A training that is resumed after a kill gives the same bits only with the number of threads that it began with. So a run
records the number, and the run that resumes it uses the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmphi.logs import LOGGER

if TYPE_CHECKING:
    from mmphi.tracking.run_tracker import RunTracker
    from mmphi.tracking.run_writer import TrackingStore

THREADS = "mmphi.threads"


@contextmanager
def restore_thread_count(store: TrackingStore, tracker: RunTracker, source: str) -> Iterator[None]:
    """Work with as many threads as the run that is resumed, and record the number.

    Args:
        store: Has that run.
        tracker: Of the run that works.
        source: Id of the run that is resumed; empty for none.
    """
    import torch

    now = torch.get_num_threads()
    before = int(store.run(source).data.tags.get(THREADS, now)) if source else now
    if before > (os.cpu_count() or 1):
        LOGGER.warning(
            f"run {source} had {before} threads, and this machine has {os.cpu_count()} cores: the last bits may differ"
        )
        before = now
    tracker.tags({THREADS: str(before)})
    torch.set_num_threads(before)
    try:
        yield
    finally:
        # Unless something else has changed the number meanwhile, as the end of a background build does.
        if torch.get_num_threads() == before:
            torch.set_num_threads(now)
