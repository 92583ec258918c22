"""Frames learn to name words: the loss is that of all ways to say them, and what is named is counted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_language

from mmphi.data.schema import AudioRef
from mmphi.models.audio.audio_features import EncoderFeatures
from mmphi.models.audio.audio_projector import AudioProjector, AudioProjectorConfig
from mmphi.tracking.tracker import PrefixedTracker
from mmphi.training.ctc_alignment import (
    CTCAlignmentDataset,
    CTCAlignmentLoss,
    collate,
    token_error_rate,
)
from mmphi.training.token_vocabulary import token_vocabulary

WORDS = [[1, 2], [2, 2], [3], [1, 3, 1]]
LENGTHS = [4, 5, 2, 3]


def frames(audio: AudioRef) -> torch.Tensor:
    number = int(audio.id)
    return torch.randn(2 * LENGTHS[number] - number % 2, 5, generator=torch.Generator().manual_seed(number)).half()


HEARING = EncoderFeatures(frames, 5, 2)
RECORDINGS = [AudioRef(str(i), Path(str(i))) for i in range(4)]


def naming(seed: int = 0) -> CTCAlignmentLoss:
    torch.manual_seed(seed)
    projection = AudioProjector(AudioProjectorConfig("encoder", 10, 8, width=12, stack=2))
    return CTCAlignmentLoss(projection, torch.randn(3, 8))


def by_all_paths(scores: torch.Tensor, words: Sequence[int]) -> torch.Tensor:
    """Negative log of the summed probability of every path that collapses to the words (Graves et al. 2006, eq. 3)."""
    paths = [
        sum(scores[place, token] for place, token in enumerate(path))
        for path in product(range(scores.shape[1]), repeat=len(scores))
        if [token for token, _ in groupby(path) if token] == list(words)
    ]
    return -torch.logsumexp(torch.stack([torch.as_tensor(path) for path in paths]), dim=0)


def test_the_loss_is_that_of_all_paths() -> None:
    task = naming()
    expected = torch.zeros(())
    for recording, own in zip(RECORDINGS, WORDS, strict=True):
        expected = expected + by_all_paths(task.scores(HEARING.rows([recording])), own)
    loss = task(**collate(RECORDINGS, WORDS, HEARING))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    alone = sum(task(**collate([r], [w], HEARING)).item() for r, w in zip(RECORDINGS, WORDS, strict=True))
    assert loss.item() == pytest.approx(alone, rel=1e-5)


def test_what_is_too_short_for_its_words_counts_nothing() -> None:
    task = naming()
    loss = task(**collate(RECORDINGS[2:3], [[1, 1, 1, 1]], HEARING))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_it_learns_and_what_it_names_is_counted() -> None:
    task = naming()
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.02)
    before = token_error_rate(task, RECORDINGS, WORDS, HEARING)
    steps = CTCAlignmentDataset(RECORDINGS, WORDS, HEARING, steps=150, batch_size=3, seed=0)
    for step in range(len(steps)):
        batch = steps[step]
        optimizer.zero_grad()
        (task(**batch) / batch["step_tokens"]).backward()
        optimizer.step()
    assert token_error_rate(task, RECORDINGS, WORDS, HEARING) == 0 < before
    wrong = [[1, 2], [2, 2], [1], [1, 3]]  # One substituted, one named that is not said: 2 of 7.
    assert token_error_rate(task, RECORDINGS, wrong, HEARING) == pytest.approx(2 / 7)
    with torch.no_grad():
        task.nothing.copy_(task.projection(HEARING.rows(RECORDINGS[2:3])).mean(dim=0))
        task.sharpness.fill_(0)
    assert 0 < token_error_rate(task, RECORDINGS[2:3], WORDS[2:3], HEARING) <= 1


def test_processes_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CTCAlignmentDataset(RECORDINGS, WORDS, HEARING, steps=3, batch_size=3, seed=1)
    task = naming()
    one = [task(**whole[i]).item() / float(whole[i]["step_tokens"]) for i in range(len(whole))]
    monkeypatch.setattr("mmphi.training.ctc_alignment.world_size", lambda: 2)
    assert len(whole) == 6
    parts = [task(**whole[i]).item() / float(whole[i]["step_tokens"]) for i in range(6)]
    assert [parts[0] + parts[1], parts[2] + parts[3], parts[4] + parts[5]] == pytest.approx(one, rel=1e-5)


def test_words_are_places_among_those_that_are_said() -> None:
    language = tiny_language()
    known, words = token_vocabulary(language, ["aba", " c "])
    assert [language.tokenizer.decode(known[i - 1]) for i in words[0]] == [" ", "a", "b", "a"]
    assert [language.tokenizer.decode(known[i - 1]) for i in words[1]] == [" ", "c"]
    assert len(known) == 4


def test_a_training_before_records_under_a_name_of_its_own(recorder: Any, tmp_path: Path) -> None:
    under = PrefixedTracker(recorder, "align")
    under.metrics({"train/loss": 2.0}, 7)
    under.table("rows", [{"a": 1}])
    under.text("note.txt", "x")
    under.checkpoint(tmp_path)
    under.say("hello")
    assert recorder.metric_rows == [(7, {"align/train/loss": 2.0})]
    assert list(recorder.tables) == ["align_rows"]
    assert list(recorder.texts) == ["align_note.txt"]
    assert (recorder.checkpoints, recorder.said, under.run_id) == ([], ["hello"], "run")
