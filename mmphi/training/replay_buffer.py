"""What a training on a stream has at hand: documents that came, and how often each was seen.

Every document is seen once at least and a given number of times at most: fresh text first, then what was seen least.
Up to four times, seeing text again is nearly as good as more of it (Muennighoff et al. 2023).
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass
class DocumentGroup:
    """Documents that came together, and leave together.

    Attributes:
        name: Of their shard.
        documents: Ids of each, one more than are predicted.
        seen: How often each was seen.
    """

    name: str
    documents: Sequence[Ids]
    seen: list[int] = field(default_factory=list)
    tokens: int = field(init=False)  # Predictions in them.

    def __post_init__(self) -> None:
        self.seen = self.seen or [0] * len(self.documents)
        self.tokens = sum(len(ids) - 1 for ids in self.documents)


class ReplayBuffer:
    """Documents at hand, and the order in which they are seen.

    Args:
        tokens: Predictions that are kept for being seen again; fresh text is taken beyond it.
        passes: How often a document is seen at most.
        seed: Of the order in which text is seen again.

    Attributes:
        times: Predictions that left, by how often they were seen.
    """

    def __init__(self, tokens: int, passes: int, seed: int) -> None:
        self.limit, self.passes, self.seed = tokens, passes, seed
        self.groups: deque[DocumentGroup] = deque()
        self.times: Counter[int] = Counter()
        self._queue: list[tuple[int, int, int, int]] = []  # Times seen, order, number of the group, place in it.
        self._first = self._arrived = 0  # Number of the first group, and of groups in all.
        self._current: tuple[int, int, int] | None = None  # Group, place and offset of what was seen in part.
        self.left: list[str] = []  # Groups that left since the last :meth:`gone`.

    def __len__(self) -> int:
        """Predictions at hand."""
        return sum(group.tokens for group in self.groups)

    @property
    def has_room(self) -> bool:
        """Whether fresh text is wanted: nothing at hand is fresh, so that what comes will be seen at once."""
        return not self._queue or self._queue[0][0] > 0

    @property
    def exhausted(self) -> bool:
        """Whether everything at hand was seen as often as it may be."""
        return self._current is None and not self._queue

    def add(self, name: str, documents: Sequence[Ids]) -> None:
        """Take documents in; what was seen and has no place any longer leaves."""
        self._enter(DocumentGroup(name, [ids for ids in documents if len(ids) > 1]))
        self._tidy()

    def _enter(self, group: DocumentGroup) -> None:
        self.groups.append(group)
        for place, seen in enumerate(group.seen):
            self._enqueue(self._arrived, place, seen)
        self._arrived += 1

    def _enqueue(self, number: int, place: int, seen: int) -> None:
        if seen >= self.passes:
            return
        order = number
        if seen:  # Fresh text comes in its order, old text in one that is drawn again each time.
            text = f"{self.seed}/{seen}/{self._group(number).name}/{place}"
            order = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
        heapq.heappush(self._queue, (seen, order, number, place))

    def _group(self, number: int) -> DocumentGroup:
        return self.groups[number - self._first]

    def take(self, count: int, more: Callable[[], bool]) -> list[Ids]:
        """Ids of the parts of documents that make up so many predictions: one more than predicted of each.

        Args:
            count: Of predictions.
            more: Called where fresh text is wanted; takes some in, or says that there is none. Where everything was
                seen as often as it may be it does not come back before there is some.
        """
        found = []
        while count:
            if self._current is None:
                while self.has_room and more():
                    pass
                self._current = self._next()
            number, place, offset = self._current
            group = self._group(number)
            ids = group.documents[place]
            taken = min(count, len(ids) - 1 - offset)
            found.append(ids[offset : offset + taken + 1])
            count -= taken
            self._current = number, place, offset + taken
            if offset + taken == len(ids) - 1:
                group.seen[place] += 1
                self._current = None
                self._enqueue(number, place, group.seen[place])
                self._tidy()
        return found

    def _next(self) -> tuple[int, int, int]:
        _, _, number, place = heapq.heappop(self._queue)
        return number, place, 0

    def _tidy(self) -> None:
        """Let the oldest groups leave that were seen often enough, or that there is no room for."""
        held = len(self)
        while self.groups and self._may_leave(self.groups[0], held > self.limit):
            group = self.groups.popleft()
            held -= group.tokens
            for ids, seen in zip(group.documents, group.seen, strict=True):
                self.times[seen] += len(ids) - 1
            self.left.append(group.name)
            if any(number == self._first for _, _, number, _ in self._queue):
                self._queue = [entry for entry in self._queue if entry[2] != self._first]
                heapq.heapify(self._queue)
            self._first += 1

    def _may_leave(self, group: DocumentGroup, crowded: bool) -> bool:
        if self._current is not None and self._current[0] == self._first:
            return False
        least = min(group.seen, default=self.passes)
        return least >= self.passes or (crowded and least >= 1)

    def gone(self) -> list[str]:
        """Groups that left since this was last asked."""
        names, self.left = self.left, []
        return names

    def counted(self) -> dict[int, int]:
        """Predictions by how often they were seen: of what left, and of what is at hand."""
        times = Counter(self.times)
        for group in self.groups:
            for ids, seen in zip(group.documents, group.seen, strict=True):
                times[seen] += len(ids) - 1
        return dict(sorted(times.items()))

    def state(self) -> dict[str, Any]:
        """All of it but the documents themselves."""
        current = None
        if self._current is not None:
            number, place, offset = self._current
            current = [number - self._first, place, offset]
        return {
            "groups": [{"name": group.name, "seen": list(group.seen)} for group in self.groups],
            "current": current,
            "times": {str(seen): count for seen, count in self.times.items()},
        }

    def load(self, state: dict[str, Any], documents: Callable[[str], Sequence[Ids]]) -> None:
        """Put a state back; ``documents`` gives those of a group by its name."""
        self.groups, self._queue, self.left = deque(), [], []
        self._first = self._arrived = 0
        self.times = Counter({int(seen): count for seen, count in state["times"].items()})
        self._current = tuple(state["current"]) if state["current"] is not None else None
        for group in state["groups"]:
            kept = [ids for ids in documents(group["name"]) if len(ids) > 1]
            self._enter(DocumentGroup(group["name"], kept, list(group["seen"])))
        if self._current is not None:  # It was taken from the queue already.
            self._queue = [entry for entry in self._queue if entry[2:] != self._current[:2]]
            heapq.heapify(self._queue)
