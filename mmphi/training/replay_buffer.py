"""Replay buffer of a text stream: recent documents, and how often each was trained on.

Every document is used at least once and at most a given number of times: fresh text first, then the least used text.
Up to four times, repeated text is nearly as good as new text (Muennighoff et al. 2023).
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
    """Documents of one shard, which are added and removed together.

    Attributes:
        name: Name of the shard.
        documents: Token IDs of each document, one more than predictions.
        seen: Number of times that each document was used.
    """

    name: str
    documents: Sequence[Ids]
    seen: list[int] = field(default_factory=list)
    tokens: int = field(init=False)  # Predictions in all documents.

    def __post_init__(self) -> None:
        self.seen = self.seen or [0] * len(self.documents)
        self.tokens = sum(len(ids) - 1 for ids in self.documents)


class ReplayBuffer:
    """Buffered documents, and the order in which they are used.

    Args:
        tokens: Predictions that are kept for reuse; fresh text is added beyond this limit.
        passes: Maximum number of times that a document is used.
        seed: Seed of the order of repeated text.

    Attributes:
        times: Predictions of removed documents, by number of uses.
    """

    def __init__(self, tokens: int, passes: int, seed: int) -> None:
        self.limit, self.passes, self.seed = tokens, passes, seed
        self.groups: deque[DocumentGroup] = deque()
        self.times: Counter[int] = Counter()
        self._queue: list[tuple[int, int, int, int]] = []  # Uses, order, group number, index in the group.
        self._first = self._arrived = 0  # Number of the first group, and of all groups added.
        self._current: tuple[int, int, int] | None = None  # Group number, index and offset of the partly used document.

    def __len__(self) -> int:
        """Predictions in the buffer."""
        return sum(group.tokens for group in self.groups)

    @property
    def has_room(self) -> bool:
        """Whether fresh text is wanted: no queued document is unused, so that new ones are used next."""
        return not self._queue or self._queue[0][0] > 0

    @property
    def exhausted(self) -> bool:
        """Whether every document was used the maximum number of times."""
        return self._current is None and not self._queue

    def add(self, name: str, documents: Sequence[Ids]) -> None:
        """Add documents, then remove old groups that are used up or exceed the limit."""
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
        if seen:  # Fresh text keeps its order; repeated text has a new pseudorandom order each time.
            text = f"{self.seed}/{seen}/{self._group(number).name}/{place}"
            order = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
        heapq.heappush(self._queue, (seen, order, number, place))

    def _group(self, number: int) -> DocumentGroup:
        return self.groups[number - self._first]

    def take(self, count: int, more: Callable[[], bool]) -> list[Ids]:
        """Returns token IDs of document parts: ``count`` predictions, and one more ID per part than predictions.

        Args:
            count: Number of predictions.
            more: Called when fresh text is wanted; adds some and returns True, or returns False if none is available.
                If the buffer is exhausted, it must not return before it has added some.
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
        """Remove the oldest groups that are used up, or that exceed the limit and were used at least once."""
        held = len(self)
        while self.groups and self._may_leave(self.groups[0], held > self.limit):
            group = self.groups.popleft()
            held -= group.tokens
            for ids, seen in zip(group.documents, group.seen, strict=True):
                self.times[seen] += len(ids) - 1
            if any(number == self._first for _, _, number, _ in self._queue):
                self._queue = [entry for entry in self._queue if entry[2] != self._first]
                heapq.heapify(self._queue)
            self._first += 1

    def _may_leave(self, group: DocumentGroup, crowded: bool) -> bool:
        if self._current is not None and self._current[0] == self._first:
            return False
        least = min(group.seen, default=self.passes)
        return least >= self.passes or (crowded and least >= 1)

    def counted(self) -> dict[int, int]:
        """Returns predictions by number of uses, of removed and of buffered documents."""
        times = Counter(self.times)
        for group in self.groups:
            for ids, seen in zip(group.documents, group.seen, strict=True):
                times[seen] += len(ids) - 1
        return dict(sorted(times.items()))

    def state(self) -> dict[str, Any]:
        """Returns the state, without the documents themselves."""
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
        """Restore a state; ``documents`` returns those of a group by its name."""
        self.groups, self._queue = deque(), []
        self._first = self._arrived = 0
        self.times = Counter({int(seen): count for seen, count in state["times"].items()})
        self._current = tuple(state["current"]) if state["current"] is not None else None
        for group in state["groups"]:
            kept = [ids for ids in documents(group["name"]) if len(ids) > 1]
            self._enter(DocumentGroup(group["name"], kept, list(group["seen"])))
        if self._current is not None:  # It was not in the queue when the state was saved.
            self._queue = [entry for entry in self._queue if entry[2:] != self._current[:2]]
            heapq.heapify(self._queue)
