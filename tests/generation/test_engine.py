"""Answers by slots are those of transformers' generate, whoever else is answered beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import RandomFeatures, tiny_language

from mmphi.data.schema import ImageRef
from mmphi.errors import GenerationError, ModelError, SettingsError
from mmphi.generation import engine as engines
from mmphi.generation import kv_cache
from mmphi.generation.engine import Engine
from mmphi.generation.sampling import SamplingParams
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.text.tokenized_example import TokenizedExample

QUESTIONS = [("a", "what is it?"), ("b", ""), (None, "two and two?"), ("a", "what else is there to see in it?")]
GREEDY = SamplingParams(max_tokens=12)


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Multimodal:
    torch.manual_seed(2)
    language = tiny_language()
    language.model.set_attn_implementation(request.param)
    return Multimodal(language, Projector(ProjectorConfig(RandomFeatures.width, 32)), RandomFeatures())


def asked(model: Multimodal, image: str | None, question: str) -> TokenizedExample:
    return model.open_prompt(ImageRef(image, Path(image)) if image else None, question)


def expected(model: Multimodal, image: str | None, question: str, tokens: int = 12) -> str:
    return model.generate([(ImageRef(image, Path(image)) if image else None, question)], tokens)[0].text


def finished(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def test_an_answer_is_that_of_generate(model: Multimodal) -> None:
    for question in QUESTIONS:
        assert "".join(Engine(model).stream(asked(model, *question), GREEDY)) == expected(model, *question)


def test_whoever_comes_later_and_leaves_earlier_changes_no_answer(model: Multimodal) -> None:
    engine = Engine(model, slots=3)
    answering = []
    for number, question in enumerate(QUESTIONS * 3):
        answering.append((engine.submit(asked(model, *question), SamplingParams(max_tokens=4 + number % 5)), question))
        engine.step()
    finished(engine)
    for each, question in answering:
        assert each.text == expected(model, *question, tokens=each.sampling.max_tokens)
        assert each.reason in ("stop", "length")


def test_a_second_question_about_a_picture_does_not_read_it_again(model: Multimodal) -> None:
    engine = Engine(model, slots=2)
    first = engine.submit(asked(model, "a", "what is it?"), GREEDY)
    finished(engine)
    assert first.reused == 0
    again = engine.submit(asked(model, "a", "what is it like?"), GREEDY)
    finished(engine)
    assert again.reused > RandomFeatures.tokens
    assert again.text == expected(model, "a", "what is it like?")
    other = engine.submit(asked(model, "b", "what is it?"), GREEDY)
    finished(engine)
    assert other.reused < RandomFeatures.tokens
    assert other.text == expected(model, "b", "what is it?")


def test_a_conversation_is_not_overwritten_while_another_slot_is_free(model: Multimodal) -> None:
    engine = Engine(model, slots=2)
    for image in ("a", "b"):
        engine.submit(asked(model, image, "what is it?"), GREEDY)
        finished(engine)
    again = engine.submit(asked(model, "a", "what is it?"), GREEDY)
    finished(engine)
    assert again.reused == len(again.prompt) - 1


def test_long_prompts_are_read_in_chunks_and_others_speak_meanwhile(
    model: Multimodal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "CHUNK", 16)
    engine = Engine(model, slots=2)
    short = engine.submit(asked(model, None, "hi"), SamplingParams(max_tokens=30))
    engine.step()
    question = "a", "a long question? " * 8
    long = engine.submit(asked(model, *question), GREEDY)
    engine.step()
    assert long.tokens == 0
    said = short.tokens
    engine.step()
    assert short.tokens == said + 1 or short.reason
    finished(engine)
    assert long.text == expected(model, *question)


def test_what_left_costs_nothing_more(model: Multimodal) -> None:
    engine = Engine(model, slots=1)
    first = engine.submit(asked(model, "a", "what?"), SamplingParams(max_tokens=200))
    second = engine.submit(asked(model, None, "who?"), GREEDY)
    engine.step()
    engine.cancel(first)
    assert (first.reason, engine.busy) == ("cancelled", 1)
    finished(engine)
    assert second.text == expected(model, None, "who?")
    pieces: Iterator[str] = engine.stream(asked(model, None, "and?"), SamplingParams(max_tokens=200))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # A generator.
    assert engine.busy == 0


def test_one_that_breaks_breaks_no_other(model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, slots=2)

    embed = model.packed.embed

    def broken(ids: torch.Tensor, features: Any, places: Any) -> torch.Tensor:
        if len(features["image"]):
            raise OSError("gone")
        return embed(ids, features, places)

    good = engine.submit(asked(model, None, "who?"), GREEDY)
    monkeypatch.setattr(model.packed, "embed", broken)
    bad = engine.submit(asked(model, "a", "what?"), GREEDY)
    finished(engine)
    assert isinstance(bad.error, OSError)
    assert good.text == expected(model, None, "who?")


def test_memory_grows_with_the_conversations(model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "SMALLEST", 16)
    engine = Engine(model, slots=2)
    short = engine.submit(asked(model, None, "hi"), SamplingParams(max_tokens=4))
    finished(engine)
    memory = engine.reader.slots
    assert memory.capacity == 16
    question = None, "a longer question? " * 4
    answers = [engine.submit(asked(model, *each), GREEDY) for each in (question, (None, "hi"))]
    finished(engine)
    assert memory.capacity == 128
    assert [layer[0].shape[2] for layer in memory._memory] == [128, 128]
    assert [each.text for each in answers] == [expected(model, *question), expected(model, None, "hi")]
    assert short.text == expected(model, None, "hi", 4)
    assert Engine(model, length=100).length == 100
    assert Engine(model).length == 256  # The model's, which is less than the default.
    monkeypatch.setattr(engines, "CONTEXT", 64)
    assert Engine(model).length == 64


def test_memory_that_does_not_suffice_leaves_the_slots_as_they_were(
    model: Multimodal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "SMALLEST", 16)
    engine, calls = Engine(model, slots=2), []
    first = engine.submit(asked(model, None, "hi"), GREEDY)
    finished(engine)
    empty = kv_cache.SlotKVCache._empty

    def scarce(memory: kv_cache.SlotKVCache, *given: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no more")
        return empty(memory, *given)

    question = None, "a longer question? " * 4
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache.SlotKVCache, "_empty", scarce)
        failed = engine.submit(asked(model, *question), GREEDY)
        finished(engine)
    assert isinstance(failed.error, torch.OutOfMemoryError)
    for each, answer in ((question, expected(model, *question)), ((None, "hi"), first.text)):
        again = engine.submit(asked(model, *each), GREEDY)
        finished(engine)
        assert (again.error, again.text) == (None, answer)


def test_features_are_computed_before_the_steps(model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, slots=1)
    answering = engine.answering(asked(model, *QUESTIONS[0]), GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(model.features, "rows", lambda _: pytest.fail("they are computed in a step"))
        engine.enqueue(answering)
        finished(engine)
    assert answering.text == expected(model, *QUESTIONS[0])
    assert answering.features == {}


def test_a_prompt_that_leaves_no_room_is_refused(model: Multimodal) -> None:
    engine = Engine(model, slots=1, length=40)
    with pytest.raises(ModelError, match="40"):
        engine.submit(asked(model, None, "x" * 60), GREEDY)
    nearly = engine.submit(asked(model, None, "x" * 30), SamplingParams(max_tokens=100))
    finished(engine)
    assert nearly.reason in ("stop", "length")
    assert len(nearly.prompt) + nearly.tokens <= 41


def test_equal_seeds_draw_equal_answers_and_others_do_not(model: Multimodal) -> None:
    def drawn(seed: int, beside: int) -> str:
        engine = Engine(model)
        first = engine.submit(asked(model, "a", "what?"), SamplingParams(max_tokens=20, temperature=1.0, seed=seed))
        for number in range(beside):
            engine.submit(asked(model, None, "who?"), SamplingParams(max_tokens=9, temperature=2.0, seed=number))
        finished(engine)
        return first.text

    assert drawn(1, 0) == drawn(1, 3)
    assert len({drawn(seed, 0) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    "how", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"stop": ("",)}]
)
def test_impossible_sampling_is_refused(how: dict) -> None:
    with pytest.raises(SettingsError):
        SamplingParams(**how)


def test_an_error_of_a_decoding_step_ends_the_answer_it_belongs_to(
    model: Multimodal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass over all answers fails as long as one of them is in it; the others go on, each to its own answer."""
    engine = Engine(model, slots=3)
    forward = engine._forward

    def failing(rows: list[int], starts: list[int], embeddings: torch.Tensor) -> torch.Tensor:
        if embeddings.shape[1] == 1 and any(engine._saying.get(slot) is bad and bad.tokens == 3 for slot in rows):
            raise MemoryError("out of memory")
        return forward(rows, starts, embeddings)

    monkeypatch.setattr(engine, "_forward", failing)
    answers = [(engine.submit(asked(model, *question), GREEDY), question) for question in QUESTIONS]
    bad = answers[1][0]
    finished(engine)
    assert isinstance(bad.error, MemoryError)
    assert (bad.reason, bad.tokens) == ("cancelled", 3)
    for answering, question in (answers[0], *answers[2:]):
        assert answering.error is None
        assert answering.text == expected(model, *question)
    again = engine.submit(asked(model, *QUESTIONS[1]), SamplingParams(max_tokens=3))
    finished(engine)
    assert again.text == expected(model, *QUESTIONS[1], tokens=3)


def test_logits_that_are_nan_end_the_answer(model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, slots=2)
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda *given: forward(*given) * torch.nan)
    broken = engine.submit(asked(model, *QUESTIONS[0]), GREEDY)
    finished(engine)
    assert isinstance(broken.error, GenerationError)
    assert "NaN" in str(broken.error)
    monkeypatch.undo()
    assert "".join(engine.stream(asked(model, *QUESTIONS[0]), GREEDY)) == expected(model, *QUESTIONS[0])


@pytest.mark.parametrize("temperature", [1e-45, 3e-38, 1e-5, 0.0099])
def test_temperatures_below_a_hundredth_are_greedy(model: Multimodal, temperature: float) -> None:
    how = SamplingParams(max_tokens=12, temperature=temperature, top_p=0.9, seed=1)
    assert "".join(Engine(model).stream(asked(model, *QUESTIONS[0]), how)) == expected(model, *QUESTIONS[0])
