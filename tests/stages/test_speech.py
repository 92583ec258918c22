"""Frames are stored once; a projection is trained on them, goes on when interrupted, loads alone and is measured."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.io import wavfile
from small import SMALL, built

import mmphi
from mmphi.data.audio import RATE
from mmphi.data.ragged_features import RaggedStore
from mmphi.data.schema import ReadReport
from mmphi.data.speech_dataset import read_recordings, spoken_examples
from mmphi.errors import DataError, ModelError, SettingsError
from mmphi.models.audio import transcriber, transcription
from mmphi.models.audio.transcriber import CachedTranscriber
from mmphi.models.audio.transcription import Segment, Transcript
from mmphi.models.audio.vad import SpeechInterval
from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES, load_settings
from mmphi.training.hf_trainer import ExactLossTrainer

COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey", "brown"]
QUICK = {
    "speech.steps": "6",
    "speech.alignment_steps": "4",
    "speech.alignment_batch_size": "5",
    "speech.batch_size": "4",
    "speech.width": "24",
    "speech.validation": "2",
    "speech.test": "3",
    "speech.eval_every": "3",
    "speech.save_every": "2",
    "speech.log_every": "1",
    "speech.max_length": "96",
}


def recordings(folder: Path, count: int = 12, **columns: Sequence[str]) -> Path:
    """A CSV of so many recordings, each of a length and sound of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "spoken.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["audio", "transcript", *columns])
        for number in range(count):
            sound = np.random.default_rng(number).normal(size=RATE // 4 + 1000 * number) / 8
            wavfile.write(folder / f"{number}.wav", RATE, sound.astype(np.float32))
            rest = [values[number] for values in columns.values()]
            rows.writerow([f"{number}.wav", f"a {COLOURS[number % 8]} circle {number}", *rest])
    return folder / "spoken.csv"


@pytest.fixture(scope="module", autouse=True)
def all_of_it() -> Iterator[None]:
    """A gate that lets everything through, and a Whisper that hears in each recording its file's name."""

    def transcripts(_: CachedTranscriber, given: Sequence[Any], check: Any = None) -> list[Transcript]:
        names = [Path(audio.source).stem for audio in given]
        return [Transcript((Segment(0, 1, f"a {COLOURS[int(n) % 8]} circle {n}"),), "en") for n in names]

    with pytest.MonkeyPatch.context() as patch:
        for module in (transcriber, transcription):
            patch.setattr(module, "detect_speech", lambda each, **_: [SpeechInterval(0, each.seconds)])
        patch.setattr(CachedTranscriber, "transcripts", transcripts)
        yield


@pytest.fixture(scope="module")
def trained(small_chain: Path, tiny_whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("speech")
    path = recordings(folder / "spoken")
    changes = {**QUICK, "speech.path": str(path), "audio.whisper": str(tiny_whisper)}
    with built("speech", small_chain, folder, **changes) as pipeline:
        yield pipeline, changes


def build(pipeline: Pipeline, stage: str, changes: dict[str, str], **more: str) -> Any:
    given = {name.replace("__", "."): value for name, value in more.items()}
    return pipeline.build(stage, load_settings("tiny", {**SMALL, **changes, **given}))


def test_it_is_trained_and_measured(trained: Any) -> None:
    pipeline, changes = trained
    result = build(pipeline, "speech", changes)
    assert result.metrics["speech/steps"] == 6
    assert result.metrics["speech/recordings"] == 7
    assert result.metrics["speech/supervised_tokens"] > 6 * 4
    measured = build(pipeline, "evaluate", changes, evaluate__stage="speech")
    for name in ("loss", "audio_gain", "wer", "typed_wer", "answer_agreement", "answer_overlap", "tokens_per_s"):
        assert f"test/{name}" in measured.metrics
    # A second of sound is 50 frames, 8 of them a token.
    assert measured.metrics["test/tokens_per_s"] == pytest.approx(50 / 8, rel=0.15)
    table = json.loads((measured.path / "test_heard.json").read_text())
    assert len(table["data"]) == 3
    card = (result.path / "README.md").read_text()
    assert "with a projection for recordings" in card
    assert "encoder" in card


@pytest.mark.slow
def test_frames_are_stored_once_and_cached_is_live(trained: Any) -> None:
    pipeline, changes = trained
    cached = build(pipeline, "speech", changes)
    live = build(pipeline, "speech", changes, speech__features="live")
    ours, theirs = (load_file(each.path / "speech.safetensors") for each in (cached, live))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    other = build(pipeline, "speech", changes, speech__stack_factor="4", speech__seed="1")
    assert other.run_id != cached.run_id
    listened = build(pipeline, "listen", changes)
    assert listened.metrics["listen/recordings"] == 12
    store = RaggedStore(listened.path)
    assert listened.metrics["listen/frames"] == sum(-(-(RATE // 4 + 1000 * n) * 50 // RATE) for n in range(12))
    assert store.width == 16


@pytest.mark.slow
def test_resumed_is_straight_to_the_bit(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, changes = trained
    straight = build(pipeline, "speech", changes)
    save = ExactLossTrainer._save_checkpoint

    def dying(self: ExactLossTrainer, model: torch.nn.Module, trial: object) -> None:
        save(self, model, trial)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExactLossTrainer, "_save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            build(pipeline, "speech", changes, speech__split_seed="0", speech__weight_decay="1e-9")
    resumed = build(pipeline, "speech", changes, speech__weight_decay="1e-9")
    other = build(pipeline, "speech", changes, speech__weight_decay="1e-9", speech__keep_checkpoints="2")
    assert other.run_id == resumed.run_id
    assert resumed.run_id != straight.run_id
    assert resumed.metrics["speech/steps"] == 6
    ours, theirs = (load_file(each.path / "speech.safetensors") for each in (resumed, straight))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_words_can_be_trained_on_too(trained: Any) -> None:
    """They say here what is typed, so that there is nothing to learn but rounding; and frames they know nothing of."""
    pipeline, changes = trained
    result = build(pipeline, "speech", changes, speech__audio_input="transcript", speech__steps="2")
    assert json.loads((result.path / "speech.json").read_text())["link"] == "transcript"
    assert load_file(result.path / "speech.safetensors")["out.weight"].abs().max() < 0.1
    with pytest.raises(ModelError, match="trained for the audio input transcript and cannot use encoder frames"):
        build(
            pipeline,
            "evaluate",
            changes,
            evaluate__stage="speech",
            speech__audio_input="transcript",
            speech__steps="2",
            evaluate__audio_inputs='["encoder"]',
        )


def test_a_model_with_tokens_of_its_own_has_no_soft_link(trained: Any) -> None:
    pipeline, changes = trained
    with pytest.raises(ModelError, match="whose token IDs are Whisper's"):
        build(pipeline, "speech", changes, speech__audio_input="soft")


def test_all_links_are_measured_side_by_side(trained: Any) -> None:
    """What is heard is what is said here, so the transcript's answers are those of the typed words."""
    pipeline, changes = trained
    measured = build(
        pipeline, "evaluate", changes, evaluate__stage="speech", evaluate__audio_inputs='["encoder", "transcript"]'
    ).metrics
    assert measured["test/transcript/answer_agreement"] == 1
    assert measured["test/transcript/wer"] == measured["test/transcript/typed_wer"]
    assert measured["test/transcript/wer"] == measured["test/encoder/typed_wer"]


def test_questions_that_have_answers_are_answered(trained: Any, tmp_path: Path) -> None:
    """With a text that they are about; heard as they are typed, they are answered as they are typed."""
    pipeline, changes = trained
    answers = ["yes" if number % 2 else "no" for number in range(12)]
    contexts = [f"{COLOURS[number % 8]} . square {number}" for number in range(12)]
    path = recordings(tmp_path, answer=answers, context=contexts)
    own = {**changes, "speech.path": str(path), "speech.question": "<audio>", "speech.audio_input": "transcript"}
    build(pipeline, "speech", own)
    measured = build(pipeline, "evaluate", own, evaluate__stage="speech")
    assert "test/wer" not in measured.metrics
    assert measured.metrics["test/answer_agreement"] == 1
    assert measured.metrics["test/exact_match"] == measured.metrics["test/typed_exact_match"]
    table = json.loads((measured.path / "test_heard.json").read_text())
    assert {"said", "right answer", "answer", "answer to the typed words"} <= set(table["columns"])
    examples = spoken_examples(
        list(read_recordings(path, tmp_path, ReadReport())),
        ReadReport(),
        question="<audio>",
        validation=0,
        test=0,
        seed=0,
    )
    assert [(e.turns[0].answer, e.context, e.attributes["said"]) for e in examples[:1]] == [
        ("no", "red . square 0", "a red circle 0")
    ]


def test_a_trained_model_loads_alone_and_hears(trained: Any, tmp_path: Path) -> None:
    pipeline, changes = trained
    result = build(pipeline, "speech", changes)
    recording = Path(changes["speech.path"]).parent / "3.wav"
    loaded = mmphi.load(result.run_id)
    said = loaded.ask("", audio=recording, max_new_tokens=6)
    assert loaded.audio_source.link == "encoder"
    assert mmphi.load(result.path).ask("", audio=recording.read_bytes(), max_new_tokens=6) == said
    other = tmp_path / "other.en.pt"
    content = torch.load(changes["audio.whisper"], weights_only=True)
    content["model_state_dict"]["encoder.ln_post.weight"] += 1
    torch.save(content, other)
    with pytest.raises(ModelError, match="not the Whisper that the model was trained with"):
        mmphi.load(result.path, whisper=str(other)).ask("", audio=recording)


@pytest.mark.slow
def test_more_recordings_are_taken_over_and_bad_ones_counted(trained: Any, tmp_path: Path) -> None:
    pipeline, changes = trained
    build(pipeline, "listen", changes)
    path = recordings(tmp_path, 14)
    (tmp_path / "0.wav").write_text("no sound at all")
    more = {**changes, "speech.path": str(path), "speech.max_bad_share": "0.5"}
    listened = build(pipeline, "listen", more)
    assert listened.metrics["listen/computed"] == 3  # Two more, and the broken one.
    assert listened.metrics["listen/unreadable"] == 1
    assert listened.metrics["listen/recordings"] == 14
    result = build(pipeline, "speech", more, speech__validation="0", speech__test="2")
    assert result.metrics["speech/recordings"] == 11
    with pytest.raises(DataError, match=r"cannot be (used|read)"):
        build(pipeline, "speech", {**more, "speech.max_bad_share": "0.01"}, speech__seed="4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speech.path": ""}, "names no recordings"),
        ({"speech.question": "Say it"}, "must contain <audio> exactly once"),
        ({"audio.backend": "faster"}, "faster-whisper does not"),
        ({"speech.batch_size": "1", "speech.gradient_accumulation_steps": "2"}, "nearest batch size is 2"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_built(
    empty_store: str, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    path = recordings(tmp_path, 2)
    with pytest.raises(SettingsError, match=message):
        Pipeline(STAGES).build("speech", load_settings("tiny", {"speech.path": str(path), **changes}))


def test_splits_are_drawn_or_read(tmp_path: Path) -> None:
    report = ReadReport()
    spoken = list(read_recordings(recordings(tmp_path / "a", 10), tmp_path / "a", report))
    shape: dict[str, Any] = {"question": "<audio>", "validation": 2, "test": 3}
    drawn = [e.split for e in spoken_examples(spoken, report, seed=0, **shape)]
    assert [drawn.count(split) for split in ("train", "validation", "test")] == [5, 2, 3]  # type: ignore[arg-type]
    assert drawn == [e.split for e in spoken_examples(spoken, report, seed=0, **shape)]
    assert drawn != [e.split for e in spoken_examples(spoken, report, seed=1, **shape)]
    given = ["train", "test", "", "dev"]
    read = list(read_recordings(recordings(tmp_path / "b", 4, split=given), tmp_path / "b", report))
    assert [e.split for e in spoken_examples(read, report, seed=0, **shape)] == ["train", "test", "train"]
    assert [d.reason for d in report.dropped] == ["no split: split = dev"]
    with pytest.raises(DataError, match="is left for training"):
        spoken_examples(spoken, report, seed=0, question="<audio>", validation=5, test=5)


def test_a_recording_of_which_nothing_is_said_is_counted(tmp_path: Path) -> None:
    path = recordings(tmp_path, 4)
    path.write_text(path.read_text().replace("a red circle 0", " "))
    report = ReadReport()
    kept = spoken_examples(
        list(read_recordings(path, tmp_path, report)), report, question="<audio>", validation=0, test=0, seed=0
    )
    assert len(kept) == 3
    assert [d.reason for d in report.dropped] == ["no transcript"]
