"""Frames of Whisper's encoder as a model gets them: stacked, packed, and as large as words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from listening import (
    frames,
    heard,
    seeing_frames,
    spoken,
)

from mmphi.models.audio.audio_features import EncoderFeatures
from mmphi.models.audio.audio_projector import AudioProjector, AudioProjectorConfig


def test_frames_are_stacked_and_filled_up() -> None:
    link = EncoderFeatures(frames, 6, 4)
    assert [link.length(heard(name)) for name in "qrsd"] == [6, 2, 0, 4]
    rows = link.rows([heard("r"), heard("d")])
    assert rows.shape == (6, 24)
    assert torch.equal(rows[0], frames(heard("r"))[:4].flatten())
    assert torch.equal(rows[5], torch.cat([frames(heard("d"))[12:].flatten(), torch.zeros(18).half()]))


def test_packed_and_batched_frames_are_single_ones() -> None:
    model = seeing_frames()
    asked = [spoken("hear: <audio>", "ja", name) for name in "qrsd"]
    alone = sum(model.losses([each])[0] for each in asked)
    assert model.losses(asked)[0] == pytest.approx(alone, rel=1e-5)
    prompts: list[Any] = [(None, "", [heard(name)]) for name in "qrd"]
    assert model.generate(prompts, 8, batch_size=3) == [model.generate([p], 8)[0] for p in prompts]


def test_the_projection_of_frames_begins_at_the_size_of_words() -> None:
    torch.manual_seed(0)
    projection = AudioProjector(AudioProjectorConfig("encoder", 64, 128, width=96, stack=2), scale=0.05)
    out = projection(torch.randn(500, 64) * 7)
    assert float(out.detach().square().mean().sqrt()) == pytest.approx(0.05, rel=0.1)
