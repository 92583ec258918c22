"""Python processes as forks of one that has imported everything: a new interpreter would take many seconds.

A fork is a process of its own all the same: it has its own environment and output, can be killed, and shares nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = [
    *("ablations.worker", "ablations.trial"),
    *("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "open_clip"),
    *(
        "mmphi.pipeline.build",
        "mmphi.stages",
        "mmphi.training.hf_trainer",
        "mmphi.training.trainer",
        "mmphi.models.checkpoint",
    ),
    *("mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"),
]


class Process:
    """The part of ``subprocess.Popen`` that a fork has.

    Args:
        work: What it does.
        arguments: Of that; connections are duplicated for the fork.
    """

    def __init__(self, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        FORKS.set_forkserver_preload(PRELOADED)
        self._process = FORKS.Process(target=work, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


class Forked(Process):
    """What ``subprocess.Popen([sys.executable, *arguments])`` is, errors on the output too.

    Args:
        arguments: A script and its arguments, or ``-c`` and code, or ``-m`` and a module.
        environment: Its own; this process's where left out.
        errors: File descriptor for errors; the output where left out.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None, errors: int | None = None
    ) -> None:
        reading, writing = os.pipe()
        out = Connection(writing, readable=False)
        err = Connection(os.dup(writing if errors is None else errors), readable=False)
        given = list(map(str, arguments)), dict(os.environ if environment is None else environment)
        super().__init__(_work, (*given, out, err))
        out.close()
        err.close()
        self.stdout: TextIO = os.fdopen(reading, encoding="utf-8", errors="replace")

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        ending = threading.Timer(timeout or 0.0, self.kill)  # The output ends with the process.
        if timeout is not None:
            ending.start()
        output = self.stdout.read()
        ending.cancel()
        self.wait()
        return output, None


def run(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`` gives."""
    return run_ranks(arguments, 1, environment)[0]


def run_ranks(
    arguments: Sequence[str], count: int, environment: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """One process, or several as torchrun starts them, with the store that its agent has for them."""
    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = dict(os.environ if environment is None else environment)
    started = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": agent.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # Read below.
        variables = common | ({name: str(value) for name, value in own.items()} if count > 1 else {})
        started.append((Forked(arguments, variables, errors.fileno()), errors))
    done = []
    for process, errors in started:
        output = process.stdout.read()
        status = process.wait()
        process.stdout.close()
        errors.seek(0)
        done.append(subprocess.CompletedProcess(list(arguments), status, output, errors.read()))
        errors.close()
    return done


def _work(arguments: list[str], environment: dict[str, str], out: Connection, err: Connection) -> None:
    """What an interpreter does with its arguments, in a fork."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, *rest = arguments
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = [rest[0], *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
