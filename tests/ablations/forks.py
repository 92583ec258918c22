"""Workers of studies as forks of one process that has imported everything: a new interpreter would take seconds."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy_studies

from ablations import crew

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = [
    *("toy_studies", "ablations.worker", "ablations.trial", "mmphi.pipeline.build", "mmphi.stages"),
    *("torch", "transformers", "open_clip", "accelerate", "mmphi.models.bundle"),  # Imported by the first trial.
    *("mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"),
]


class Fork:
    """The part of ``subprocess.Popen`` that a crew uses, for workers that are forked instead of started."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int],
        env: Mapping[str, str],
        stdout: Any,
        stdin: int,
        stderr: int,
        start_new_session: bool,
    ) -> None:
        assert [int(command[-1])] == list(pass_fds)
        assert (stdin, stderr, start_new_session) == (subprocess.DEVNULL, subprocess.STDOUT, True)
        pipe, log = (Connection(os.dup(descriptor)) for descriptor in (pass_fds[0], stdout.fileno()))
        toy = tuple(command[:-1]) == toy_studies.COMMAND
        self._process = FORKS.Process(target=work, args=(toy, pipe, log, dict(env)))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        pipe.close()
        log.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def work(toy: bool, pipe: Connection, log: Connection, env: Mapping[str, str]) -> None:
    """What the command of a worker does, in a fork."""
    os.environ.clear()
    os.environ.update(env)
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    from ablations import worker

    if toy:
        import mmphi.stages

        mmphi.stages.STAGES.clear()
        mmphi.stages.STAGES.update(toy_studies.TOYS)
    worker.main(pipe.fileno())


def start(command: Sequence[str], **how: Any) -> Any:
    forked = tuple(command[:-1]) in (toy_studies.COMMAND, crew.COMMAND)
    return Fork(command, **how) if forked else subprocess.Popen(command, **how)


def fork_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers in this process fork their workers; those in processes of their own start them as users' drivers do."""
    folders = [Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))  # For the process that is forked.
    FORKS.set_forkserver_preload(PRELOADED)
    names = {
        name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "SubprocessError", "TimeoutExpired", "run")
    }
    monkeypatch.setattr(crew, "subprocess", SimpleNamespace(Popen=start, **names))
