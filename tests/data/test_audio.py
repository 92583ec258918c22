"""Recordings of every kind are heard the same, and what cannot be heard is told."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from scipy.io import wavfile
from scipy.signal import resample_poly

from mmphi.data.audio import LENGTHS, MAX_CHANNELS, RATE, audio_seconds, read_audio
from mmphi.errors import AudioError


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def written(path: Path, samples: np.ndarray, rate: int, **how: object) -> Path:
    """By PyAV in the format of the name: samples (channels, n)."""
    samples = np.atleast_2d(samples)
    layout = {1: "mono", 2: "stereo"}[len(samples)]
    codec = {"flac": "flac", "mp3": "mp3", "ogg": "libopus", "m4a": "aac"}[path.suffix[1:]]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        formats = {"flac": "s16", "libopus": "s16"}
        resampler = av.AudioResampler(format=formats.get(codec, "fltp"), layout=layout, rate=rate)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate = rate
        for each in [*resampler.resample(frame), *resampler.resample(None)]:
            for packet in stream.encode(each):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
    return path


def close(found: np.ndarray, expected: np.ndarray, within: float) -> bool:
    """Apart from the edges, where resampling has no neighbours, and from a codec's delay of a few samples."""
    n = min(len(found), len(expected)) - 800
    best = min(np.abs(found[400 + d : n + d] - expected[400:n]).max() for d in range(-4, 5))
    return bool(best < within)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_both_sides_are_heard_as_one(tmp_path: Path, rate: int, channels: int) -> None:
    both = np.stack([tone(rate), 0.5 * tone(rate, hertz=1000)][:channels])
    wavfile.write(tmp_path / "a.wav", rate, both.T)
    found = read_audio(tmp_path / "a.wav")
    expected = resample_poly(both.mean(axis=0).astype(np.float64), RATE, rate)
    assert found.rate == RATE
    assert found.defects == ()
    assert found.seconds == pytest.approx(1, abs=0.01)
    assert audio_seconds(tmp_path / "a.wav") == pytest.approx(1)
    assert close(found.samples, expected.astype(np.float32), 0.01)


def test_what_is_too_high_to_hear_is_taken_out_and_not_folded_down(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "a.wav", 48_000, tone(48_000, hertz=12_000))
    assert np.abs(read_audio(tmp_path / "a.wav").samples[400:-400]).max() < 0.005


@pytest.mark.parametrize("kind", ["flac", "mp3", "ogg", "m4a"])
def test_formats_and_bytes_of_them(tmp_path: Path, kind: str) -> None:
    rate = 48_000 if kind == "ogg" else 44_100
    path = written(tmp_path / f"a.{kind}", np.stack([tone(rate, 2)] * 2), rate)
    found = read_audio(path)
    assert found.seconds == pytest.approx(2, abs=0.1)
    assert np.sqrt((found.samples**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    spectrum = np.abs(np.fft.rfft(found.samples[:RATE]))
    assert np.argmax(spectrum) == pytest.approx(440, abs=1)
    again = read_audio(path.read_bytes())
    assert np.array_equal(again.samples, found.samples)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_sample_formats(tmp_path: Path, dtype: type) -> None:
    samples = tone(RATE)
    if np.issubdtype(dtype, np.integer):
        top = np.iinfo(dtype).max
        scaled = samples * (127 if dtype is np.uint8 else top) + (128 if dtype is np.uint8 else 0)
        wavfile.write(tmp_path / "a.wav", RATE, scaled.astype(dtype))
    else:
        wavfile.write(tmp_path / "a.wav", RATE, samples.astype(dtype))
    assert np.abs(read_audio(tmp_path / "a.wav").samples - samples).max() < (0.015 if dtype is np.uint8 else 1e-4)


def test_a_recording_cut_off_is_told_and_not_taken_for_whole(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, RATE * 4).astype(np.float32), RATE)
    (tmp_path / "half.flac").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found = read_audio(tmp_path / "half.flac")
    assert found.seconds == pytest.approx(2, abs=0.5)
    assert len(found.defects) == 1
    assert "half.flac" in found.defects[0]
    assert read_audio(whole).defects == ()


def test_too_long_is_refused_by_the_header_before_it_is_decoded(tmp_path: Path, monkeypatch) -> None:
    path = written(tmp_path / "a.flac", np.zeros(RATE * 30, np.float32), RATE)
    monkeypatch.setattr("mmphi.data.audio._resampled", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(AudioError, match=r"30 s long, over the limit of 20 s") as caught:
        read_audio(path, max_seconds=20)
    assert caught.value.reason == "too long"


def test_a_header_that_says_no_length_does_not_let_more_through(tmp_path: Path, monkeypatch) -> None:
    path = written(tmp_path / "a.flac", np.zeros(RATE * 3, np.float32), RATE)
    monkeypatch.setattr("mmphi.data.audio._stated_seconds", lambda *_: None)
    assert read_audio(path, max_seconds=4).seconds == pytest.approx(3)
    with pytest.raises(AudioError, match="over the limit of 2 s"):
        read_audio(path, max_seconds=2)


def wav_bytes(samples: np.ndarray, rate: int) -> bytes:
    out = io.BytesIO()
    wavfile.write(out, rate, samples)
    return out.getvalue()


def one_is(value: float) -> bytes:
    return wav_bytes(np.where(np.arange(RATE) == 700, value, tone(RATE)).astype(np.float32), RATE)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 6, 7, 8, 9, 12, 16])
