from __future__ import annotations

from pathlib import Path

import pytest
from builders import Recorder
from PIL import Image
from rouge_reference import longest_common

from mmphi.data.llava_row_types import caption_question, row_type
from mmphi.data.schema import Example, ImageRef, Turn
from mmphi.evaluation.evaluate import EvaluationConfig, evaluate_model
from mmphi.evaluation.long_answers import rouge_l
from mmphi.generation.batch_generate import GeneratedAnswer


@pytest.mark.parametrize(
    ("questions", "kind"),
    [
        ([""], "caption"),
        (["Render a clear and concise summary of the photo."], "caption"),
        (["Provide a brief description of the given image."], "caption"),
        (["Describe the image concisely."], "caption"),
        (["What color is the bus?", "And the sky?"], "conversation"),
        (["Describe the following image."], "detail"),
        (["Can you describe the main features of this image for me?"], "detail"),
        (["What do you see happening in this image?"], "detail"),
        (["Walk through the important details of the image."], "detail"),
        (["What might be the reason that the man waits here?"], "reasoning"),
        (["How long is a short marathon?"], "reasoning"),
    ],
)
def test_kinds_of_rows(questions, kind):
    assert row_type([Turn(question, "x") for question in questions]) == kind


@pytest.mark.parametrize(
    ("questions", "asked"),
    [
        (["describe it", "describe it", "briefly"], "describe it"),
        (["describe it", ""], ""),
        ([], ""),
    ],
)
def test_what_captions_are_asked_for_with(questions, asked):
    image = (ImageRef("a", Path("a.jpg")),)
    talk = {"kind": "conversation"}
    others = [
        Example("talk", image, (Turn("hello", "hi"),), "x", "train", talk),
        Example("none", (), (Turn("hello", "hi"),), "x", "train"),
    ]
    captions = [Example(str(i), image, (Turn(q, "a dog"),), "x", "train") for i, q in enumerate(questions)]
    assert caption_question([*others * 3, *captions]) == asked


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("the dog runs in the snow", "a dog runs quickly in deep snow"),
        ("a b c", "c b a"),
        ("same words here", "Same words, here!"),
    ],
)
def test_rouge_is_the_longest_common_subsequence(prediction, reference):
    """Lin (2004) by hand: F of recall and precision, recall weighed by 1.2 squared."""
    one, other = prediction.lower().split(), reference.lower().replace(",", "").replace("!", "").split()
    common = longest_common(one, other)
    precision, recall = common / len(one), common / len(other)
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_nothing_said_is_worth_nothing():
    assert rouge_l("", "a dog") == rouge_l("...", "a dog") == 0.0


class Fake:
    """Answers every question with what it was taught; a nat a token."""

    def __init__(self, answers: dict[tuple[str, str], str]) -> None:
        self.answers, self.longest = answers, []

    def losses(self, examples, images=None):
        return float(len(examples)) * (2.0 if images is None else 3.0), len(examples)

    def generate(self, prompts, max_new_tokens=48, batch_size=32):
        self.longest.append(max_new_tokens)
        found = []
        for images, question in prompts:
            image = images if isinstance(images, ImageRef) else images[0]
            found.append(GeneratedAnswer(self.answers.get((image.id, question), "no"), True))
        return found


def test_rows_of_one_image_are_scored_by_their_question(tmp_path: Path):
    """Answers to other questions about the same image are no references of its caption."""
    examples, answers = [], {}
    brief, long = "Provide a brief description of the given image.", "Describe the following image."
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        images = (ImageRef(f"llava/{i}", tmp_path / f"{i}.png"),)
        rows = {
            "": f"a small dog number {i} runs",
            brief: f"one brown animal number {i} outside",
            long: f"in picture {i} there is a dog that runs over a wide field of deep snow",
            "Why does it run?": f"because of {i}",
        }
        for question, answer in rows.items():
            turns = (Turn(question, answer),)
            examples.append(Example(f"{i}/{question}", images, turns, "llava", "test", {"kind": row_type(turns)}))
            answers[f"llava/{i}", question] = answer
        two = (Turn("what?", "a dog"), Turn("where?", "outside"))
        examples.append(Example(f"{i}/talk", images, two, "llava", "test", {"kind": row_type(two)}))
    recorder, model = Recorder(), Fake(answers)
    metrics = evaluate_model(model, examples, EvaluationConfig(yes_no=0, max_answer_tokens=99), recorder)
    assert metrics["test/cider"] == pytest.approx(10.0)
    assert metrics["test/exact_match"] == 1.0
    assert len(recorder.tables["test_predictions"]) == 6
    assert {row["reference"] for row in recorder.tables["test_predictions"]} == {
        answer for (_, question), answer in answers.items() if question in ("", brief)
    }
    assert metrics["test/rouge_l/detail"] == metrics["test/rouge_l/reasoning"] == 1.0
    assert metrics["test/rouge_l/conversation"] == 0.0
    assert {name for name in metrics if name.startswith("test/loss/")} == {
        f"test/loss/{name}" for name in ("caption", "conversation", "detail", "reasoning")
    }
    assert model.longest == [48, 99]
    assert {row["kind"] for row in recorder.tables["test_answers"]} == {"conversation", "detail", "reasoning"}
    few = evaluate_model(Fake(answers), examples, EvaluationConfig(yes_no=0, long_answers=0), Recorder())
    assert not [name for name in few if "rouge" in name]
