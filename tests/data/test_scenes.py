from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from builders import context
from PIL import Image

from mmphi.data.dataset_builder import read_examples
from mmphi.data.phrasing import DESCRIBE, WHICH_COLORS, WHICH_SHAPES
from mmphi.data.scene_drawing import AHEAD, ImageWriter, draw
from mmphi.data.scene_drawing import drawing_function as drawing
from mmphi.data.scene_text import (
    CELLS,
    caption,
    corpus_texts,
    grid,
    questions,
    yes_no,
    yes_no_questions,
)
from mmphi.data.scenes import COLORS, RELATIONS, SHAPES, combinations, held_out, sample, scenes
from mmphi.evaluation.attributes import attribute_accuracy
from mmphi.stages import Settings
from mmphi.stages.scenes import STAGE, ScenesSettings

SMALL = Settings(scenes=ScenesSettings(train_images=40, validation_images=8, test_images=12, texts=30))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    STAGE.run(context(STAGE, folder, SMALL))
    return folder


def some_scenes(count: int):
    return list(scenes(count, random.Random(0), list(combinations())))


def test_there_is_enough_to_tell_apart():
    assert len(COLORS) >= 6
    assert len(SHAPES) >= 4
    assert len(RELATIONS) == 4
    assert len(combinations()) == 28 * 27 * 4


def test_things_stand_in_their_relation_and_inside_the_picture():
    for scene in some_scenes(300):
        big, small = scene.big, scene.small
        assert big.radius > 1.3 * small.radius
        gap = max(abs(big.x - small.x), abs(big.y - small.y))
        assert gap >= big.radius + small.radius
        seen = {
            "left of": big.x < small.x,
            "right of": big.x > small.x,
            "above": big.y < small.y,
            "below": big.y > small.y,
        }
        assert seen[scene.relation]
        horizontal = abs(big.x - small.x) > abs(big.y - small.y)
        assert horizontal == ("of" in scene.relation)
        for thing in (big, small):
            assert thing.radius < thing.x < 1 - thing.radius
            assert thing.radius < thing.y < 1 - thing.radius


def test_the_picture_shows_the_colors_where_the_things_are():
    for i, scene in enumerate(some_scenes(20)):
        pixels = np.asarray(draw(scene, 96, random.Random(i)), float)
        for thing in (scene.big, scene.small):
            center = pixels[int(thing.y * 96), int(thing.x * 96)]
            nearest = min(COLORS, key=lambda c: np.abs(center - COLORS[c]).sum())
            assert nearest == thing.color


def test_the_relations_are_equally_frequent():
    counts = Counter(s.relation for s in some_scenes(2000))
    assert all(400 < n < 600 for n in counts.values())


def test_unseen_combinations_are_in_no_training_image_and_no_text(drawn):
    unseen = held_out(SMALL.scenes.held_out, SMALL.scenes.seed)
    assert len(unseen) == round(0.15 * len(combinations()))

    def seen_in(split: str) -> set:
        rows = json.loads((drawn / f"{split}.json").read_text())
        found = [r["attributes"] for r in rows]
        return {(f"{a['color1']} {a['shape1']}", a["relation"], f"{a['color2']} {a['shape2']}") for a in found}

    assert not seen_in("train") & unseen
    assert not seen_in("validation") & unseen
    assert seen_in("test") <= unseen
    forbidden = {f"a big {big} {relation} a small {small}" for big, relation, small in unseen}
    for line in (drawn / "corpus.jsonl").read_text().splitlines():
        assert not {answer for _, answer in json.loads(line)["turns"]} & forbidden


def test_every_part_of_what_is_unseen_is_seen_elsewhere():
    """The test asks for new combinations of known things, not for new things."""
    unseen = held_out(0.15, 0)
    seen = [c for c in combinations() if c not in unseen]
    for place in range(3):
        assert {c[place] for c in unseen} <= {c[place] for c in seen}


def test_scenes_come_back_through_the_llava_reader(drawn):
    examples, report = read_examples(SMALL.data, drawn)
    assert not report.dropped
    captions = [e for e in examples if e.attributes["kind"] == "caption"]
    assert Counter(e.split for e in captions) == {"train": 40, "validation": 8, "test": 12}
    assert all("<image>" not in t.question for e in examples for t in e.turns)
    assert all(e.image.path.is_file() for e in examples)
    said = [e.turns[0].answer for e in captions]
    assert attribute_accuracy(said, [e.attributes for e in captions])["exact_match"] == 1.0


