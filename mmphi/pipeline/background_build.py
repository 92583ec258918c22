"""Builds independent trainings in parallel: one in this process, one in a helper process on the same machine.

On a CPU, the small matrices of a model trained from scratch do not use all cores: two trainings with half of the
threads each take little longer than one with all threads. The helper records in the same store, where this process
finds its results. Stages that the helper did not finish, because it failed or was killed, are built in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Self

from mmphi.config.section import Section
from mmphi.logs import LOGGER
from mmphi.pipeline.graph import StageGraph

SWITCH = "MMPHI_BESIDE"  # 0 disables the helper.
PATIENCE_S = 120.0  # Time for a terminated helper to save its state.
KEPT_BYTES = 2000


def independent_stages(plan: StageGraph, goal: str, name: str, settings: Section) -> list[str]:
    """Returns the missing stages of a goal that are independent of a stage and worth a second process.

    Args:
        plan: Dependencies between stages, and which are missing.
        goal: The stage to be built in the end.
        name: A missing stage upstream of the goal whose own upstream stages are built.
        settings: All settings.

    Returns:
        Names of the independent stages that no other of them depends on, upstream first. Empty if none of them, or not
        ``name`` itself, trains: one process would soon wait for the other.
    """
    if not plan.stages[name].trains:
        return []
    needed = {each: plan.order(each, settings) for each in plan.missing(goal, settings)}
    free = [each for each, order in needed.items() if name not in order and each not in plan.order(name, settings)]
    if not any(plan.stages[each].trains for each in free):
        return []
    return [each for each in free if not any(each in needed[other] for other in free if other != each)]


class BackgroundBuilder:
    """Context manager that builds independent stages in a helper process while this process builds a goal.

    A helper is only started without a GPU and with at least two threads.

    Args:
        plan: Dependencies between stages, over the store that both processes record in.
        goal: The stage to be built in the end.
        settings: All settings, resolved.
        module: Module that the helper runs; it reads its request with :func:`worker_request`. Empty for no helper.
    """

    def __init__(self, plan: StageGraph, goal: str, settings: Section, module: str) -> None:
        self._plan, self._goal, self._settings = plan, goal, settings
        self._module = "" if os.environ.get(SWITCH) == "0" else module
        self._helper: subprocess.Popen[bytes] | None = None
        self._names: list[str] = []
        self._threads = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def before(self, name: str) -> None:
        """Start a helper for the stages independent of ``name``; call before building a missing stage here."""
        if not self._module or self._helper or not self._plan.stages[name].trains:
            return
        import torch

        threads = torch.get_num_threads()
        if threads < 2 or torch.cuda.is_available():
            return
        names = independent_stages(self._plan, self._goal, name, self._settings)
        if not names:
            return
        self._names = list(dict.fromkeys(each for goal in names for each in self._plan.missing(goal, self._settings)))
        self._threads = threads
        torch.set_num_threads(threads - threads // 2)
        self._helper = self._start(names, threads // 2)
        LOGGER.info(f"{', '.join(self._names)}: started in parallel with {name}, by process {self._helper.pid}")

    def _start(self, names: Sequence[str], threads: int) -> subprocess.Popen[bytes]:
        own = {"OMP_NUM_THREADS": str(threads), "MLFLOW_TRACKING_URI": self._plan.store.uri, "PYTHONUNBUFFERED": "1"}
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_RUN_ID"} | own
        # In a separate session, Ctrl-C reaches only this process, which terminates the helper once.
        helper = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        assert helper.stdin
        assert helper.stdout
        self._output = _HelperOutput(helper.stdout)
        with contextlib.suppress(BrokenPipeError):  # The helper has already died; `wait` handles that.
            helper.stdin.write(json.dumps({"stages": names, "settings": self._settings.model_dump()}).encode() + b"\n")
            helper.stdin.flush()
        return helper

    def wait(self, name: str) -> None:
        """Wait until the helper ends if it builds the stage ``name``, and show its output meanwhile."""
        if self._helper is None or name not in self._names:
            return
        if self._helper.poll() is None:
            LOGGER.info(f"{name}: process {self._helper.pid} is building it; waiting for it")
            self._output.repeat()
        code = self._helper.wait()
        self._output.join()
        if code:
            line = self._output.last()
            LOGGER.info(f"{name}: the parallel process ended with code {code}: {line}; continuing here")
        self._end()

    def _end(self) -> None:
        """Stop the helper if it still runs, and restore the number of threads."""
        if self._helper is None:
            return
        import torch

        self._helper.terminate()
        try:
            self._helper.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._helper.kill()
            self._helper.wait()
        self._output.join()
        assert self._helper.stdin
        with contextlib.suppress(BrokenPipeError):
            self._helper.stdin.close()
        self._helper, self._module = None, ""
        torch.set_num_threads(self._threads)


class _HelperOutput(threading.Thread):
    """Thread that reads a process's output, so that its pipe never fills up; optionally repeats it on stderr."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream, self._kept, self._repeats = stream, b"", False
        self.start()

    def run(self) -> None:
        with self._stream:
            while some := os.read(self._stream.fileno(), 1 << 16):
                self._kept = (self._kept + some)[-KEPT_BYTES:]
                if self._repeats:
                    sys.stderr.write(some.decode(errors="replace"))
                    sys.stderr.flush()

    def repeat(self) -> None:
        """Repeat the output on stderr from now on."""
        self._repeats = True

    def last(self) -> str:
        """The last non-empty line of the output."""
        lines = self._kept.decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


def worker_request(stream: IO[str]) -> tuple[list[str], Mapping[str, object]]:
    """Read a helper's request from its standard input: names of stages, and settings."""
    order = json.loads(stream.readline())
    return list(order["stages"]), order["settings"]
