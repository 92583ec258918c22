"""Decoding of untrusted audio files with FFmpeg's libraries, by default to 16 kHz mono; defects are reported."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mmphi.errors import AudioError

RATE = 16_000  # Sampling rate of Whisper's input, in samples per second.
MAX_SECONDS = 3600.0
MAX_CHANNELS = 16
SLACK_S = 0.15  # Codecs pad and trim: an encoder's delay is less than this.
# Protocols that FFmpeg may use for a file or for bytes. Demuxers that open files which the input names, such as
# playlists and ffconcat, are not allowed.
PROTOCOLS = {"file": "file", "bytes": "none"}
DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,eac3,flac,flv,gsm,iff,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,ogg,oma,rm,"
    "tta,voc,w64,wav,wv"
)
ESTIMATED = ("aac", "ac3", "amr", "eac3", "gsm", "mp3", "mpeg", "mpegts")  # Duration is estimated from the bit rate,
LENGTHS = (b"Xing", b"Info", b"VBRI")  # unless the first frame of an MP3 holds one of these markers.
CANCELLED = 0.01  # Power of the channels' mean, relative to the first channel, below which the channels cancel.

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """A decoded recording.

    Attributes:
        samples: float32 in about -1 to 1, shape (n,).
        rate: Samples per second.
        defects: Defects of the file, one sentence each.
    """

    samples: Samples
    rate: int = RATE
    defects: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.rate


def read_audio(source: Path | str | bytes, *, max_seconds: float = MAX_SECONDS, rate: int = RATE) -> Recording:
    """Decode a recording: an audio file, the audio track of a video, or the content of either.

    Channels are averaged; if they cancel each other, the first channel is used. The sampling rate of the file may
    change within the file.

    Args:
        source: Path of a file, or its content.
        max_seconds: Maximum duration in seconds. A duration in the header is checked before decoding.
        rate: Samples per second of the result.

    Raises:
        AudioError: If the file is missing, has no audio, cannot be decoded, is longer than ``max_seconds``, or has too
            many channels or non-finite samples. A recording that is shorter than its header states, or whose channels
            cancel each other, is returned, with a message in ``defects``.
    """
    name = "the recording" if isinstance(source, bytes) else str(source)
    opened = _opened(source, name)
    with opened as container:
        stream = _stream(container, name)
        stated = _stated_seconds(container, stream, source)
        if stated is not None and stated > max_seconds:
            raise _too_long(name, stated, max_seconds)
        pieces, count = [], 0
        broken: list[str] = []
        try:
            for piece in _resampled(_frames(container, stream, broken), rate, name):
                pieces.append(piece)
                count += len(piece[0])
                if count > max_seconds * rate:
                    raise _too_long(name, count / rate, max_seconds)
        except (_av().error.FFmpegError, ValueError) as error:
            broken.append(_what(error))
    if not count:
        why = f": {broken[0]}" if broken else ""
        raise AudioError("no sound", f"{name} has no sound that can be decoded{why}", "check that it plays elsewhere")
    defects = []
    if broken:
        defects.append(f"{len(broken)} packets of {name} could not be decoded: {broken[0]}; {count / rate:.2f} s could")
    elif stated is not None and count / rate < stated - max(SLACK_S, 0.01 * stated):
        defects.append(f"{name} is truncated: it holds {count / rate:.2f} s of the {stated:.2f} s in its header")
    mean, first = (np.concatenate(channel) for channel in zip(*pieces, strict=True))
    if np.dot(mean, mean) < CANCELLED * np.dot(first, first):
        defects.append(f"the channels of {name} cancel each other: only the first one is used")
        mean = first
    return Recording(mean, rate, tuple(defects))


def audio_seconds(source: Path | str | bytes) -> float | None:
    """Returns the duration in seconds that the header of a recording states, or ``None``.

    Raises:
        AudioError: If the recording cannot be opened, or has no audio.
    """
    name = "the recording" if isinstance(source, bytes) else str(source)
    with _opened(source, name) as container:
        return _stated_seconds(container, _stream(container, name), source)


def _av() -> Any:
    """PyAV, imported on first use because only the extra ``audio`` installs it."""
    import av

    return av


def check_recording_file(path: Path) -> None:
    """Refuse a path at which there is no file, or an empty one.

    Raises:
        AudioError: Naming the path.
    """
    if not path.is_file():
        raise AudioError("missing", f"there is no recording {path}", "check the path")
    if not path.stat().st_size:
        raise AudioError("empty", f"{path} is empty", "record it again, or copy it again")


def _opened(source: Path | str | bytes, name: str) -> Any:
    if not isinstance(source, bytes):
        check_recording_file(Path(source))
    elif not source:
        raise AudioError("empty", f"{name} is empty", "give the bytes of an audio file")
    try:
        given = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        protocols = PROTOCOLS["bytes" if isinstance(source, bytes) else "file"]
        return _av().open(given, mode="r", options={"protocol_whitelist": protocols, "format_whitelist": DEMUXERS})
    except (_av().error.FFmpegError, ValueError, UnicodeError) as error:
        raise AudioError(
            "not audio", f"{name} is not a readable recording: {_what(error)}", "give WAV, FLAC, MP3, OGG or M4A"
        ) from error


def _stream(container: Any, name: str) -> Any:
    if not container.streams.audio:
        kind = "a video without sound" if container.streams.video else "a file without sound"
        raise AudioError("no sound", f"{name} is {kind}", "give a recording, or a video that has sound")
    stream = container.streams.audio[0]
    context = stream.codec_context
    if context is None or not context.sample_rate or context.sample_rate < 0:
        raise AudioError(
            "no sample rate", f"the header of {name} has a sample rate of 0", "save it again: its header is damaged"
        )
    if not 0 < context.channels <= MAX_CHANNELS:
        raise AudioError(
            "too many channels",
            f"{name} has {context.channels} channels; up to {MAX_CHANNELS} are read",
            "mix it down to one or two",
        )
    return stream


def _stated_seconds(container: Any, stream: Any, source: Path | str | bytes) -> float | None:
    """Duration in seconds that the header states; ``None`` if it is missing or only an estimate."""
    if container.format.name in ESTIMATED and not (container.format.name == "mp3" and _states_frame_count(source)):
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / _av().time_base if container.duration and container.duration > 0 else None


def _states_frame_count(source: Path | str | bytes) -> bool:
    """Whether the first frame of an MP3 states the number of frames."""
    if isinstance(source, bytes):
        return any(mark in _after_tag(io.BytesIO(source)) for mark in LENGTHS)
    with Path(source).open("rb") as file:
        return any(mark in _after_tag(file) for mark in LENGTHS)


def _after_tag(file: BinaryIO) -> bytes:
    """First 256 bytes after the ID3 tag, whose length is stored in four groups of seven bits."""
    head = file.read(10)
    length = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
    file.seek(length if head.startswith(b"ID3") else 0)
    return file.read(256)


def _frames(container: Any, stream: Any, broken: list[str]) -> Iterator[Any]:
    """Frames of all decodable packets; an error message for each other packet is appended to ``broken``."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except (_av().error.FFmpegError, ValueError) as error:
            broken.append(_what(error))
            continue
        yield from frames


