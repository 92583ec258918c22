"""Whoever reads a spool: every shard once, each stream in the order of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping

from mmphi.errors import DataError
from mmphi.textgen.shard_queue import QueuedShard, ShardQueue
from mmphi.textgen.shards import Document, ShardName


class ShardReader:
    """Takes shards out of a spool; what was taken stays there until it is let go of.

    Args:
        spool: Where from.
        position: To go on from: as :attr:`position` was. Without one, nothing is changed until :meth:`go_on`.
        say: Told of shards that are broken or missing.

    Attributes:
        position: By stream, the number of the shard that comes next.
        broken: Shards that were set aside, or are missing.
    """

    def __init__(
        self, spool: ShardQueue, position: Mapping[str, int] | None = None, say: Callable[[str], None] = print
    ) -> None:
        self.spool, self.say = spool, say
        self.position: dict[str, int] = {}
        self.broken = 0
        if position is not None:
            self.go_on(position)

    def go_on(self, position: Mapping[str, int]) -> None:
        """Go on from a position: what was taken after it waits again, what waits before it counts as taken."""
        self.position = dict(position)
        for held in self.spool.taken():  # By a reader that was killed before it could note that.
            if held.name.number >= self.position.get(held.name.stream, 0):
                self.spool.put_back(held.name)
        for held in self.spool.held():  # Put back when this reader went on from an earlier position.
            if held.name.number < self.position.get(held.name.stream, 0):
                self.spool.count_as_taken(held.name)

    def waiting(self) -> list[QueuedShard]:
        """Shards that were not taken yet: the first of every stream, then the second of every stream, and so on."""
        left = [h for h in self.spool.held() if h.name.number >= self.position.get(h.name.stream, 0)]
        return sorted(left, key=lambda h: (h.name.number - self.position.get(h.name.stream, 0), h.name.stream))

    def take(self, name: ShardName) -> list[Document]:
        """The documents of a shard that waits; none where it is broken, which is counted and told."""
        expected = self.position.get(name.stream, 0)
        if name.number > expected:  # A stream is written in order: what is not there by now was lost or set aside.
            self.broken += name.number - expected
            self.say(f"{name.number - expected} shards of {name.stream} before {name} are missing")
        self.position[name.stream] = name.number + 1
        try:
            return self.spool.take(name)
        except DataError as error:
            self.broken += 1
            self.say(error.what)
            return []

    def everything(self) -> Iterator[tuple[ShardName, list[Document]]]:
        """All shards that wait now, one after the other."""
        for held in self.waiting():
            yield held.name, self.take(held.name)

    def let_go_before(self, position: Mapping[str, int], but: Container[str] = ()) -> None:
        """Delete every shard before a position, but some."""
        for held in [*self.spool.taken(), *self.spool.held()]:
            if held.name.number < position.get(held.name.stream, 0) and str(held.name) not in but:
                self.spool.let_go(held.name)

    def taken_between(
        self, since: Mapping[str, int], until: Mapping[str, int]
    ) -> Iterator[tuple[ShardName, list[Document]]]:
        """The shards that were taken, from one position on and before another, that are still there."""
        for held in self.spool.taken():
            if since.get(held.name.stream, 0) <= held.name.number < until.get(held.name.stream, 0):
                yield held.name, self.spool.read(held.name)
