"""The bounded place between those who write and those who read: a folder, or any URL that fsspec knows."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from mmphi.errors import DataError, StoreError, disk_is_full
from mmphi.textgen.shards import Document, ShardName, decode_shard

SHARDS, TAKEN, BAD, STARTS = "shards", "taken", "bad", "starts"
WAIT_S = 0.5
PATIENCE_S = 600.0
ANSWER_S = 60.0  # Of one request; s3fs asks several times by itself before.
NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError")
T = TypeVar("T")


@dataclass(frozen=True)
class QueuedShard:
    """A shard in the spool.

    Attributes:
        name: Its name.
        bytes: Compressed.
    """

    name: ShardName
    bytes: int


class ShardQueue:
    """Shards that were written and not yet let go.

    What waits to be read is limited; what was taken is its reader's until that lets go of it, and in the way of
    nobody who writes. A shard is there whole or not at all. What does not answer, or has no room, is asked again until
    ``patience_s`` is over: a bucket may be gone for minutes, and a disk that is full now may have room when a reader
    has let go of something.

    Args:
        url: Folder, or URL of a bucket.
        limit: Bytes that all shards which wait may have together; 0 for any.
        say: Told what is waited for, once each time.
        patience_s: How long anything is waited for.
        stopping: Asked while waiting; waiting ends when it says so.
        **options: Of the file system, such as ``endpoint_url``.
    """

    def __init__(
        self,
        url: str,
        limit: int = 0,
        *,
        say: Callable[[str], None] = print,
        patience_s: float = PATIENCE_S,
        stopping: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> None:
        import fsspec.asyn

        self.url, self.limit, self.say, self.patience_s, self.stopping = url, limit, say, patience_s, stopping
        try:
            found, root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{url} is no spool: {error}", "give a folder, or a URL that fsspec knows") from error
        self.files: Any = found
        self.root = str(root).rstrip("/")
        self.waited_s = 0.0
        # aiohttp waits without end for a server that was asked whether it would take a file, and says nothing.
        self._within = {"timeout": ANSWER_S} if isinstance(found, fsspec.asyn.AsyncFileSystem) else {}
        self._local = "file" in (found.protocol if isinstance(found.protocol, tuple) else (found.protocol,))
        if self._local:
            for name in (SHARDS, TAKEN, BAD, STARTS):
                self.files.makedirs(f"{self.root}/{name}", exist_ok=True)

    def put(self, name: ShardName, content: bytes) -> bool:
        """Write a shard as soon as there is room for it.

        Returns:
            Whether it was written: not where waiting was ended.
        """
        # For as long as it takes: readers that are slow are nothing wrong.
        if not self._until(lambda: self._has_room(len(content)), "readers to let go of something", math.inf):
            return False
        return self._asked(lambda: self._write(f"{self.root}/{SHARDS}/{name}", content)) is not None

    def held(self) -> list[QueuedShard]:
        """All shards that wait, stream by stream in the order of their numbers."""
        return sorted(self._asked(lambda: self._list(SHARDS)) or [], key=lambda held: held.name)

    def taken(self) -> list[QueuedShard]:
        """All shards that were taken and not let go of, in the same order."""
        return sorted(self._asked(lambda: self._list(TAKEN)) or [], key=lambda held: held.name)

    def read(self, name: ShardName) -> list[Document]:
        """The documents of a shard, whether it waits or was taken.

        Raises:
            DataError: If it is broken or gone.
        """
        for place in (TAKEN, SHARDS):
            with contextlib.suppress(FileNotFoundError):
                content = self._asked(partial(self.files.cat_file, f"{self.root}/{place}/{name}", **self._within))
                if content is None:
                    raise StoreError(f"{name} was not read: waiting was ended")
                return decode_shard(content, str(name))
        raise DataError(f"{name} is not in the spool {self.url}")

    def take(self, name: ShardName) -> list[Document]:
        """The documents of a shard that waits; it makes room for others, and stays until it is let go of.

        Raises:
            DataError: If it is broken; it is set aside then.
        """
        try:
            documents = self.read(name)
        except DataError as error:
            self._move(name, SHARDS, BAD)
            raise DataError(f"{error.what}: set aside in {self.root}/{BAD}") from error
        self._move(name, SHARDS, TAKEN)
        return documents

    def count_as_taken(self, name: ShardName) -> None:
        """Count a shard that waits as taken, unread."""
        self._move(name, SHARDS, TAKEN)

    def put_back(self, name: ShardName) -> None:
        """Let a shard that was taken wait again."""
        self._move(name, TAKEN, SHARDS)

    def let_go(self, name: ShardName) -> None:
        """Delete a shard; one that is gone already is no error."""
        for place in (SHARDS, TAKEN):
            self._asked(partial(self._delete, f"{self.root}/{place}/{name}"))

    def begin_stream(self, place: str, after: int = 0) -> str:
        """Name of a stream that nobody had before; it is noted here, where all who write to this spool see it.

        Args:
            place: Who writes it: host and number of the generator, ``host-3``.
            after: Number of a start that is noted elsewhere.

        Raises:
            StoreError: If the spool does not answer.
        """
        last = after
        for name in (SHARDS, TAKEN, BAD, STARTS):
            for each in self._asked(partial(self._names, name)) or []:
                if match := re.match(rf"{re.escape(place)}-(\d+)(?:-|$)", each):
                    last = max(last, int(match[1]))
        stream = f"{place}-{last + 1}"
        if self._asked(lambda: self._write(f"{self.root}/{STARTS}/{stream}", b"begun\n")) is None:
            raise StoreError(f"{stream} was not begun: waiting was ended")
        return stream

    def size(self) -> int:
        """Bytes of all shards that wait."""
        return sum(held.bytes for held in self.held())

    def _has_room(self, size: int) -> bool:
        if not self.limit:
            return True
        held = self.size()
        return held + size <= self.limit or not held  # One that is larger than the spool alone goes alone.

    def _names(self, place: str) -> list[str]:
        """Names of all files of a folder."""
        self.files.invalidate_cache()
        try:
            found = self.files.ls(f"{self.root}/{place}", detail=False, **self._within)
        except FileNotFoundError:
            return []
        return [str(each).rsplit("/", 1)[-1] for each in found]

    def _list(self, place: str) -> list[QueuedShard]:
        self.files.invalidate_cache()
        try:
            found = self.files.ls(f"{self.root}/{place}", detail=True, **self._within)
        except FileNotFoundError:
            return []  # A bucket has no folders before there is something in them.
        named = ((ShardName.parse(each["name"].rsplit("/", 1)[-1]), each["size"]) for each in found)
        return [QueuedShard(name, int(size or 0)) for name, size in named if name is not None]

    def _write(self, path: str, content: bytes) -> bool:
        if not self._local:
            try:
                self.files.pipe_file(path, content, **self._within)  # Object stores show an object when it is whole.
            except FileNotFoundError as error:
                raise StoreError(f"there is no bucket for the spool {self.url}: {error}", "make it first") from error
            return True
        part = f"{path}.part"
        try:
            self.files.pipe_file(part, content)
            self.files.mv(part, path)
        except OSError:
            if self.files.exists(part):
                self.files.rm_file(part)  # Half of it would take the room that is waited for.
            raise
        return True

    def _move(self, name: ShardName, before: str, after: str) -> None:
        def moved() -> bool:
            source, target = f"{self.root}/{before}/{name}", f"{self.root}/{after}/{name}"
            with contextlib.suppress(FileNotFoundError):  # As after an answer that was lost on its way.
                if self._local:
                    self.files.mv(source, target)
                else:
                    self.files.cp_file(source, target, **self._within)
                    self.files.rm_file(source, **self._within)
            return True

        self._asked(moved)

    def _delete(self, path: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(path, **self._within)
        return True

    def _asked(self, act: Callable[[], T]) -> T | None:
        """What a file system says, asked again while it does not answer; ``None`` where waiting was ended."""
        found: list[T] = []
        why: list[Exception] = []

        def tried() -> bool:
            try:
                found.append(act())
            except (FileNotFoundError, StoreError):
                raise
            except Exception as error:  # Each file system has errors of its own.
                if self._local and not disk_is_full(error):
                    raise
                if isinstance(error, PermissionError) or type(error).__name__ in NO_KEYS:
                    raise StoreError(
                        f"the spool {self.url} may not be used: {error}", "see to the credentials and what they allow"
                    ) from error
                why[:] = [error]
                return False
            return True

        if self._until(tried, lambda: "the disk to have room" if disk_is_full(why[0]) else f"an answer ({why[0]})"):
            return found[0]
        return None

    def _until(
        self, happened: Callable[[], bool], what: str | Callable[[], str], patience_s: float | None = None
    ) -> bool:
        """Wait until something happened; whether it did, and waiting was not ended."""
        begun, pause = time.monotonic(), WAIT_S
        while not happened():
            waited = time.monotonic() - begun
            why = what if isinstance(what, str) else what()
            if waited > (self.patience_s if patience_s is None else patience_s):
                raise StoreError(f"the spool {self.url} waited {waited:.0f} s for {why}", "see to it, and start again")
            if pause == WAIT_S:
                self.say(f"the spool {self.url} waits for {why}")
            if self.stopping():
                return False
            time.sleep(pause)
            self.waited_s += pause
            pause = min(2 * pause, 10.0)
        return True
