"""Files that are compressed, read as if they were not."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

HEAD = 1 << 16  # Bytes that tell what a file is.


def plain_name(file: Path) -> str:
    """A file's name without what says that it is compressed."""
    return file.name.removesuffix(".gz").removesuffix(".zst")


class _Zstandard(io.RawIOBase):
    """Frames of zstandard as one stream; unlike the library's own reader it says so where the last one is cut off."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self._frame, self._ready, self._begun = (
            file,
            zstandard.ZstdDecompressor().decompressobj(),
            b"",
            False,
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            given = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
            given = given or self.file.read(HEAD)
            if not given:
                if self._begun:
                    raise EOFError("cut off")
                return 0
            self._begun, self._ready = True, self._frame.decompress(given)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextmanager
def open_compressed(file: Path) -> Iterator[IO[bytes]]:
    """A file's content, decompressed where its name says so, with what begins it to be peeked at."""
    with ExitStack() as open_:
        stream: Any = open_.enter_context(file.open("rb", HEAD))
        if file.suffix == ".gz":
            stream = open_.enter_context(gzip.GzipFile(fileobj=stream))
        if file.suffix == ".zst":
            stream = open_.enter_context(io.BufferedReader(_Zstandard(stream), HEAD))
        yield stream