def test_any_number_of_channels_is_averaged(channels: int, dtype: type) -> None:
    """Up to those that are read: of 8 or more, planes were read that are not the recording's."""
    levels = np.linspace(-0.5, 0.9, channels)
    samples = np.outer(np.ones(RATE), levels)
    stored = (samples * 32767).round().astype(np.int16) if dtype is np.int16 else samples.astype(np.float32)
    found = read_audio(wav_bytes(stored, RATE))
    assert found.samples.shape == (RATE,)
    np.testing.assert_allclose(found.samples, levels.mean(), atol=1e-4)


def test_a_recording_of_eight_channels_at_another_rate(tmp_path: Path) -> None:
    voices = np.stack([tone(44_100, hertz=100.0 * (n + 1), level=0.1) for n in range(8)], axis=1)
    found = read_audio(wav_bytes(voices, 44_100)).samples
    expected = np.mean([tone(RATE, hertz=100.0 * (n + 1), level=0.1) for n in range(8)], axis=0)
    np.testing.assert_allclose(found[200:-200], expected[200:-200], atol=2e-3)


def many_channels() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(200)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(bytes(200 * 2 * 1600))
    return out.getvalue()


def no_rate() -> bytes:
    content = bytearray(wav_bytes(tone(RATE), RATE))
    content[24:28] = bytes(4)
    return bytes(content)


def silent_video() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "reason", "said"),
    [
        (b"", "empty", "is empty"),
        (
            b"these are words and no sound at all, but a good many of them\n" * 20,
            "not audio",
            "not a readable recording",
        ),
        (one_is(np.nan), "samples are not finite", "NaN"),
        (one_is(np.inf), "samples are not finite", "NaN"),
        (many_channels(), "too many channels", f"200 channels; up to {MAX_CHANNELS} are read"),
        (no_rate(), None, "recording|rate"),
        (silent_video(), "no sound", "a video without sound"),
    ],
    ids=["empty", "text", "NaN", "infinite", "200 channels", "rate 0", "silent video"],
)
def test_what_cannot_be_heard_is_told(tmp_path: Path, content: bytes, reason: str | None, said: str) -> None:
    path = tmp_path / "recording.wav"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(AudioError, match=said) as caught:
            read_audio(source)
        assert caught.value.hint
        assert caught.value.reason in ({reason} if reason else {"no sample rate", "not audio"})


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(AudioError, match=r"there is no recording nowhere\.wav"):
        read_audio("nowhere.wav")


