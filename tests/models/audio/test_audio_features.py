"""What is heard stands in a prompt as if it had been typed, until somebody trains what is between."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import RandomFeatures, byte_tokenizer, tiny_language
from listening import (
    CPU,
    SAID,
    Knows,
    Peaked,
    frames,
    heard,
    listening,
    logits,
    phi_language,
    spoken,
    typed,
)

from mmphi.config import LanguageSettings
from mmphi.config.audio import AudioSettings
from mmphi.data.audio import Recording
from mmphi.data.schema import AudioRef, Example, ImageRef, Turn
from mmphi.errors import ModelError
from mmphi.models.audio import transcriber as ears_module
from mmphi.models.audio.audio_features import (
    EncoderFeatures,
    SoftTranscriptFeatures,
    TranscriptFeatures,
    audio_feature_source,
)
from mmphi.models.audio.audio_projector import AudioProjector, AudioProjectorConfig, identity_audio_projector
from mmphi.models.audio.transcriber import Audio, CachedTranscriber
from mmphi.models.audio.transcript_cache import TranscriptCache
from mmphi.models.audio.transcription import Segment, Transcript
from mmphi.models.audio.whisper_backends import OpenAIWhisper
from mmphi.models.checkpoint import checkpoint_digest, load_checkpoint
from mmphi.models.language.language_model import load_language_model, save_language_model
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.packing import packs
from mmphi.text.prompt import Prompt, Style

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.mark.parametrize("style", ["plain", "phi", "chat"])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(
    ("names", "question", "same"),
    [
        ("q", "", "What is shown?"),
        ("q", "<audio>", "What is shown?"),
        ("d", "Repeat:  <audio>, please.", "Repeat:  a dog, please."),
        ("d", "Say it", "a dog\nSay it"),
        ("dr", "<audio><audio>", "a dogtwo of them"),
        ("ds", "first <audio> then <audio>.", "first a dog then ."),
        ("d", "no <audio> of <audio> two", "a dog\nno <audio> of <audio> two"),
    ],
)
def test_words_heard_are_the_words_typed_to_the_bit(
    style: Style, image: bool, names: str, question: str, same: str
) -> None:
    language = phi_language()
    language.tokenizer.chat_template = CHATML
    model = listening(replace(language, prompt=Prompt(language.tokenizer, style)))
    one, two = spoken(question, "an answer", *names, image=image), typed(same, "an answer", image=image)
    ours, theirs = model.encode(one), model.encode(two)
    assert ours is not None
    assert theirs is not None
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    assert [span.kind for span in ours.spans].count("audio") == len(names)
    assert sum(span.length for span in ours.spans if span.kind == "audio") > 0
    assert torch.equal(logits(model, one), logits(model, two))
    assert model.losses([one]) == model.losses([two])


def test_a_spoken_question_about_a_picture_is_answered_like_the_typed_one() -> None:
    model = listening()
    image = ImageRef("i", Path("i"))
    asked = [(image, "", [heard("q")]), (image, SAID["q"]), (None, SAID["r"]), (None, "<audio>", [heard("r")])]
    one, two, three, four = model.generate(asked, 12)
    assert (one, three) == (two, four)
    assert one != three


def test_two_projections_that_differ_answer_differently() -> None:
    """What is between is really between: a trained one changes what comes out."""
    model = listening()
    before = logits(model, spoken("", "yes", "q"))
    assert model.speech is not None
    torch.nn.init.normal_(model.speech.out.weight, std=0.1)
    assert not torch.allclose(before, logits(model, spoken("", "yes", "q")))
    assert torch.equal(logits(model, typed("x?", "yes")), logits(listening(), typed("x?", "yes")))


def test_the_residual_learns_from_its_first_step() -> None:
    """Its last matrix is zero, but it has a gradient; nothing begins dead."""
    model = listening()
    sample = model.encode(spoken("", "yes", "q"))
    (pack,) = packs([sample], model.sources, 4096)  # type: ignore[list-item]
    model.packed(**pack).backward()
    assert model.speech is not None
    assert model.speech.out.weight.grad is not None
    assert model.speech.out.weight.grad.abs().sum() > 0


def test_turns_that_do_not_fit_go_with_their_recordings() -> None:
    model = listening()
    turns = (Turn("hear <audio> " + "x" * 60, "a"), Turn("and <audio>?", "b"))
    example = Example("1", (), turns, "s", audio=(heard("d"), heard("r")))
    model.max_length = 60
    sample = model.encode(example)
    assert sample is not None
    assert [span.reference.of.id for span in sample.spans] == ["r"]


def test_soft_becomes_the_transcript_as_its_temperature_goes_to_0() -> None:
    language = phi_language()
    words = Multimodal(language, None, None, audio_source=TranscriptFeatures(language, Knows()))

    def soft(temperature: float) -> torch.Tensor:
        link = SoftTranscriptFeatures(language, Knows(Peaked()), temperature)
        return logits(Multimodal(language, None, None, audio_source=link), spoken("", "an answer", "q"))

    expected = logits(words, spoken("", "an answer", "q"))
    distances = [float((soft(t) - expected).detach().abs().max()) for t in (1.0, 0.3, 0.1, 0.01)]
    assert distances[0] > distances[1] > distances[2] > 0
    assert distances[-1] == 0


def test_soft_rows_are_the_mean_of_all_embeddings() -> None:
    language = phi_language()
    link = SoftTranscriptFeatures(language, Knows(Peaked()), 1.0)
    sample = Multimodal(language, None, None, audio_source=link).encode(spoken("", "x", "q"))
    assert sample is not None
    rows, ids = link.rows([sample.spans[0].reference]), sample.spans[0].reference.ids
    table = language.model.get_input_embeddings().weight
    odds = torch.softmax(torch.tensor([0.0, -1.0]), 0)
    assert torch.allclose(rows[0], odds[0] * table[ids[0]] + odds[1] * table[100], atol=1e-6)
    assert torch.equal(rows[1], table[ids[1]])  # Another is likelier there: the word's own.


def test_soft_is_refused_where_token_ids_differ() -> None:
    with pytest.raises(ModelError, match=r"token 256 is .* in tiny") as caught:
        SoftTranscriptFeatures(tiny_language(), Knows(Peaked()))
    assert "transcript" in caught.value.hint
    many = Peaked()
    many.english = False
    with pytest.raises(ModelError, match="is multilingual"):
        SoftTranscriptFeatures(phi_language(), Knows(many))
    with pytest.raises(ModelError, match="faster-whisper does not provide"):
        SoftTranscriptFeatures(phi_language(), Knows(object()))


def test_a_hearing_model_loads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its audio projector and audio input are saved with the rest, and the bundle's digest is of them."""
    tiny = tiny_language()
    save_language_model(tiny.model, tiny.prompt, tmp_path / "language")
    language = load_language_model(LanguageSettings(model=str(tmp_path / "language")), None, CPU)
    speech = identity_audio_projector(language.width)
    torch.nn.init.normal_(speech.out.weight, std=0.1)
    settings = AudioSettings(whisper="base.en", vad_threshold=0.7)
    model = Multimodal(
        language,
        None,
        None,
        audio_source=TranscriptFeatures(language, Knows()),
        speech=speech,
        audio=Audio(settings, "abc"),
    )
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "mmphi.json").read_text())["audio"]["vad_threshold"] == 0.7
    asked: list[tuple[AudioSettings, Any]] = []

    def fake(settings: AudioSettings, device: Any, once: Callable[..., Any]) -> CachedTranscriber:
        asked.append((settings, device))
        return Knows()

    monkeypatch.setattr("mmphi.models.audio.audio_features.transcriber_of", fake)
    loaded = load_checkpoint(tmp_path / "a")
    assert not asked  # The Whisper is loaded when there is something to hear.
    example = spoken("", "an answer", "q")
    assert torch.equal(logits(loaded, example), logits(model, example))
    assert asked[0][0] == settings
    assert load_checkpoint(tmp_path / "a", whisper="small.en").audio_source.link == "transcript"
    assert asked[1][0].whisper == "small.en"
    digest = checkpoint_digest(tmp_path / "a")
    torch.nn.init.normal_(speech.out.weight, std=0.1)
    model.save_pretrained(tmp_path / "b")
    assert checkpoint_digest(tmp_path / "b") != digest
    (tmp_path / "b" / "speech.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_checkpoint(tmp_path / "b")


def test_what_does_not_fit_is_refused() -> None:
    language = tiny_language()
    with pytest.raises(ModelError, match="no audio input"):
        Multimodal(language, None, None).generate([(None, "", [heard("q")])])
    with pytest.raises(ModelError, match="for a model of width 16, not 32"):
        Multimodal(
            language, None, None, audio_source=EncoderFeatures(frames, 6, 4), speech=identity_audio_projector(16)
        )
    wrong = AudioProjector(AudioProjectorConfig("encoder", 99, 32, stack=4))
    with pytest.raises(ModelError, match="needs features of width 99, this Whisper has width 24"):
        Multimodal(language, None, None, audio_source=EncoderFeatures(frames, 6, 4), speech=wrong).inputs([heard("q")])
    prompt = Prompt(byte_tokenizer(), "plain")
    assert [part.span for part in prompt.parts([("<audio>", "x")], audio=[None])].count("audio") == 1


def test_ears_hear_every_recording_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[int] = []

    def size(source: Path | bytes) -> int:
        return len(source) if isinstance(source, bytes) else source.stat().st_size

    def fake(_: Any, recordings: Sequence[Recording], **__: Any) -> list[Transcript]:
        calls.append(len(recordings))
        return [Transcript((Segment(0, 1, str(len(each.samples))),)) for each in recordings]

    monkeypatch.setattr(ears_module, "transcribe", fake)
    monkeypatch.setattr(ears_module, "read_audio", lambda source, **_: Recording(np.zeros(size(source), np.float32)))
    for name, content in (("a", "x"), ("bb", "yy"), ("c", "x")):
        (tmp_path / name).write_text(content)
    given = [AudioRef(name, tmp_path / name) for name in ("a", "bb", "c")] + [AudioRef("d", b"ccc")]

    def transcriber(**settings: Any) -> CachedTranscriber:
        chosen = AudioSettings(batch_size=2, **settings)
        return CachedTranscriber(None, chosen, TranscriptCache("w", chosen, tmp_path / "memory"))  # type: ignore[arg-type]

    one = transcriber()
    texts = [t.text for t in one.transcripts(given)]
    assert texts[0] == texts[2]  # Of one content, whatever it is called.
    assert len(set(texts)) == 3
    assert calls == [2, 1]
    assert [t.text for t in one.transcripts(given)] == texts
    assert [t.text for t in transcriber().transcripts(given[:3])] == texts[:3]  # In another process,
    assert calls == [2, 1]
    transcriber(beam=1).transcripts(given)  # but not where it hears in another way,
    assert calls == [2, 1, 2, 1]
    transcriber().transcripts(given)  # and not what came in memory, which is not stored.
    assert calls == [2, 1, 2, 1, 1]
    (tmp_path / "memory").write_text("spoilt")
    assert [t.text for t in transcriber().transcripts(given)] == texts
    assert calls == [2, 1, 2, 1, 1, 2, 1]
    (tmp_path / "a").write_text("another recording now")
    assert transcriber().transcripts(given[:1])[0].text != texts[0]


def test_a_locked_cache_of_transcripts_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TranscriptCache("w", AudioSettings(), tmp_path / "memory")
    cache.remember({"a": Transcript((Segment(0, 1, "one"),))})

    def locked() -> Any:
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_open", locked)
        cache.remember({"b": Transcript((Segment(0, 1, "two"),))})
    assert set(cache.recall(["a", "b"])) == {"a"}
    with sqlite3.connect(tmp_path / "memory") as connection:  # As another version would write it.
        connection.execute("DROP TABLE transcripts")
        connection.execute("CREATE TABLE transcripts (key)")
    cache.remember({"c": Transcript((Segment(0, 1, "three"),))})
    cache.remember({"c": Transcript((Segment(0, 1, "three"),))})
    assert set(cache.recall(["c"])) == {"c"}


def test_the_encoders_whisper_must_be_the_one_it_was_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    whisper = Peaked()
    monkeypatch.setattr(Peaked, "digest", "other", raising=False)
    monkeypatch.setattr("mmphi.models.audio.audio_features.transcriber_of", lambda *_: Knows(whisper))
    config = AudioProjectorConfig("encoder", 24, 32, stack=4)
    with pytest.raises(ModelError, match="not the Whisper that the model was trained with"):
        audio_feature_source(tiny_language(), Audio(AudioSettings(), "mine"), config, CPU, lambda *_: None)


def real_ears(models: Path) -> CachedTranscriber:
    return CachedTranscriber(OpenAIWhisper(str(models / "whisper-tiny.en.pt"), CPU), AudioSettings())


@pytest.mark.real
def test_a_real_question_heard_is_the_question_typed(real_models: Path, real_folder: Path) -> None:
    """SmolLM2 in its own chat template, with a picture: the answer, and every bit of the loss."""
    language = load_language_model(LanguageSettings(model=str(real_models / "smollm2-135m-instruct")), None, CPU)
    transcriber = real_ears(real_models)
    torch.manual_seed(0)
    projector = Projector(ProjectorConfig(RandomFeatures.width, language.width))
    model = Multimodal(language, projector, RandomFeatures(), audio_source=TranscriptFeatures(language, transcriber))
    recording = AudioRef("jfk", real_folder / "speech" / "jfk.flac")
    (said,) = (transcript.text for transcript in transcriber.transcripts([recording]))
    assert "what your country can do for you" in said
    image = ImageRef("i", Path("i"))
    heard_one, typed_one = model.generate([(image, "", [recording]), (image, said)], 12)
    assert heard_one == typed_one
    assert heard_one.text
    example = replace(typed(said, "I will.", image=True), audio=())
    spoken_one = replace(example, turns=(Turn("", "I will."),), audio=(recording,))
    assert model.losses([spoken_one]) == model.losses([example])


@pytest.mark.real
def test_a_real_posterior_becomes_the_transcript(real_models: Path, real_folder: Path) -> None:
    """Whisper tiny.en and Phi-2's own tokenizer: the ids are the same, and doubt goes as the temperature does."""
    language, transcriber = phi_language(), real_ears(real_models)
    recording = AudioRef("jfk", real_folder / "speech" / "jfk.flac")
    example = Example("1", (), (Turn("", "yes"),), "s", audio=(recording,))

    def rows(link: TranscriptFeatures) -> torch.Tensor:
        sample = Multimodal(language, None, None, audio_source=link).encode(example)
        assert sample is not None
        return link.rows([sample.spans[0].reference])

    words = rows(TranscriptFeatures(language, transcriber))
    soft, cold = (
        rows(SoftTranscriptFeatures(language, transcriber, 1.0)),
        rows(SoftTranscriptFeatures(language, transcriber, 1e-3)),
    )
    assert torch.allclose(cold, words, atol=1e-6)
    moved = (soft - words).norm(dim=1) / words.norm(dim=1)
    assert (moved > 1e-4).float().mean() > 0.8  # Nearly every word leaves some doubt,
    assert moved.median() < 0.3  # and most of them little.
