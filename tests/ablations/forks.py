"""Workers of studies as forks of one process that has imported everything: a new interpreter would take seconds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy_studies
from forked import Process

from ablations import worker_pool


class Fork(Process):
    """A worker of a crew that is forked instead of started."""

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
        super().__init__(work, (toy, pipe, log, dict(env)))
        pipe.close()
        log.close()


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
    forked = tuple(command[:-1]) in (toy_studies.COMMAND, worker_pool.COMMAND)
    return Fork(command, **how) if forked else subprocess.Popen(command, **how)


def fork_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers in this process fork their workers; those in processes of their own start them as users' drivers do."""
    folders = [Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))  # For the process that is forked.
    names = {
        name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "SubprocessError", "TimeoutExpired", "run")
    }
    monkeypatch.setattr(worker_pool, "subprocess", SimpleNamespace(Popen=start, **names))
