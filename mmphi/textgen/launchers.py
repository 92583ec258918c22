"""Launchers of generators: processes of this machine, or tasks in a Ray cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, Protocol

from mmphi.config.textgen import TextgenSettings
from mmphi.textgen.generator import STOP, GeneratorConfig, GeneratorStatus


class RunningGenerator(Protocol):
    """A started generator."""

    def why_ended(self) -> str | None:
        """Returns why it ended, in one line; ``None`` while it runs."""

    def wait(self, seconds: float) -> bool:
        """Wait at most ``seconds``; returns whether it ended."""

    def kill(self) -> None:
        """Terminate it immediately."""

    def last_status(self) -> GeneratorStatus:
        """Returns the last reported status."""


class Launcher(Protocol):
    """Starts and stops generators.

    Attributes:
        count: Number of generators that run at a time.
    """

    count: int

    def start(self, stream: str, number: int) -> RunningGenerator:
        """Start a generator that writes a stream, in place ``number`` of the pool."""

    def stop(self) -> None:
        """Request all generators to stop."""


class ProcessLauncher:
    """Processes of this machine, distributed over its GPUs if there are any.

    Args:
        settings: Text generation settings.
        spool: URL of the shard queue.
        folder: Folder of the generators' configuration, status and log files.
        backend: Sampling backend.
    """

    def __init__(self, settings: TextgenSettings, spool: str, folder: Path, backend: str) -> None:
        self.settings, self.spool, self.folder, self.backend = settings, spool, folder, backend
        self.count = count_of(settings)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)

    def start(self, stream: str, number: int) -> RunningGenerator:
        """See :class:`Launcher`."""
        import torch

        threads = max(1, (os.cpu_count() or 1) // max(1, self.count))
        status, log = self.folder / f"{stream}.json", self.folder / f"{stream}.log"
        order = GeneratorConfig(self.settings.model_dump(), stream, self.backend, threads)
        written = self.folder / f"{stream}.order"
        written.write_text(json.dumps([asdict(order), self.spool, str(status), os.getpid()]))
        own = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if gpus := torch.cuda.device_count():
            own["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
        words: IO[bytes] = log.open("wb")
        with words:
            process = subprocess.Popen(
                [sys.executable, "-m", "mmphi.textgen.generator", str(written)],
                stdout=words,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | own,
                start_new_session=True,  # Ctrl-C must not kill them before they have written open shards.
            )
        return ProcessGenerator(process, status, log)

    def stop(self) -> None:
        """See :class:`Launcher`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STOP).touch()


class ProcessGenerator:
    """A generator in a process of this machine.

    Args:
        process: The process.
        status: Its status file.
        log: File of its output.
    """

    def __init__(self, process: subprocess.Popen[bytes], status: Path, log: Path) -> None:
        self.process, self.status, self.log = process, status, log

    def why_ended(self) -> str | None:
        """See :class:`RunningGenerator`."""
        code = self.process.poll()
        return None if code is None else f"exit status {code}: {_tail(self.log)}"

    def wait(self, seconds: float) -> bool:
        """See :class:`RunningGenerator`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """See :class:`RunningGenerator`."""
        self.process.kill()
        self.process.wait()

    def last_status(self) -> GeneratorStatus:
        """See :class:`RunningGenerator`."""
        try:
            return GeneratorStatus(**json.loads(self.status.read_text()))
        except (OSError, ValueError):
            return GeneratorStatus()


def count_of(settings: TextgenSettings) -> int:
    """Returns the number of generators on this machine: the setting, else one per GPU, else one per two cores."""
    import torch

    if settings.generators >= 0:
        return settings.generators
    return torch.cuda.device_count() or max(1, (os.cpu_count() or 1) // 2)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"{lines[-1][:300]} (full log: {log})" if lines else "its log is empty"
