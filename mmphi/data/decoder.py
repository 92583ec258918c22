"""Recordings decoded in a process of their own, for servers: what breaks a decoder does not break the server.

A damaged file may make FFmpeg's libraries read memory that is not theirs, decode for hours or take all memory. Here the
process that decodes it ends, the request that sent it is refused, and the next recording gets a new process.

The process reads requests from its standard input, each a line of JSON and, where the recording came in memory, its
bytes. It answers each by a line of JSON and the samples, float32 in the order of the machine's bytes.
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

LIMIT_S = 60.0  # Of decoding one recording.
MEMORY_BYTES = 4 * 1024**3  # Address space of the process.
CHECK_S = 0.2  # How often the caller's check is called.
CHUNK = 1 << 20
HEADER = 56  # Bytes before the samples of a WAV file as :func:`wav` writes it.
RATE = 16_000  # As of mmphi.data.audio, which is imported in the other process only.


class Decoder:
    """Decodes one recording at a time, in a process that is started when it is needed and replaced when it has ended.

    Args:
        limit_s: Longest time for one recording, in seconds.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def decode(self, source: Path | bytes, max_seconds: float, check: Callable[[], None] = lambda: None) -> bytes:
        """Decode a recording.

        Args:
            source: A file, or what it holds.
            max_seconds: Longer ones are refused.
            check: Called every :data:`CHECK_S` seconds; what it raises ends the decoding.

        Returns:
            Mono samples at 16 kHz, float32, as a WAV file.

        Raises:
            AudioError: As of :func:`~mmphi.data.audio.read_audio`; or if the process has ended, or took too long.
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
        """End the process; whoever waits for it gets an error."""
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
    """What goes to the process and comes from it, while the caller's check is called and time runs."""

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
    """How long a recording is that :meth:`Decoder.decode` gave."""
    return (len(content) - HEADER) / 4 / RATE


def wav(samples: bytes, rate: int) -> bytes:
    """A WAV file of mono float32 samples; ``wave`` of the standard library writes integers only."""
    layout = (3).to_bytes(2, "little") + (1).to_bytes(2, "little") + rate.to_bytes(4, "little")
    layout += (4 * rate).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    chunks = b"fmt " + len(layout).to_bytes(4, "little") + layout
    chunks += b"fact" + (4).to_bytes(4, "little") + (len(samples) // 4).to_bytes(4, "little")
    chunks += b"data" + len(samples).to_bytes(4, "little") + samples
    return b"RIFF" + (4 + len(chunks)).to_bytes(4, "little") + b"WAVE" + chunks


def main() -> int:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, whose end ends this.
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Libraries may print; what is printed is none of the answer.

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