def test_drawing_again_gives_the_same_files(drawn, tmp_path):
    STAGE.run(context(STAGE, tmp_path, SMALL))
    for path in drawn.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(drawn)).read_bytes() == path.read_bytes()


def test_the_grid_says_both_words_of_both_things():
    rng = random.Random(1)
    for scene in some_scenes(200):
        words = grid(scene, rng).split()
        assert len(words) == CELLS * CELLS
        said = Counter(words)
        for thing in (scene.big, scene.small):
            assert said[thing.color]
            assert said[thing.shape]
        assert sum(said[w] for w in said if w != ".") >= 4


def test_answers_are_true():
    rng = random.Random(2)
    for scene in some_scenes(200):
        for turn in questions(scene, 6, rng):
            if turn.question.startswith("what color is the big"):
                assert turn.answer == scene.big.color
            if turn.question.startswith("where is the") and scene.big.kind in turn.question:
                assert turn.answer == f"{scene.relation} the {scene.small.kind}"
            if turn.question == WHICH_SHAPES:
                assert turn.answer == f"a big {scene.big.shape} {scene.relation} a small {scene.small.shape}"
            if turn.question == WHICH_COLORS:
                assert turn.answer.split()[2] == scene.big.color
                assert turn.answer.split()[-2] == scene.small.color
            if turn.question.startswith("is there"):
                there = turn.question.removeprefix("is there a ").rstrip("?") in (scene.big.kind, scene.small.kind)
                assert turn.answer == ("yes" if there else "no")
    asked = [yes_no(s, rng).answer for s in some_scenes(400)]
    assert 150 < asked.count("yes") < 250


def test_yes_no_questions_are_true_and_balanced():
    rng = random.Random(0)
    answers = Counter()
    for scene in some_scenes(300):
        words = {word for thing in (scene.big, scene.small) for word in (thing.color, thing.shape)}
        kinds = {scene.big.kind, scene.small.kind}
        for turn in yes_no_questions(scene, 6, rng):
            asked = turn.question.removeprefix("is there a ").removesuffix("?").removesuffix(" shape")
            assert (turn.answer == "yes") == (asked in (kinds if " " in asked else words))
            answers[turn.answer] += 1
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.05


def test_corpus_is_captions_and_questions():
    texts = list(corpus_texts(40, 2, random.Random(0), list(combinations())))
    assert [len(t.turns) for t in texts] == ([1] * 9 + [2] * 4 + [4] * 7) * 2
    assert all((t.turns[0].question == DESCRIBE) == (len(t.turns) == 1) for t in texts)
    assert {turn.answer for t in texts[13:20] for turn in t.turns} == {"yes", "no"}
    one = sample(combinations()[0], random.Random(0))
    assert caption(one) == "a big red circle left of a small red square"


def test_images_are_written_while_the_next_are_drawn(tmp_path: Path) -> None:
    drawn = [Image.effect_noise((16, 16), 30 + number) for number in range(AHEAD + 10)]
    with ImageWriter() as writing:
        for number, image in enumerate(drawn):
            writing.save(image.copy, tmp_path / f"{number}.png")
    for number, image in enumerate(drawn):
        assert Image.open(tmp_path / f"{number}.png").tobytes() == image.tobytes()


@pytest.mark.parametrize("count", [1, AHEAD + 10])
def test_what_cannot_be_written_is_told(tmp_path: Path, count: int) -> None:
    def write() -> None:
        with ImageWriter() as writing:
            for _ in range(count):
                writing.save(lambda: Image.new("L", (4, 4)), tmp_path / "nowhere" / "a.png")

    with pytest.raises(FileNotFoundError, match="nowhere"):
        write()


@pytest.mark.parametrize("threads", [1, 3])
def test_images_are_the_same_whoever_draws_them(threads, tmp_path):
    def all_of(rng):
        return scenes(20, rng, list(combinations()))

    one, many = random.Random(5), random.Random(5)
    expected = [np.asarray(draw(scene, 48, one)) for scene in all_of(one)]
    with ImageWriter(threads) as writing:
        for number, scene in enumerate(all_of(many)):
            writing.save(drawing(scene, 48, many), tmp_path / f"{number:02d}.png")
    for image, path in zip(expected, sorted(tmp_path.iterdir()), strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(path)))
