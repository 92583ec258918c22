"""Recordings decoded in another process are those of this one, and what ends that process ends nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import wavfile

from mmphi.data import decoder as decoders
from mmphi.data.audio import RATE, read_audio
from mmphi.data.decoder import Decoder, wav_seconds
from mmphi.errors import AudioError


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (44_100, 8)).astype(np.float32)
    wavfile.write(tmp_path / "a.wav", 44_100, samples)
    return tmp_path / "a.wav"


def test_samples_are_those_of_this_process(decoder: Decoder, sound: Path) -> None:
    expected = read_audio(sound)
    for source in (sound, sound.read_bytes()):
        content = decoder.decode(source, 10)
        found = read_audio(content)
        assert found.rate == RATE
        assert np.array_equal(found.samples, expected.samples)
        assert wav_seconds(content) == expected.seconds


def test_what_cannot_be_decoded_is_told_and_the_process_goes_on(decoder: Decoder, sound: Path) -> None:
    process = decoder._running()
    for source, limit, why in (
        (b"no sound", 10, "not a readable recording"),
        (sound, 0.5, "over the limit"),
        (b"", 1, "empty"),
    ):
        with pytest.raises(AudioError, match=why):
            decoder.decode(source, limit)
    with pytest.raises(AudioError, match="there is no recording"):
        decoder.decode(sound.with_name("none.wav"), 10)
    assert decoder._running() is process


def test_a_decoder_that_crashes_is_replaced(decoder: Decoder, sound: Path) -> None:
    process = decoder._running()
    os.kill(process.pid, signal.SIGSTOP)
    killing = threading.Timer(0.2, process.kill)  # While it is waited for.
    killing.start()
    with pytest.raises(AudioError, match="its decoder crashed"):
        decoder.decode(sound, 10)
    killing.join()
    assert wav_seconds(decoder.decode(sound, 10)) == pytest.approx(1, abs=0.01)


def test_one_that_takes_too_long_is_ended(sound: Path) -> None:
    made = Decoder(limit_s=0.0)
    process = made._running()
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(AudioError, match="too long to decode"):
        made.decode(sound, 10)
    assert process.poll() is not None
    made.close()


def test_one_that_does_not_read_what_it_is_sent_is_ended() -> None:
    made = Decoder(limit_s=0.0)
    process = made._running()
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(AudioError, match="too long to decode"):
        made.decode(bytes(10**7), 10)
    assert process.poll() is not None
    made.close()


def test_closing_ends_what_is_waited_for(sound: Path) -> None:
    made = Decoder()
    os.kill(made._running().pid, signal.SIGSTOP)
    closing = threading.Timer(0.2, made.close)
    closing.start()
    with pytest.raises(AudioError, match="crashed"):
        made.decode(sound, 10)
    closing.join()
    assert made._process is None


def test_the_caller_can_end_it(decoder: Decoder, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "CHECK_S", 0.01)
    process = decoder._running()
    os.kill(process.pid, signal.SIGSTOP)

    class LeftError(Exception):
        pass

    def leave() -> None:
        raise LeftError

    with pytest.raises(LeftError):
        decoder.decode(sound, 10, leave)
    assert process.poll() is not None


def test_it_ends_with_the_one_who_started_it(sound: Path) -> None:
    made = Decoder()
    process: Any = made._running()
    process.stdin.close()
    for _ in range(600):
        if process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() == 0
    made.close()