def _resampled(frames: Iterator[Any], rate: int, name: str) -> Iterator[tuple[Samples, Samples]]:
    """Resampled pieces: the mean of the channels, and the first channel.

    swresample's own mixing sums two float channels at 0.7 each, which is louder than either. Samples are interleaved,
    because PyAV 18.1 reads out of bounds for 8 or more planar channels.
    """
    resampler: Any = None
    before: tuple[Any, ...] = ()
    for frame in frames:
        now = frame.format.name, frame.layout.name, frame.layout.nb_channels, frame.sample_rate
        if now != before:
            if resampler is not None:
                yield from _pieces(resampler, None, before[2], name)
            resampler, before = _av().AudioResampler(format="flt", layout=frame.layout, rate=rate), now
        yield from _pieces(resampler, frame, now[2], name)
    if resampler is not None:
        yield from _pieces(resampler, None, before[2], name)


def _pieces(resampler: Any, frame: Any, channels: int, name: str) -> Iterator[tuple[Samples, Samples]]:
    for piece in resampler.resample(frame):
        samples: Samples = piece.to_ndarray().reshape(-1, channels)
        if not np.isfinite(samples).all():
            raise AudioError(
                "samples are not finite",
                f"{name} contains samples that are NaN or infinite",
                "export it again",
            )
        mean: Samples = samples.mean(axis=1, dtype=np.float32)
        yield mean, mean if channels == 1 else samples[:, 0].copy()


def _too_long(name: str, seconds: float, limit: float) -> AudioError:
    return AudioError(
        "too long", f"{name} is {seconds:,.0f} s long, over the limit of {limit:,.0f} s", "cut it, or raise max_seconds"
    )


def _what(error: Exception) -> str:
    return str(getattr(error, "strerror", "") or error)
