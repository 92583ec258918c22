from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from answerers import HEARD, StepGate, answerer, desk_of, folder_of, picture, recording, wait_until

from mmphi.errors import DataError, StoreError
from mmphi.generation.engine import Engine
from mmphi.generation.sampling import SamplingParams
from mmphi.models.multimodal import Multimodal
from mmphi.serving.page.examples import of_folder, of_scenes
from mmphi.serving.page.model_pool import ModelPool, PageConversation, PageTurn
from mmphi.serving.scheduler import Scheduler

SHORT = SamplingParams(max_tokens=8)


@pytest.fixture(scope="module")
def models() -> dict[str, Multimodal]:
    return {"one": answerer(2), "two": answerer(3)}


@pytest.fixture
def photo(tmp_path: Path) -> str:
    (tmp_path / "photo.png").write_bytes(picture())
    return str(tmp_path / "photo.png")


@pytest.fixture
def spoken(tmp_path: Path) -> str:
    (tmp_path / "question.wav").write_bytes(recording())
    return str(tmp_path / "question.wav")


def asked(
    pool: ModelPool, *talks: PageConversation, system: str = "", how: SamplingParams = SHORT, who: str = "me"
) -> int:
    return sum(1 for _ in pool.ask(who, talks, system, how))


def test_it_answers_as_python_does_and_goes_on(models: dict[str, Multimodal], photo: str, spoken: str) -> None:
    pool = desk_of(models)
    talk = PageConversation("one", [PageTurn("and what is it?", photo, spoken)])
    assert asked(pool, talk) > 2  # As it is said.
    turn = talk.turns[0]
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": photo},
                {"type": "audio", "audio": spoken},
                {"type": "text", "text": "and what is it?"},
            ],
        }
    ]
    assert turn.answer == models["one"].chat(messages, max_tokens=8)
    assert (turn.transcript, turn.problem, turn.done) == (HEARD, "", True)
    talk.turns.append(PageTurn("why?"))
    asked(pool, talk)
    messages += [{"role": "assistant", "content": turn.answer}, {"role": "user", "content": "why?"}]
    assert talk.turns[1].answer == models["one"].chat(messages, max_tokens=8)
    assert talk.turns[1].transcript == ""
    pool.close()


def test_two_models_answer_the_same_question_each_its_own_way(models: dict[str, Multimodal], photo: str) -> None:
    pool = desk_of(models)
    talks = [PageConversation(name, [PageTurn("what is it?", photo)]) for name in models]
    asked(pool, *talks)
    assert [talk.turns[0].answer for talk in talks] == [
        model.ask("what is it?", photo, max_new_tokens=8) for model in models.values()
    ]
    assert talks[0].turns[0].answer != talks[1].turns[0].answer
    pool.close()


def test_the_system_text_comes_first(models: dict[str, Multimodal]) -> None:
    pool, talk = desk_of(models), PageConversation("one", [PageTurn("hello")])
    asked(pool, talk, system="be brief")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert talk.turns[0].answer == models["one"].chat(messages, max_tokens=8)
    pool.close()


