"""Two trainings that need nothing of one another, at once: one here, one in a helping process of the same machine.

Without an accelerator, matrices as small as those of a model trained from nothing do not fill the cores: two trainings,
each with half of the threads, take hardly longer than one of them with all. The helper records in the same store, so
that what it has built is found there; what it has not, because it failed or was killed, is built here after all.
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

SWITCH = "MMPHI_BESIDE"  # 0: one after the other.
PATIENCE_S = 120.0  # What a helper that is stopped may take to save what it has.
KEPT_BYTES = 2000


def independent_stages(plan: StageGraph, goal: str, name: str, settings: Section) -> list[str]:
    """What a goal lacks that neither needs a stage nor is needed by it, and is worth another process.

    Args:
        plan: Says what needs what, and what is missing.
        goal: What is to be built in the end.
        name: A missing stage on the way there whose own upstream stages are built.
        settings: All settings.

    Returns:
        Names of the stages that nothing else among them is built on, upstream first; empty where none of them trains,
        or the stage itself does not: then one process would soon wait for the other.
    """
    if not plan.stages[name].trains:
        return []
    needed = {each: plan.order(each, settings) for each in plan.missing(goal, settings)}
    free = [each for each, order in needed.items() if name not in order and each not in plan.order(name, settings)]
    if not any(plan.stages[each].trains for each in free):
        return []
    return [each for each in free if not any(each in needed[other] for other in free if other != each)]


class BackgroundBuilder:
    """What another process builds while this one builds towards a goal; none where the machine would not gain by it.

    Args:
        plan: What needs what, over the store that both record in.
        goal: What is to be built in the end.
        settings: All settings, resolved.
        module: Module that the helper runs, which reads its order as :meth:`before` writes it; empty for no helper.
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
        """To be called before a missing stage is built here: has a helper build what is independent of it."""
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
        # A session of its own: Ctrl-C reaches this process alone, which tells the helper once.
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
        self._said = _Said(helper.stdout)
        with contextlib.suppress(BrokenPipeError):  # It is dead already, which `wait` finds out.
            helper.stdin.write(json.dumps({"stages": names, "settings": self._settings.model_dump()}).encode() + b"\n")
            helper.stdin.flush()
        return helper

    def wait(self, name: str) -> None:
        """Wait for the helper where it builds a stage, and show how far it is meanwhile."""
        if self._helper is None or name not in self._names:
            return
        if self._helper.poll() is None:
            LOGGER.info(f"{name}: process {self._helper.pid} is building it; waiting for it")
            self._said.aloud()
        code = self._helper.wait()
        self._said.join()
        if code:
            line = self._said.last()
            LOGGER.info(f"{name}: the parallel process ended with code {code}: {line}; continuing here")
        self._end()

    def _end(self) -> None:
        """Stop the helper, where it still runs, and use all threads again."""
        if self._helper is None:
            return
        import torch

        self._helper.terminate()
        try:
            self._helper.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._helper.kill()
            self._helper.wait()
        self._said.join()
        assert self._helper.stdin
        with contextlib.suppress(BrokenPipeError):
            self._helper.stdin.close()
        self._helper, self._module = None, ""
        torch.set_num_threads(self._threads)


class _Said(threading.Thread):
    """Reads what a process says, so that it never waits to be read; repeats it on stderr where asked to."""

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

    def aloud(self) -> None:
        """Repeat from here on."""
        self._repeats = True

    def last(self) -> str:
        """The last line that is not empty."""
        lines = self._kept.decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


def worker_request(stream: IO[str]) -> tuple[list[str], Mapping[str, object]]:
    """What a helper is asked for on its standard input: stages, and settings."""
    order = json.loads(stream.readline())
    return list(order["stages"]), order["settings"]
