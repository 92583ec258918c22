"""The number of threads of a training, which affects floating-point rounding.

A resumed training is bitwise identical only with the number of threads that it began with. A run therefore records the
number, and the run that resumes it uses the same.
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
    """Use the number of threads of the resumed run inside the block, and record it.

    Args:
        store: Tracking store with the resumed run.
        tracker: Tracker of the current run.
        source: ID of the resumed run; empty for none.
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
        # Not if the number was changed meanwhile, as at the end of a background build.
        if torch.get_num_threads() == before:
            torch.set_num_threads(now)