def test_what_cannot_be_answered_is_told_and_not_part_of_what_follows(
    models: dict[str, Multimodal], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(picture()[:60])
    pool, talk = desk_of(models), PageConversation("one", [PageTurn("what?", str(tmp_path / "broken.png"))])
    asked(pool, talk)
    assert "broken.png" in talk.turns[0].problem
    talk.turns.append(PageTurn("hello"))
    asked(pool, talk)
    assert talk.turns[1].answer == models["one"].chat([{"role": "user", "content": "hello"}], max_tokens=8)
    empty = PageConversation("one", [PageTurn("  ")])
    asked(pool, empty)
    assert "empty" in empty.turns[0].problem
    pool.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> StepGate:
    return StepGate(monkeypatch)


def test_stopping_keeps_the_partial_answer_and_leaves_other_visitors_alone(
    models: dict[str, Multimodal], gate: StepGate
) -> None:
    pool, long = desk_of(models), SamplingParams(max_tokens=300)
    mine, other = PageConversation("one", [PageTurn("tell me all")]), PageConversation("one", [PageTurn("hello")])
    theirs = pool.ask("you", [other], "", SHORT)
    next(theirs)
    gate.permit(8)  # Two prompts, and a few tokens of each answer.
    for _ in pool.ask("me", [mine], "", long):
        if mine.turns[0].answer.strip():
            pool.stop("me")
            gate.open()  # Where a stop did nothing, the answer would go on to its end.
    assert mine.turns[0].done
    assert mine.turns[0].problem == ""
    whole = models["one"].chat([{"role": "user", "content": "tell me all"}], max_tokens=300)
    assert mine.turns[0].answer
    assert whole.startswith(mine.turns[0].answer.strip())
    assert len(mine.turns[0].answer) < len(whole)
    list(theirs)
    assert other.turns[0].answer == models["one"].chat([{"role": "user", "content": "hello"}], max_tokens=8)
    pool.close()


def test_what_is_asked_meanwhile_gets_nothing_of_the_answer(models: dict[str, Multimodal]) -> None:
    pool, talk = desk_of(models), PageConversation("one", [PageTurn("hello")])
    assert talk.answering
    answering = pool.ask("me", [talk], "", SHORT)
    next(answering)
    talk.turns.append(PageTurn("and?"))
    list(answering)
    assert talk.turns[0].answer == models["one"].chat([{"role": "user", "content": "hello"}], max_tokens=8)
    assert talk.turns[1] == PageTurn("and?")
    del talk.turns[1]
    assert not talk.answering
    pool.close()


def test_a_closed_answer_frees_its_slot(models: dict[str, Multimodal], gate: StepGate) -> None:
    pool, talk = desk_of(models), PageConversation("one", [PageTurn("tell me all")])
    answering = pool.ask("me", [talk], "", SamplingParams(max_tokens=300))
    gate.permit(4)
    next(answering)
    next(answering)
    answering.close()  # type: ignore[attr-defined]
    assert not talk.answering
    wait_until(lambda: pool.worker("one").open == 0)
    pool.close()


def test_models_that_nobody_talks_to_are_let_go(models: dict[str, Multimodal]) -> None:
    loaded: list[str] = []

    def load(name: str) -> Scheduler:
        if name == "none":
            raise StoreError("there is no run none")
        loaded.append(name)
        return Scheduler(Engine(models["one"], 1))

    pool = ModelPool(load, most=2)
    first = pool.worker("a")
    pool.worker("b")
    assert pool.worker("a") is first
    pool.worker("c")
    assert pool.worker("a") is first
    pool.worker("b")
    assert loaded == ["a", "b", "c", "b"]
    talk = PageConversation("none", [PageTurn("hello")])
    asked(pool, talk)
    assert "no run none" in talk.turns[0].problem
    pool.close()


def test_others_are_answered_while_a_model_loads(models: dict[str, Multimodal]) -> None:
    loading, loaded, calls = threading.Event(), threading.Event(), []

    def load(name: str) -> Scheduler:
        calls.append(name)
        if name == "two":
            loading.set()
            assert loaded.wait(60)
        return Scheduler(Engine(models[name], 1))

    pool = ModelPool(load)
    pool.worker("one")
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(pool.worker, "two") for _ in range(2)]
        assert loading.wait(60)
        talk = PageConversation("one", [PageTurn("hello")])
        asked(pool, talk)
        assert talk.turns[0].done
        assert not talk.turns[0].problem
        loaded.set()
        assert waiting[0].result() is waiting[1].result()
    assert calls == ["one", "two"]
    pool.close()


def test_a_model_that_is_let_go_of_is_gone_before_the_next_one_loads(models: dict[str, Multimodal]) -> None:
    made: list[weakref.ref[Scheduler]] = []
    alive: list[int] = []

    def load(_: str) -> Scheduler:
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        worker = Scheduler(Engine(models["one"], 1))
        made.append(weakref.ref(worker))
        return worker

    pool = ModelPool(load, most=1)
    for name in "abc":
        pool.worker(name)
    assert alive == [0, 0, 0]
    pool.close()


def test_a_model_let_go_of_between_choice_and_question_is_loaded_again(
    models: dict[str, Multimodal], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ModelPool(lambda name: Scheduler(Engine(models["one"], 1)), most=1)
    real, others = pool.worker, ["b"]

    def chosen(name: str) -> Scheduler:
        worker = real(name)
        if others:
            real(others.pop())  # Another visitor's, for which this one is let go.
        return worker

    monkeypatch.setattr(pool, "worker", chosen)
    talk = PageConversation("a", [PageTurn("hello")])
    asked(pool, talk)
    assert talk.turns[0].answer == models["one"].chat([{"role": "user", "content": "hello"}], max_tokens=8)
    pool.close()


def test_examples_of_a_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "examples")
    assert of_folder(folder) == [
        ["what colour is it?", str(folder / "a.png"), str(folder / "a.wav")],
        ["", str(folder / "b.png"), None],
    ]
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="examples"):
            of_folder(wrong)


def test_examples_of_scenes_ask_each_kind_of_question(tmp_path: Path) -> None:
    import json

    kinds = ("describe the image.\n<image>", "<image>\nwhat color is it?")
    records = [
        {"image": f"test/{image}.png", "conversations": [{"from": "human", "value": kind}]}
        for image in range(3)
        for kind in kinds
    ]
    (tmp_path / "test.json").write_text(json.dumps(records))
    found = of_scenes(tmp_path)
    assert [each[0] for each in found] == ["describe the image.", "what color is it?", "describe the image."]
    assert found[1][1] == str(tmp_path / "images" / "test" / "1.png")
