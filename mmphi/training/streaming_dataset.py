"""Batches of a training on text that is still being generated."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from mmphi.errors import DataError
from mmphi.textgen.shard_reader import ShardReader
from mmphi.textgen.shards import Document, ShardName
from mmphi.training.lm_dataset import pack_row, stack_rows
from mmphi.training.replay_buffer import Ids, ReplayBuffer

LOOK_S = 1.0
KEPT = 4  # Resume states that are kept: the loop fetches batches before earlier steps are complete.
PATIENCE_S = 1800.0


class StreamingDataset(Dataset[dict[str, Tensor]]):
    """Batches of every optimiser step, in order, from documents as they arrive.

    Args:
        reader: Reader of the shard queue.
        encode: Maps a document to its token IDs, including begin and end tokens.
        window: Replay buffer.
        context: Predictions per row.
        rows: Rows per step.
        passes: Forward passes per step; must divide ``rows``.
        steps: Maximum number of steps.
        alive: Called while no shard waits, to restart generators that died; may raise to end the training.

    Attributes:
        waited_s: Seconds of waiting for text with an exhausted buffer.
    """

    def __init__(
        self,
        reader: ShardReader,
        encode: Callable[[Document], Ids],
        window: ReplayBuffer,
        *,
        context: int,
        rows: int,
        passes: int,
        steps: int,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        if rows % passes:
            raise ValueError(f"{rows} rows cannot be spread evenly over {passes} forward passes")
        self.reader, self.encode, self.window = reader, encode, window
        self.context, self.rows, self.passes, self.steps = context, rows, passes, steps
        self.alive, self.waited_s = alive, 0.0
        self._states: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._next, self._look = 0, 0.0

    def __len__(self) -> int:
        return self.steps * self.passes

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index != self._next:
            raise IndexError(
                f"batch {index} was requested, but the next one is {self._next}: a stream can only be read in order"
            )
        if index % self.passes == 0:
            self._remember(index // self.passes)
        rows = [pack_row(self.window.take(self.context, self._more)) for _ in range(self.rows // self.passes)]
        self._next += 1
        if self._next % self.passes == 0:
            self._remember(self._next // self.passes)
        return stack_rows(rows, self.rows * self.context)

    def state(self, step: int) -> dict[str, Any]:
        """Returns the resume state after a step: replay buffer and position, before the batches of the next step."""
        return self._states[step]

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Resume after a step."""
        self.reader.go_on(state["position"])

        def documents(name: str) -> Sequence[Ids]:
            shard = ShardName.parse(name)
            assert shard is not None
            return [self.encode(document) for document in self.reader.spool.read(shard)]

        self.window.load(state["window"], documents)
        self.waited_s = float(state["waited_s"])
        self._next = step * self.passes
        self._states.clear()
        self._remember(step)

    def _remember(self, step: int) -> None:
        state = {"position": dict(self.reader.position), "window": self.window.state(), "waited_s": self.waited_s}
        self._states[step] = state
        while len(self._states) > KEPT:
            self._states.popitem(last=False)

    def _more(self) -> bool:
        """Add one shard to the buffer if one is available; if the buffer is exhausted, wait for one."""
        begun, idle = time.monotonic(), self.window.exhausted
        while True:
            now = time.monotonic()
            if now >= self._look or self.window.exhausted:
                waiting = self.reader.waiting()
                if waiting:
                    name = waiting[0].name
                    self.window.add(str(name), [self.encode(document) for document in self.reader.take(name)])
                    self.waited_s += (now - begun) * idle
                    return True
                self._look = now + LOOK_S
                self.alive()
            if not self.window.exhausted:
                return False
            if now - begun > PATIENCE_S:
                raise DataError(
                    f"no text has arrived in the spool {self.reader.spool.url} for {PATIENCE_S / 60:.0f} minutes",
                    "start generators with `mmphi generators --spool URL`, or set textgen.generators",
                )
            time.sleep(LOOK_S / 4)
