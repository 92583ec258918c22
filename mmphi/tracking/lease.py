"""Who builds a key: one living run, wherever it runs, as its heartbeat shows.

A lease is a tag on the run of the process that builds. It is renewed by a thread; one that is not renewed for
``LEASE_S`` seconds is over, and any host may take the work over. Hosts' clocks must agree to within a part of that.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mlflow.exceptions import MlflowException

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

HEARTBEAT, HELD, DOMAIN = "mmphi.heartbeat", "mmphi.lease", "mmphi.lock_domain"


def lease_s() -> float:
    """Seconds without a heartbeat after which a run counts as dead; ``MMPHI_LEASE_S``, by default 90."""
    return float(os.environ.get("MMPHI_LEASE_S", "90"))


class Lease:
    """The right of one run to build a key.

    Args:
        client: Speaks with the store.
        run_id: The run that builds.
        domain: Name of the folder whose file locks this process holds for the key: a run that was begun under a lock of
            the same folder must be dead, or this process would not hold it.
        clock: Seconds since the epoch, as other hosts count them.
        sleep: Waits for some seconds.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        domain: str,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.client, self.run_id, self.domain = client, run_id, domain
        self._clock, self._sleep = clock, sleep
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def alive(self, run: Run) -> bool:
        """Whether a run is still being built by a process somewhere else."""
        tags = run.data.tags
        if run.info.status != "RUNNING" or tags.get(DOMAIN) == self.domain:
            return False
        return self._clock() - float(tags.get(HEARTBEAT, "0")) < lease_s()

    def claim(self, others: Callable[[], Iterator[Run]], waiting: Callable[[str], None]) -> bool:
        """Wait until no other living run holds the key, and hold it.

        Of two that claim at the same time at least one sees the other's claim after making its own; who sees one steps
        back, and tries again.

        Args:
            others: The unfinished runs of the key but this one, as the store has them now.
            waiting: Told once, before a wait, who holds it.

        Returns:
            Whether there was a wait.
        """
        self.beat()
        waited = False
        while True:
            holder = self._holder(others)
            if holder is None:
                self.client.set_tag(self.run_id, HELD, "held")
                holder = self._holder(others)
                if holder is None:
                    return waited
                self.client.set_tag(self.run_id, HELD, "waiting")
            if not waited:
                tags = holder.data.tags
                waiting(f"process {tags.get('mmphi.pid', '?')} on {tags.get('mmphi.host', '?')}")
            waited = True
            self._sleep(min(5.0, lease_s() / 4) * random.uniform(0.5, 1.0))
            self.beat()

    def _holder(self, others: Callable[[], Iterator[Run]]) -> Run | None:
        return next((run for run in others() if run.data.tags.get(HELD) == "held" and self.alive(run)), None)

    def beat(self) -> None:
        """Show that this process lives."""
        self.client.set_tag(self.run_id, HEARTBEAT, f"{self._clock():.3f}")

    def __enter__(self) -> Lease:
        self.client.set_tag(self.run_id, DOMAIN, self.domain)
        self._thread = threading.Thread(target=self._beat_on, daemon=True, name="mmphi-heartbeat")
        self._thread.start()
        return self

    def _beat_on(self) -> None:
        while not self._stop.wait(lease_s() / 4):
            with contextlib.suppress(MlflowException, OSError):  # A server that is away for a moment.
                self.beat()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
