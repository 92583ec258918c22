"""The worker processes of one driver: starts them, exchanges messages with them, and replaces those that die."""

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
PATIENCE = 3  # Consecutive failed starts allowed, per worker.
PATIENCE_S = 60.0  # Timeout after SIGTERM, in which a worker finishes its step and saves a checkpoint.
GO_ON, ENOUGH = TrialResponse(-1, "report"), TrialResponse(-1, "pruned")


@dataclass
class WorkerProcess:
    """One worker process.

    Attributes:
        process: The process.
        connection: Pipe to the process.
        job: Request that it is running; ``None`` while it is idle.
        ready: Whether it has loaded its libraries.
    """

    process: subprocess.Popen[bytes]
    connection: Connection
    job: TrialRequest | None = None
    ready: bool = False


class WorkerPool:
    """Worker processes, each assigned one GPU, or an equal share of the CPU cores without GPUs.

    Args:
        count: Number of workers.
        logs: Folder of the worker logs.
        command: Command line that starts a worker; a file descriptor is appended.

    Raises:
        StoreError: From :meth:`listen`, if no worker can start.
    """

    def __init__(self, count: int, logs: Path, command: Sequence[str] = COMMAND) -> None:
        self.count, self.logs, self.command = count, logs, command
        self.barren = 0  # Consecutive workers that died before they were ready.
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
                start_new_session=True,  # Ctrl-C reaches only the driver, which then terminates its workers.
            )
        theirs.close()
        return WorkerProcess(process, ours)

    def idle(self) -> list[WorkerProcess]:
        """Workers without a request."""
        return [w for w in self.workers if w.job is None]

    def busy(self) -> list[WorkerProcess]:
        """Workers that are running a request."""
        return [w for w in self.workers if w.job is not None]

    def give(self, worker: WorkerProcess, job: TrialRequest) -> None:
        """Send a request to a worker; if the worker has died, :meth:`listen` reports it."""
        worker.job = job
        with contextlib.suppress(OSError):
            worker.connection.send_bytes(encode(job))

    def listen(self, seconds: float) -> list[tuple[WorkerProcess, TrialResponse | None]]:
        """Collect the responses that arrive within a time, and replace workers that died.

        Args:
            seconds: Timeout in seconds.

        Returns:
            Worker and response; the response is ``None`` for a worker that died.
        """
        responses: list[tuple[WorkerProcess, TrialResponse | None]] = []
        speaking = wait([w.connection for w in self.workers], seconds)
        for place, worker in enumerate(self.workers):
            if worker.connection not in speaking:
                continue
            try:
                answer = decode_response(worker.connection.recv_bytes())
            except (EOFError, OSError):
                worker.process.wait()
                self._buried(worker, place)
                responses.append((worker, None))
                self.workers[place] = self._start(place)
                continue
            if answer.number < 0:
                worker.ready, self.barren = True, 0
            else:
                responses.append((worker, answer))
        return responses

    def _buried(self, worker: WorkerProcess, place: int) -> None:
        """Count a failed start.

        Raises:
            StoreError: If too many workers in a row died before they were ready; names the log.
        """
        self.barren = 0 if worker.ready else self.barren + 1
        if self.barren > PATIENCE * self.count:
            raise StoreError("no worker can start", f"see the end of {self.logs / f'worker{place}.log'}")

    def reply(self, worker: WorkerProcess, go_on: bool) -> None:
        """Answer a report: whether the worker continues its training."""
        with contextlib.suppress(OSError):
            worker.connection.send_bytes(encode(GO_ON if go_on else ENOUGH))

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        for worker in self.workers:
            worker.process.terminate()
            worker.connection.close()  # Idle workers exit when their pipe closes.
        for worker in self.workers:
            try:
                worker.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def environment(place: int, count: int) -> dict[str, str]:
    """Environment variables that assign a worker its GPU, or its share of the CPU cores without GPUs."""
    cards = visible_gpus()
    if cards:
        return {"CUDA_VISIBLE_DEVICES": cards[place % len(cards)]}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))}


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, without initialising CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return found.stdout.split()
    return []
