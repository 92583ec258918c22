"""Leases: only one live run builds a key at a time, on any machine.

A lease is a tag on the building process's run. A thread renews the run's heartbeat tag. If it is not renewed for
:func:`lease_s` seconds, the lease expires, and any host may take the work over. The clocks of the hosts must agree to
within a fraction of that time.
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
    """Seconds without a heartbeat after which a run counts as dead: ``MMPHI_LEASE_S``, by default 90."""
    return float(os.environ.get("MMPHI_LEASE_S", "90"))


class Lease:
    """The right of one run to build a key.

    Args:
        client: MLflow client of the store.
        run_id: ID of the run that builds the key.
        domain: Name of the lock folder in which this process holds the key's file lock. Other unfinished runs of the
            key with this domain are dead, because their process would otherwise hold the lock.
        clock: Function that returns the current time in seconds since the epoch.
        sleep: Function that waits for a number of seconds.
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
        """Whether a process with another lock folder, such as on another host, is still building a run."""
        tags = run.data.tags
        if run.info.status != "RUNNING" or tags.get(DOMAIN) == self.domain:
            return False
        return self._clock() - float(tags.get(HEARTBEAT, "0")) < lease_s()

    def claim(self, others: Callable[[], Iterator[Run]], waiting: Callable[[str], None]) -> bool:
        """Wait until no other live run holds the key, then hold it.

        Of two runs that claim at the same time, at least one reads the other's claim after writing its own. A run that
        reads another claim withdraws its own and retries.

        Args:
            others: Function that returns the other runs of the key, as currently in the store.
            waiting: Called once with a description of the holder before a wait.

        Returns:
            Whether the method waited.
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
        """Renew the heartbeat of the run."""
        self.client.set_tag(self.run_id, HEARTBEAT, f"{self._clock():.3f}")

    def __enter__(self) -> Lease:
        self.client.set_tag(self.run_id, DOMAIN, self.domain)
        self._thread = threading.Thread(target=self._beat_on, daemon=True, name="mmphi-heartbeat")
        self._thread.start()
        return self

    def _beat_on(self) -> None:
        while not self._stop.wait(lease_s() / 4):
            with contextlib.suppress(MlflowException, OSError):  # The server may be temporarily unreachable.
                self.beat()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
