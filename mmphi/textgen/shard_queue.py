"""Bounded shard queue between generators and a reader: a folder, or any URL that fsspec supports."""

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
ANSWER_S = 60.0  # Timeout of one request, including s3fs's own retries.
NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError")
T = TypeVar("T")


@dataclass(frozen=True)
class QueuedShard:
    """A shard in the queue.

    Attributes:
        name: Name of the shard.
        bytes: Compressed size.
    """

    name: ShardName
    bytes: int


class ShardQueue:
    """Queue of shards that were written and not yet deleted.

    The total size of waiting shards is limited. Shards that a reader has taken stay until the reader deletes them, and
    do not count towards the limit. Shards are written atomically. Failed requests, and writes to a full disk, are
    retried for up to ``patience_s``: a bucket may be unavailable for minutes, and readers may free disk space.

    Args:
        url: Folder, or URL of a bucket.
        limit: Maximum total size of waiting shards, in bytes; 0 for no limit.
        say: Receives a message at the start of each wait.
        patience_s: Maximum duration of retries, in seconds.
        stopping: Called while waiting; waiting ends when it returns True.
        **options: Options of the file system, such as ``endpoint_url``.
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
            raise StoreError(
                f"{url} cannot be used as a spool: {error}", "give a folder, or a URL that fsspec supports"
            ) from error
        self.files: Any = found
        self.root = str(root).rstrip("/")
        self.waited_s = 0.0
        # Without it, aiohttp waits forever for a server that does not answer whether it accepts an upload.
        self._within = {"timeout": ANSWER_S} if isinstance(found, fsspec.asyn.AsyncFileSystem) else {}
        self._local = "file" in (found.protocol if isinstance(found.protocol, tuple) else (found.protocol,))
        if self._local:
            for name in (SHARDS, TAKEN, BAD, STARTS):
                self.files.makedirs(f"{self.root}/{name}", exist_ok=True)

    def put(self, name: ShardName, content: bytes) -> bool:
        """Write a shard as soon as there is room for it.

        Returns:
            Whether it was written; False if ``stopping`` ended the wait.
        """
        # Without a time limit: slow readers are not an error.
        if not self._until(lambda: self._has_room(len(content)), "readers to free space", math.inf):
            return False
        return self._retried(lambda: self._write(f"{self.root}/{SHARDS}/{name}", content)) is not None

    def held(self) -> list[QueuedShard]:
        """Returns all waiting shards, sorted by stream and number."""
        return sorted(self._retried(lambda: self._list(SHARDS)) or [], key=lambda held: held.name)

    def taken(self) -> list[QueuedShard]:
        """Returns all shards that were taken and not deleted, sorted by stream and number."""
        return sorted(self._retried(lambda: self._list(TAKEN)) or [], key=lambda held: held.name)

    def read(self, name: ShardName) -> list[Document]:
        """Returns the documents of a shard, waiting or taken.

        Raises:
            DataError: If the shard is damaged or missing.
        """
        for place in (TAKEN, SHARDS):
            with contextlib.suppress(FileNotFoundError):
                content = self._retried(partial(self.files.cat_file, f"{self.root}/{place}/{name}", **self._within))
                if content is None:
                    raise StoreError(f"{name} was not read: stopped while waiting for the spool")
                return decode_shard(content, str(name))
        raise DataError(f"{name} is not in the spool {self.url}")

    def take(self, name: ShardName) -> list[Document]:
        """Returns the documents of a waiting shard, which counts as taken from then on.

        Raises:
            DataError: If the shard is missing or damaged; a damaged one is moved to the folder ``bad``.
        """
        try:
            documents = self.read(name)
        except DataError as error:
            self._move(name, SHARDS, BAD)
            raise DataError(f"{error.what}: moved to {self.root}/{BAD}") from error
        self._move(name, SHARDS, TAKEN)
        return documents

    def count_as_taken(self, name: ShardName) -> None:
        """Mark a waiting shard as taken, without reading it."""
        self._move(name, SHARDS, TAKEN)

    def put_back(self, name: ShardName) -> None:
        """Return a taken shard to the waiting ones."""
        self._move(name, TAKEN, SHARDS)

    def let_go(self, name: ShardName) -> None:
        """Delete a shard; a missing one is not an error."""
        for place in (SHARDS, TAKEN):
            self._retried(partial(self._delete, f"{self.root}/{place}/{name}"))

    def begin_stream(self, place: str, after: int = 0) -> str:
        """Returns a new, unused stream name, and records it in the queue, which all writers share.

        Args:
            place: Host and number of the generator, such as ``host-3``.
            after: Highest start number that is recorded elsewhere.

        Raises:
            StoreError: If the file system does not answer, or ``stopping`` ended the wait.
        """
        last = after
        for name in (SHARDS, TAKEN, BAD, STARTS):
            for each in self._retried(partial(self._names, name)) or []:
                if match := re.match(rf"{re.escape(place)}-(\d+)(?:-|$)", each):
                    last = max(last, int(match[1]))
        stream = f"{place}-{last + 1}"
        if self._retried(lambda: self._write(f"{self.root}/{STARTS}/{stream}", b"begun\n")) is None:
            raise StoreError(f"{stream} was not started: stopped while waiting for the spool")
        return stream

    def size(self) -> int:
        """Returns the total size of all waiting shards, in bytes."""
        return sum(held.bytes for held in self.held())

    def _has_room(self, size: int) -> bool:
        if not self.limit:
            return True
        held = self.size()
        return held + size <= self.limit or not held  # A shard above the limit is accepted alone.

    def _names(self, place: str) -> list[str]:
        """Names of all files in a folder."""
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
            return []  # A bucket has no empty folders.
        named = ((ShardName.parse(each["name"].rsplit("/", 1)[-1]), each["size"]) for each in found)
        return [QueuedShard(name, int(size or 0)) for name, size in named if name is not None]

    def _write(self, path: str, content: bytes) -> bool:
        if not self._local:
            try:
                self.files.pipe_file(path, content, **self._within)  # Object stores write objects atomically.
            except FileNotFoundError as error:
                raise StoreError(
                    f"there is no bucket for the spool {self.url}: {error}", "create the bucket first"
                ) from error
            return True
        part = f"{path}.part"
        try:
            self.files.pipe_file(part, content)
            self.files.mv(part, path)
        except OSError:
            if self.files.exists(part):
                self.files.rm_file(part)  # It would occupy the space that is waited for.
            raise
        return True

    def _move(self, name: ShardName, before: str, after: str) -> None:
        def moved() -> bool:
            source, target = f"{self.root}/{before}/{name}", f"{self.root}/{after}/{name}"
            with contextlib.suppress(FileNotFoundError):  # Moved before, but the response was lost.
                if self._local:
                    self.files.mv(source, target)
                else:
                    self.files.cp_file(source, target, **self._within)
                    self.files.rm_file(source, **self._within)
            return True

        self._retried(moved)

    def _delete(self, path: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(path, **self._within)
        return True

    def _retried(self, act: Callable[[], T]) -> T | None:
        """Result of a file system call, which is retried while it fails; ``None`` if ``stopping`` ended the wait."""
        found: list[T] = []
        why: list[Exception] = []

        def tried() -> bool:
            try:
                found.append(act())
            except (FileNotFoundError, StoreError):
                raise
            except Exception as error:  # Error types differ between file systems.
                if self._local and not disk_is_full(error):
                    raise
                if isinstance(error, PermissionError) or type(error).__name__ in NO_KEYS:
                    raise StoreError(
                        f"access to the spool {self.url} was denied: {error}",
                        "check the credentials and their permissions",
                    ) from error
                why[:] = [error]
                return False
            return True

        if self._until(tried, lambda: "free disk space" if disk_is_full(why[0]) else f"an answer ({why[0]})"):
            return found[0]
        return None

    def _until(
        self, happened: Callable[[], bool], what: str | Callable[[], str], patience_s: float | None = None
    ) -> bool:
        """Wait until ``happened`` returns True; returns False if ``stopping`` ended the wait."""
        begun, pause = time.monotonic(), WAIT_S
        while not happened():
            waited = time.monotonic() - begun
            why = what if isinstance(what, str) else what()
            if waited > (self.patience_s if patience_s is None else patience_s):
                raise StoreError(
                    f"the spool {self.url} waited {waited:.0f} s for {why}", "fix the cause, and start again"
                )
            if pause == WAIT_S:
                self.say(f"the spool {self.url} waits for {why}")
            if self.stopping():
                return False
            time.sleep(pause)
            self.waited_s += pause
            pause = min(2 * pause, 10.0)
        return True
