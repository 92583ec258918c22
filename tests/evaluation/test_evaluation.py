from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
from builders import example
from PIL import Image
from sacrebleu import corpus_bleu

from mmphi.data.schema import Example, ImageRef, Turn
from mmphi.errors import DataError
from mmphi.evaluation import evaluate
from mmphi.evaluation.attributes import attribute_accuracy, parse_caption
from mmphi.evaluation.captioning import bleu4, cider
from mmphi.evaluation.evaluate import EvaluationConfig, evaluate_model
from mmphi.evaluation.grounding import grounding, shuffled_images
from mmphi.evaluation.mbr import mbr_caption
from mmphi.evaluation.ptb_tokenize import ptb_tokens
from mmphi.generation.batch_generate import GeneratedAnswer

REFERENCES = [["a dog runs in the snow", "the dog plays outside"], ["two men sit on a bench", "men are sitting"]]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog's ball, in the Snow .", "a dog 's ball in the snow"),
        ("A man's t-shirt is red.", "a man 's t-shirt is red"),
        ("A café on the corner, isn't it?", "a café on the corner is n't it"),
        ("Two dogs (brown and white) play.", "two dogs -lrb- brown and white -rrb- play"),
        ('He said "hello" and left...', "he said hello and left"),
        ("It can't be; they won't go!", "it ca n't be they wo n't go"),
        ("The U.S. flag waves. A man looks up.", "the u.s. flag waves a man looks up"),
        ("5 o'clock at St. Paul's", "5 o'clock at st. paul 's"),
        ("dogs' tails - wagging", "dogs tails wagging"),
        ("rock 'n' roll, and a slip n 'slide .", "rock 'n' roll and a slip n slide"),
        ("the 1980's car costs $5.50 & more", "the 1980 's car costs $ 5.50 & more"),
        ("a 10:30 train --- at home 100%", "a 10:30 train at home 100 %"),
        ("日本 の 犬", "日本 の 犬"),
        ("...", ""),
    ],
)
def test_words_are_cocos(caption, expected):
    """What coco-caption's Java tokenizer (stanford-corenlp 3.4.1, as pycocoevalcap brings it) makes of the same."""
    assert " ".join(ptb_tokens(caption)) == expected


PREDICTIONS = [
    "A man's red t-shirt is drying on the line.",
    "two dogs (one brown, one white) run across a field",
    "The café isn't open yet; a waiter sits outside.",
    "girl plays guitar",
    "...",
    "ein Kätzchen schläft auf dem Sofa",
]
WANTED = [
    [
        "A red t-shirt hangs on a clothes line.",
        "Someone's t-shirt is drying outside",
        "a man hangs it on the line",
    ],
    ["Two dogs run across a grassy field.", "A brown dog and a white dog are running - side by side"],
    ["A waiter sits outside of a closed café.", "The café is closed, and a waiter waits"],
    ["A girl plays the guitar on a stage", "the girl is playing an electric guitar."],
    ["A boat on the lake at 10:30.", "it's a small boat"],
    ["Ein Kätzchen schläft auf einem Sofa.", "das Kätzchen liegt auf dem Sofa"],
]


def test_figures_are_pycocoevalcaps_with_its_java_tokenizer():
    """Computed once with PTBTokenizer, Cider and Bleu(4) of pycocoevalcap 1.2 and Java 17."""
    assert cider(PREDICTIONS, WANTED) == pytest.approx(1.9792263551029292, rel=1e-9)
    assert bleu4(PREDICTIONS, WANTED) == pytest.approx(28.192089334016096, rel=1e-6)


def test_captions_without_words_are_worth_nothing():
    assert cider(["..."], [["!!!"]]) == 0.0
    assert bleu4(["..."], [["!!!"]]) == 0.0
    assert mbr_caption([["...", "!"], ["?", ""]]) == [0, 0]


def test_cider_by_hand():
    """One reference each: a caption equal to it scores 10, one that shares no word scores 0."""
    references = [["a dog runs in snow"], ["two men sit outside quietly"]]
    assert cider([r[0] for r in references], references) == pytest.approx(10.0)
    assert cider(["nothing shared whatsoever here now", "x y z w v"], references) == 0.0
    half = cider(["a dog runs in snow", "x y z w v"], references)
    assert half == pytest.approx(5.0)


def test_bleu_is_sacrebleus():
    said = ["a dog runs in snow", "two men sit on a chair"]
    columns = [[r[k] for r in REFERENCES] for k in range(2)]
    expected = corpus_bleu(said, columns, tokenize="none", force=True).score
    assert bleu4(said, REFERENCES) == pytest.approx(expected)
    ragged = [[REFERENCES[0][0]], REFERENCES[1]]
    filled = [[ragged[0][0], ragged[1][0]], [ragged[0][0], ragged[1][1]]]
    assert bleu4(said, ragged) == pytest.approx(corpus_bleu(said, filled, tokenize="none", force=True).score)
    assert bleu4([r[0] for r in REFERENCES], REFERENCES) == pytest.approx(100.0)


