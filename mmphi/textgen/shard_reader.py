"""Reader of a shard queue: every shard once, each stream in the order of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping

from mmphi.errors import DataError
from mmphi.textgen.shard_queue import QueuedShard, ShardQueue
from mmphi.textgen.shards import Document, ShardName


class ShardReader:
    """Takes shards from a queue; taken shards stay in the queue until they are deleted.

    Args:
        spool: Queue to read.
        position: A former :attr:`position` to resume from. Without one, the queue is unchanged until :meth:`go_on`.
        say: Receives messages about damaged or missing shards.

    Attributes:
        position: Number of the next shard, by stream.
        broken: Number of damaged or missing shards.
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
        """Resume from a position: taken shards after it wait again, waiting shards before it count as taken."""
        self.position = dict(position)
        for held in self.spool.taken():  # By a reader that was killed before it saved its position.
            if held.name.number >= self.position.get(held.name.stream, 0):
                self.spool.put_back(held.name)
        for held in self.spool.held():  # Put back by an earlier resume from a lower position.
            if held.name.number < self.position.get(held.name.stream, 0):
                self.spool.count_as_taken(held.name)

    def waiting(self) -> list[QueuedShard]:
        """Returns the shards to read next: the first of every stream, then the second of every stream, and so on."""
        left = [h for h in self.spool.held() if h.name.number >= self.position.get(h.name.stream, 0)]
        return sorted(left, key=lambda h: (h.name.number - self.position.get(h.name.stream, 0), h.name.stream))

    def take(self, name: ShardName) -> list[Document]:
        """Returns the documents of a waiting shard; empty if it is damaged, which is counted and reported."""
        expected = self.position.get(name.stream, 0)
        if name.number > expected:  # Streams are written in order: skipped shards were lost or set aside.
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
        """Yields the name and the documents of all shards that wait now, and takes them."""
        for held in self.waiting():
            yield held.name, self.take(held.name)

    def let_go_before(self, position: Mapping[str, int], but: Container[str] = ()) -> None:
        """Delete every shard before a position, except those named in ``but``."""
        for held in [*self.spool.taken(), *self.spool.held()]:
            if held.name.number < position.get(held.name.stream, 0) and str(held.name) not in but:
                self.spool.let_go(held.name)

    def taken_between(
        self, since: Mapping[str, int], until: Mapping[str, int]
    ) -> Iterator[tuple[ShardName, list[Document]]]:
        """Yields the taken shards from position ``since`` on and before ``until`` that were not deleted."""
        for held in self.spool.taken():
            if since.get(held.name.stream, 0) <= held.name.number < until.get(held.name.stream, 0):
                yield held.name, self.spool.read(held.name)
