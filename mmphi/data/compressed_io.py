"""Transparent reading of gzip and Zstandard files."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

HEAD = 1 << 16  # Bytes by which the type of a file is detected; size of the read buffers.


def plain_name(file: Path) -> str:
    """Returns a file's name without the suffix of its compression."""
    return file.name.removesuffix(".gz").removesuffix(".zst")


class _Zstandard(io.RawIOBase):
    """Zstandard frames as one stream; unlike the library's reader, raises EOFError if the last one is truncated."""

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
    """Open a file for reading, decompressed according to its suffix; the stream has ``peek``."""
    with ExitStack() as open_:
        stream: Any = open_.enter_context(file.open("rb", HEAD))
        if file.suffix == ".gz":
            stream = open_.enter_context(gzip.GzipFile(fileobj=stream))
        if file.suffix == ".zst":
            stream = open_.enter_context(io.BufferedReader(_Zstandard(stream), HEAD))
        yield stream
