"""Audio decoding in a separate process, so that a damaged recording cannot crash a server.

A damaged file may make FFmpeg's libraries access invalid memory, decode for hours or exhaust memory. In this case only
the decoding process ends: the request that sent the file is refused, and the next recording gets a new process.

The process reads requests from its standard input, each a line of JSON, followed by the content of the recording if it
is in memory. It answers each with a line of JSON and the samples, float32 in native byte order.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmphi.errors import AudioError

LIMIT_S = 60.0  # Time limit of decoding one recording.
MEMORY_BYTES = 4 * 1024**3  # Limit of the process's address space.
CHECK_S = 0.2  # Interval of calls of the caller's check.
CHUNK = 1 << 20
HEADER = 56  # Bytes before the samples in a WAV file that :func:`wav` returns.
RATE = 16_000  # Equals mmphi.data.audio.RATE; that module is imported in the child process only.


class Decoder:
    """Decodes one recording at a time in a child process, which starts on demand and is replaced after it ends.

    Args:
        limit_s: Time limit of one recording, in seconds.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def decode(self, source: Path | bytes, max_seconds: float, check: Callable[[], None] = lambda: None) -> bytes:
        """Decode a recording.

        Args:
            source: Path of a file, or its content.
            max_seconds: Maximum duration in seconds; longer recordings are refused.
            check: Called every :data:`CHECK_S` seconds of waiting; an exception that it raises ends the decoding.

        Returns:
            Mono samples at 16 kHz, float32, as a WAV file.

        Raises:
            AudioError: As in :func:`~mmphi.data.audio.read_audio`, or if the process crashes or exceeds ``limit_s``.
        """
        with self._lock:
            process = self._running()
            try:
                answer, samples = self._exchange(process, source, max_seconds, check)
            except BaseException:
                self._end()
                raise
        if "error" in answer:
            raise AudioError(*answer["error"])
        return wav(samples, RATE)

    def close(self) -> None:
        """Kill the process; a decoding in progress raises an error."""
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            self._process = None

    def _exchange(
        self, process: subprocess.Popen[bytes], source: Path | bytes, max_seconds: float, check: Callable[[], None]
    ) -> tuple[dict[str, Any], bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        request: dict[str, Any] = {"max_seconds": max_seconds}
        request |= {"bytes": len(source)} if isinstance(source, bytes) else {"path": str(source)}
        content = source if isinstance(source, bytes) else b""
        pipes = _Pipes(process.stdin.fileno(), process.stdout.fileno(), check, time.monotonic() + self.limit_s)
        pipes.write(json.dumps(request).encode() + b"\n")
        pipes.write(content)
        answer: dict[str, Any] = json.loads(pipes.line())
        return answer, pipes.exactly(int(answer.get("bytes", 0)))


class _Pipes:
    """Non-blocking exchange with the process; waiting is subject to the caller's check and the time limit."""

    def __init__(self, into: int, out_of: int, check: Callable[[], None], end: float) -> None:
        self.into, self.out_of, self.check, self.end = into, out_of, check, end
        os.set_blocking(into, False)
        self.buffer = bytearray()

    def write(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            self._wait(self.into, selectors.EVENT_WRITE)
            try:
                view = view[os.write(self.into, view[:CHUNK]) :]
            except BrokenPipeError:
                raise _crashed() from None

    def line(self) -> bytes:
        while (place := self.buffer.find(b"\n")) < 0:
            self._more()
        return self._taken(place + 1)

    def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            self._more()
        return self._taken(count)

    def _taken(self, count: int) -> bytes:
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    def _more(self) -> None:
        self._wait(self.out_of, selectors.EVENT_READ)
        got = os.read(self.out_of, CHUNK)
        if not got:
            raise _crashed()
        self.buffer += got

    def _wait(self, pipe: int, event: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, event)
            while not selector.select(CHECK_S):
                self.check()
                if time.monotonic() > self.end:
                    raise AudioError("too slow", "the recording takes too long to decode", "convert it to WAV")


def _crashed() -> AudioError:
    return AudioError("decoder ended", "the recording cannot be decoded: its decoder crashed", "convert it to WAV")


def wav_seconds(content: bytes) -> float:
    """Returns the duration in seconds of a recording that :meth:`Decoder.decode` returned."""
    return (len(content) - HEADER) / 4 / RATE


def wav(samples: bytes, rate: int) -> bytes:
    """Returns a WAV file of mono float32 samples; ``wave`` of the standard library writes integers only."""
    layout = (3).to_bytes(2, "little") + (1).to_bytes(2, "little") + rate.to_bytes(4, "little")
    layout += (4 * rate).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    chunks = b"fmt " + len(layout).to_bytes(4, "little") + layout
    chunks += b"fact" + (4).to_bytes(4, "little") + (len(samples) // 4).to_bytes(4, "little")
    chunks += b"data" + len(samples).to_bytes(4, "little") + samples
    return b"RIFF" + (4 + len(chunks)).to_bytes(4, "little") + b"WAVE" + chunks


def main() -> int:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, which closes standard input of this process.
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Text that libraries print must not become part of an answer.

    from mmphi.data.audio import read_audio

    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        source = sys.stdin.buffer.read(request["bytes"]) if "bytes" in request else Path(request["path"])
        samples = b""
        try:
            recording = read_audio(source, max_seconds=request["max_seconds"], rate=RATE)
            samples = recording.samples.tobytes()
            answer: dict[str, Any] = {"bytes": len(samples)}
        except AudioError as error:
            answer = {"error": [error.reason, error.what, error.hint]}
        except MemoryError:
            answer = {"error": ["too large", "the recording needs too much memory to decode", "cut it"]}
        out.write(json.dumps(answer).encode() + b"\n" + samples)
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