@pytest.mark.parametrize("changes", [(44_100, 1), (22_050, 2), (22_050, 1)])
def test_a_recording_may_change_its_rate_and_channels(tmp_path: Path, changes: tuple[int, int]) -> None:
    """As MP3 files do that were joined byte by byte; where the rate halves, some packets are lost, and that is told."""
    rate, channels = changes
    one = written(tmp_path / "one.mp3", np.stack([tone(44_100)] * 2), 44_100)
    two = written(tmp_path / "two.mp3", np.stack([tone(rate, hertz=880)] * channels), rate)
    (tmp_path / "joined.mp3").write_bytes(headless(one) + headless(two))
    found = read_audio(tmp_path / "joined.mp3")
    assert all("packets" in each for each in found.defects)
    assert found.seconds == pytest.approx(2, abs=0.35 if found.defects else 0.15)
    for part, hertz in ((found.samples[4000:12_000], 440), (found.samples[-9000:-1000], 880)):
        assert np.abs(np.fft.rfft(part)).argmax() * RATE / len(part) == pytest.approx(hertz, abs=3)


def headless(path: Path) -> bytes:
    """An MP3 without its tag and without the frame that says its length."""
    data = path.read_bytes()
    place = next(data.index(mark) for mark in LENGTHS if mark in data[:2000])
    begin = data.index(b"\xff\xfb", place) if b"\xff\xfb" in data else data.index(b"\xff\xf3", place)
    return data[begin:]


def test_an_mp3_that_says_no_length_is_neither_cut_off_nor_too_long(tmp_path: Path) -> None:
    """Its length is guessed from its first frame, here of silence and of few bits."""
    noise = np.random.default_rng(0).normal(0, 0.3, 5 * 44_100).astype(np.float32)
    sound = np.concatenate([np.zeros(44_100, np.float32), noise])
    with av.open(str(tmp_path / "vbr.mp3"), "w") as out:
        stream = out.add_stream("mp3", rate=44_100, layout="mono", options={"q": "0"})
        stream.codec_context.qscale = True
        stream.codec_context.global_quality = 0
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate = 44_100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    assert audio_seconds(tmp_path / "vbr.mp3") == pytest.approx(6, abs=0.2)
    (tmp_path / "headless.mp3").write_bytes(headless(tmp_path / "vbr.mp3"))
    assert audio_seconds(tmp_path / "headless.mp3") is None
    for source in (tmp_path / "headless.mp3", (tmp_path / "headless.mp3").read_bytes()):
        found = read_audio(source, max_seconds=7)
        assert found.defects == ()
        assert found.seconds == pytest.approx(6, abs=0.2)
    with pytest.raises(AudioError, match="over the limit"):
        read_audio(tmp_path / "headless.mp3", max_seconds=5)


def test_channels_that_cancel_each_other_are_told_and_one_is_heard(tmp_path: Path) -> None:
    left, other = tone(RATE), tone(RATE, hertz=660)
    for name, right, cancelled in (("opposite", -left, True), ("different", other, False), ("silent", 0 * left, False)):
        wavfile.write(tmp_path / f"{name}.wav", RATE, np.stack([left, right]).T)
        found = read_audio(tmp_path / f"{name}.wav")
        assert bool(found.defects) == cancelled
        assert np.allclose(found.samples, left if cancelled else (left + right) / 2, atol=1e-6)
        if cancelled:
            assert "cancel each other" in found.defects[0]
    wavfile.write(tmp_path / "none.wav", RATE, np.zeros((RATE, 2), np.float32))
    assert read_audio(tmp_path / "none.wav").defects == ()


def test_content_opens_no_file_of_this_machine(tmp_path: Path) -> None:
    """FFmpeg's concat demuxer reads the files that a script names; a script that is sent must not."""
    wavfile.write(tmp_path / "secret.wav", RATE, tone(RATE))
    script = f"ffconcat version 1.0\nfile '{tmp_path / 'secret.wav'}'\n"
    (tmp_path / "script.ffconcat").write_text(script)
    for source in (script.encode(), tmp_path / "script.ffconcat"):
        with pytest.raises(AudioError, match="not a readable recording"):
            read_audio(source)


def test_a_playlist_fetches_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.mp3\n#EXT-X-ENDLIST\n")
    with pytest.raises(AudioError):
        read_audio(tmp_path / "a.m3u8")
