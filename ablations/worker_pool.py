"""The workers of one driver: started, given jobs, listened to, replaced when they die."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType

from ablations.protocol import TrialRequest, TrialResponse, decode_response, encode
from mmphi.errors import StoreError

COMMAND = (sys.executable, "-m", "ablations.worker")
PATIENCE = 3  # Times that every worker may fail to start.
PATIENCE_S = 60.0  # A worker that was asked to stop finishes its step and saves.
GO_ON, ENOUGH = TrialResponse(-1, "report"), TrialResponse(-1, "pruned")


@dataclass
class WorkerProcess:
    """One process.

    Attributes:
        process: It.
        connection: To speak with it.
        job: What it is running.
        ready: Whether it has loaded its libraries.
    """

    process: subprocess.Popen[bytes]
    connection: Connection
    job: TrialRequest | None = None
    ready: bool = False


class WorkerPool:
    """Workers, each with a device or a share of the cores of its own.

    Args:
        count: How many.
        logs: Folder of what they print.
        command: That starts one.

    Raises:
        StoreError: When listened to, if none of them can start.
    """

    def __init__(self, count: int, logs: Path, command: Sequence[str] = COMMAND) -> None:
        self.count, self.logs, self.command = count, logs, command
        self.barren = 0  # Workers that died one after the other before they were ready.
        self.workers: list[WorkerProcess] = []

    def __enter__(self) -> WorkerPool:
        self.logs.mkdir(parents=True, exist_ok=True)
        self.workers = [self._start(place) for place in range(self.count)]
        return self

    def _start(self, place: int) -> WorkerProcess:
        ours, theirs = multiprocessing.Pipe()
        with (self.logs / f"worker{place}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self.command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment(place, self.count)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # A Ctrl-C reaches the driver alone, which then asks its workers to stop.
            )
        theirs.close()
        return WorkerProcess(process, ours)

    def idle(self) -> list[WorkerProcess]:
        """Those that wait for work."""
        return [w for w in self.workers if w.job is None]

    def busy(self) -> list[WorkerProcess]:
        """Those that work."""
        return [w for w in self.workers if w.job is not None]

    def give(self, worker: WorkerProcess, job: TrialRequest) -> None:
        """Give a worker work; one that has died meanwhile is noticed when listened to."""
        worker.job = job
        with contextlib.suppress(OSError):
            worker.connection.send_bytes(encode(job))

    def listen(self, seconds: float) -> list[tuple[WorkerProcess, TrialResponse | None]]:
        """What workers say within a time; ``None`` of one that died, which is replaced by the next one at its place."""
        heard: list[tuple[WorkerProcess, TrialResponse | None]] = []
        speaking = wait([w.connection for w in self.workers], seconds)
        for place, worker in enumerate(self.workers):
            if worker.connection not in speaking:
                continue
            try:
                answer = decode_response(worker.connection.recv_bytes())
            except (EOFError, OSError):
                worker.process.wait()
                self._buried(worker, place)
                heard.append((worker, None))
                self.workers[place] = self._start(place)
                continue
            if answer.number < 0:
                worker.ready, self.barren = True, 0
            else:
                heard.append((worker, answer))
        return heard

    def _buried(self, worker: WorkerProcess, place: int) -> None:
        """Give up where no worker can even start.

        Raises:
            StoreError: Saying where their last words are.
        """
        self.barren = 0 if worker.ready else self.barren + 1
        if self.barren > PATIENCE * self.count:
            raise StoreError("no worker can start", f"its last words are in {self.logs / f'worker{place}.log'}")

    def reply(self, worker: WorkerProcess, go_on: bool) -> None:
        """Tell a worker that reported whether to go on."""
        with contextlib.suppress(OSError):
            worker.connection.send_bytes(encode(GO_ON if go_on else ENOUGH))

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        for worker in self.workers:
            worker.process.terminate()
            worker.connection.close()  # Whoever waits for work need not wait any longer.
        for worker in self.workers:
            try:
                worker.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def environment(place: int, count: int) -> dict[str, str]:
    """What a worker's libraries are told: its GPU where there is one, else its share of the cores."""
    cards = visible_gpus()
    if cards:
        return {"CUDA_VISIBLE_DEVICES": cards[place % len(cards)]}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))}


def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use, without opening any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return found.stdout.split()
    return []
