"""Yes/no questions: balanced, true, and nothing denied that may be there."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
from builders import example

from mmphi.data.schema import Example, ImageRef, Turn
from mmphi.evaluation.object_vocabulary import mentioned_objects, plausible_objects
from mmphi.evaluation.ptb_tokenize import ptb_tokens
from mmphi.evaluation.yes_no import Question, conversations, score_yes_no, yes_no_questions


def scene(number: int) -> Example:
    attributes = {"color1": "red", "shape1": "circle", "relation": "above", "color2": "blue", "shape2": "cross"}
    return Example(
        str(number),
        (ImageRef(f"s/{number}", Path("x")),),
        (Turn("", "x"),),
        "s",
        attributes={"kind": "caption", **attributes},
    )


def test_scene_questions_are_balanced_and_true():
    asked = yes_no_questions([scene(i) for i in range(3)], 30, seed=0)
    assert len(asked) == 30
    assert sum(q.answer for q in asked) == 15
    for question in asked:
        thing = question.text.removeprefix("is there a ").rstrip("?")
        assert question.answer == (thing in ("red circle", "blue cross"))
        assert set(thing.split()) & {"red", "circle", "blue", "cross"}


def test_scenes_and_photos_in_one_split_have_questions_of_their_kind():
    llava = example(0, "two dogs in the snow")
    llava = dataclasses.replace(llava, attributes={"kind": "detail"})
    mixed = [scene(0), llava, example(1, "a cat on a bed")]
    asked = {question.image.id for question in yes_no_questions(mixed, 60, seed=0)}
    assert asked == {scene(0).image.id, llava.image.id, example(1, "").image.id}
    assert len(conversations(mixed, 2, seed=0)) == 3


def test_photo_questions_deny_nothing_that_a_caption_leaves_possible():
    """Where a man is, a person is; a rider on a bike may be a woman."""
    texts = [
        "a man rides a bike",
        "two dogs in the snow",
        "a girl throws a ball",
        "a person on a beach",
        "a child swims",
    ]
    examples = [example(i, text) for i, text in enumerate(texts)] * 3
    denied: dict[str, set] = {}
    for question in yes_no_questions(examples, 400, seed=0):
        if not question.answer:
            denied.setdefault(question.image.id, set()).add(question.text.split(" a ")[-1].removesuffix("?"))
    people = {"man", "woman", "girl", "boy", "child", "person", "people"}
    for i in (0, 2, 3, 4):
        assert not denied[f"photos/{i}.jpg"] & people
    assert denied["photos/1.jpg"] & people
    assert "dog" in denied["photos/0.jpg"]
    assert mentioned_objects(["men", "bikes", "nothing"]) == {"man", "bicycle"}
    assert "motorcycle" in plausible_objects(["bicycle"])


@pytest.mark.real
def test_photo_questions_are_not_contradicted_on_real_captions(real_photos):
    """Every "no" against every word of the image's five captions and what these words leave possible."""
    with (real_photos / "captions.csv").open() as file:
        rows = list(csv.DictReader(file))
    captions: dict[str, list[str]] = {}
    for row in rows:
        captions.setdefault(row["image"], []).append(row["caption"])
    examples = [
        Example(f"{image}/{i}", (ImageRef(image, Path(image)),), (Turn("", text),), "photos")
        for image, texts in captions.items()
        for i, text in enumerate(texts)
    ]
    people = {"man", "woman", "girl", "boy", "child", "person", "people", "kid", "baby", "men", "children", "women"}
    questions = yes_no_questions(examples, 1600, seed=0)
    assert len(questions) == 1600
    for question in questions:
        thing = question.text.removesuffix("?").split()[-1]
        spoken = {word for text in captions[question.image.id] for word in ptb_tokens(text)}
        if not question.answer:
            assert thing not in spoken
            assert not (thing in people and spoken & people)


def test_questions_to_learn_from_are_balanced_and_true_and_asked_once():
    captions = [
        "a dog on the grass",
        "two men and a dog",
        "a red car in the street",
        "children play with a ball",
        "zzz",
    ]
    examples = [example(i, c) for i, c in enumerate(captions)] + [example(0, "a frisbee flies over water")]
    made = {row.image.id: row for row in conversations(examples, 4, seed=1)}
    assert set(made) == {f"photos/{i}.jpg" for i in range(4)}  # Of the last one nothing is known.
    for row in made.values():
        assert [turn.answer for turn in row.turns].count("yes") * 2 == len(row.turns) <= 4
        assert len({turn.question for turn in row.turns}) == len(row.turns)
        assert (row.attributes["kind"], row.source, row.split) == ("yes_no", "photos", "train")
    said = {turn.question: turn.answer for turn in made["photos/0.jpg"].turns}
    there = {f"is there a {thing}?" for thing in ("dog", "grass", "toy", "water", "ball")}
    assert {question for question, answer in said.items() if answer == "yes"} <= there
    assert not {question for question, answer in said.items() if answer == "no"} & there
    assert conversations(examples, 4, seed=1) == list(made.values())
    assert conversations(examples, 4, seed=2) != list(made.values())
    (drawn,) = conversations([scene(0)], 2, seed=0)
    assert {turn.answer for turn in drawn.turns} == {"yes", "no"}


def test_photo_questions_never_deny_what_a_caption_names():
    captions = ["a dog on the grass", "two men and a dog", "a red car in the street", "children play with a ball"]
    examples = [example(i, c) for i, c in enumerate(captions)] + [example(0, "a frisbee flies over water")]
    asked = yes_no_questions(examples, 40, seed=1)
    assert sum(q.answer for q in asked) == 20
    denied = {q.text for q in asked if q.image.id == "photos/0.jpg" and not q.answer}
    assert denied
    assert not denied & {"is there a dog?", "is there a grass?", "is there a water?"}
    assert yes_no_questions([example(0, "zzz")], 10, seed=0) == []


def test_yes_no_score_by_hand():
    image = ImageRef("a", Path("a"))
    questions = [Question(image, "?", answer) for answer in (True, True, False, False)]
    found = score_yes_no(questions, ["Yes, it is", "no", "yes", "a dog"])
    assert found == {"yes_no_accuracy": 0.5, "yes_no_f1": 0.5, "yes_no_share_of_yes": 0.5}
    assert score_yes_no(questions, ["no"] * 4)["yes_no_f1"] == 0.0