def test_consensus_is_the_best_choice_of_all():
    """Against every choice there is, each scored with all candidates as references."""
    candidates = [
        ["a cat sleeps on a red chair", "a dog runs in the snow", "a dog runs over the snow", "a dog plays in snow"],
        ["two men sit on a bench", "two men sit outside", "a boat on the sea", "two women sit on a bench"],
    ]
    choices = list(product(range(4), repeat=2))
    gains = [cider([candidates[0][a], candidates[1][b]], candidates) for a, b in choices]
    assert tuple(mbr_caption(candidates)) == choices[gains.index(max(gains))]
    assert mbr_caption(candidates) != [0, 2]


def test_consensus_takes_what_most_say_and_the_first_among_equals():
    assert mbr_caption([["x y z w", "a dog runs", "a dog runs", "a dog jumps"], ["", "two men", "", "two men"]]) == [
        1,
        1,
    ]


def test_attributes():
    drawn = {"color1": "red", "shape1": "circle", "relation": "left of", "color2": "blue", "shape2": "square"}
    right = "a big red circle left of a small blue square"
    assert parse_caption(right) == drawn
    assert parse_caption("a big red circle left of a small blue") == {}
    found = attribute_accuracy([right, "a big red cross above a small blue square", "nonsense"], [drawn] * 3)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["attribute_accuracy"] == pytest.approx((5 + 3 + 0) / 15)
    assert found["attribute_accuracy/shape1"] == pytest.approx(1 / 3)


class Fake:
    """Says the reference of the image it is shown; its loss is 1 nat a token where image and answer belong together."""

    def __init__(self, captions: dict[str, str]) -> None:
        self.captions = captions

    def losses(self, examples, images=None):
        shown = [e.images for e in examples] if images is None else images
        nats = sum(1.0 if i == e.images else 3.0 for e, i in zip(examples, shown, strict=True)) * 4
        return nats, 4 * len(examples)

    def generate(self, prompts, max_new_tokens=48, batch_size=32):
        return [
            GeneratedAnswer("yes" if "is there" in q else self.captions[i.id], i.id != "photos/0.jpg")
            for i, q in prompts
        ]

    def sample(self, prompts, count, temperature, max_new_tokens=48, batch_size=32, seed=0):
        """The right caption in all samples but the first."""
        wrong = GeneratedAnswer(f"{temperature} of nothing", ended=False)
        return [[wrong] + [GeneratedAnswer(self.captions[i.id], ended=True)] * (count - 1) for i, _ in prompts]


def test_grounding_gain_is_the_difference():
    found = grounding(Fake({}), [example(i, "x") for i in range(4)])
    assert (found.loss, found.shuffled_loss, found.gain) == (1.0, 3.0, 2.0)
    assert found.perplexity == pytest.approx(math.e)


def test_shuffled_images_are_never_ones_own():
    examples = [example(i % 5, "x") for i in range(15)] + [example(9, "x", image=False)]
    for seed in range(20):
        images = shuffled_images(examples, seed)
        assert images[-1] == ()
        assert all(i != e.images for i, e in zip(images[:-1], examples[:-1], strict=True))
    assert shuffled_images(examples, 1) == shuffled_images(examples, 1)
    assert shuffled_images(examples, 1) != shuffled_images(examples, 2)


def test_everything_in_one_call(tmp_path, recorder):
    captions = {}
    examples = []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20, 10)).save(path)
        for caption in (f"a dog number {i}", f"one animal called {i}"):
            ref = ImageRef(f"photos/{i}.jpg", path)
            examples.append(Example(f"{i}", (ref,), (Turn("", caption),), "photos"))
        captions[f"photos/{i}.jpg"] = f"a dog number {i}"
    metrics = evaluate_model(Fake(captions), examples, EvaluationConfig(yes_no=4), recorder, prefix="test")
    assert metrics["test/grounding_gain"] == 2.0
    assert metrics["test/eos_rate"] == pytest.approx(2 / 3)
    assert metrics["test/exact_match"] == 1.0
    assert metrics["test/cider"] > 1
    rows = recorder.tables["test_predictions"]
    assert [r["prediction"] for r in rows] == [f"a dog number {i}" for i in range(3)]
    assert "test_predictions" in recorder.figures
    fewer = evaluate_model(Fake(captions), examples, EvaluationConfig(max_images=2), recorder)
    assert fewer["test/eos_rate"] == 0.5
    with pytest.raises(DataError, match="split is empty"):
        evaluate_model(Fake({}), [], EvaluationConfig(), recorder)


def test_no_more_texts_than_images_are_measured(monkeypatch, recorder):
    """Training data may hold any number of conversations without an image."""
    images = [Example(f"i{i}", (ImageRef(f"{i}", Path(f"{i}")),), (Turn("", "a dog"),), "s") for i in range(6)]
    texts = [Example(f"t{i}", (), (Turn("who?", "a dog"),), "s") for i in range(50)]
    seen = []

    def measured(model, examples, seed):
        seen.append([example.id for example in examples])
        raise StopIteration

    monkeypatch.setattr(evaluate, "grounding", measured)
    for most, expected in ((2, ["t0", "t1", "i0", "i1"]), (0, [e.id for e in [*texts, *images]])):
        with pytest.raises(StopIteration):
            evaluate_model(Fake({}), [*texts, *images], EvaluationConfig(max_images=most), recorder, prefix="train")
        assert seen.pop() == expected
