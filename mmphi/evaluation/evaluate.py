"""Evaluation of a multimodal model on images."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from mmphi.data.images import open_image
from mmphi.data.phrasing import held_out_phrasing, match
from mmphi.data.schema import Example
from mmphi.errors import DataError, ImageError
from mmphi.evaluation.attributes import attribute_accuracy
from mmphi.evaluation.grounding import grounding
from mmphi.evaluation.long_answers import losses_by_kind, measure_long_answers, row_kind, to_answer
from mmphi.evaluation.mbr import mbr_caption
from mmphi.evaluation.metrics import caption_scores
from mmphi.evaluation.yes_no import score_yes_no, yes_no_questions
from mmphi.generation.batch_generate import GeneratedAnswer
from mmphi.models.multimodal import Multimodal, Question
from mmphi.tracking.tracker import Tracker

SHOWN = 12
HELD_OUT = "held_out_phrasing"


@dataclass(frozen=True)
class EvaluationConfig:
    """Extent of an evaluation.

    Attributes:
        max_images: Largest number of images; 0 takes all.
        max_new_tokens: Longest caption, in tokens.
        batch_size: Answers generated at once.
        yes_no: Number of yes/no questions.
        held_out_phrasings: Whether generated questions are also asked in phrasings that no training contains.
        long_answers: Number of questions of each kind with long answers (conversation, detail, reasoning).
        max_answer_tokens: Longest of these answers, in tokens.
        candidates: Captions sampled per image, of which MBR decoding selects one; 1 decodes greedily.
        temperature: Sampling temperature of the candidates.
        seed: Seed of samples, questions and shuffles.
    """

    max_images: int = 0
    max_new_tokens: int = 48
    batch_size: int = 32
    yes_no: int = 200
    held_out_phrasings: bool = False
    long_answers: int = 100
    max_answer_tokens: int = 512
    candidates: int = 1
    temperature: float = 0.5
    seed: int = 0


def evaluate_model(
    model: Multimodal,
    examples: Sequence[Example],
    chosen: EvaluationConfig,
    tracker: Tracker,
    prefix: str = "test",
) -> dict[str, float]:
    """Evaluate a model on examples of one split; record the metrics, and tables and figures of its answers.

    Args:
        model: Model to evaluate.
        examples: Examples of one split.
        chosen: Extent of the evaluation.
        tracker: Run to record in.
        prefix: Prefix of every metric's name, without the slash.

    Returns:
        Loss, perplexity, grounding gain and the loss by kind of row; of captions the share that end before the length
        limit, exact match, CIDEr and BLEU-4; of scenes attribute accuracy; ROUGE-L of long answers; accuracy, F1 and
        share of yes of yes/no questions.

    Raises:
        DataError: If there are no examples.
    """
    images = list(dict.fromkeys(image.id for e in examples for image in e.images))
    wanted = set(images[: chosen.max_images or None])
    texts = [e for e in examples if not e.images][: chosen.max_images or None]  # Only training data has any.
    kept = {id(e) for e in texts} | {id(e) for e in examples if e.images and all(i.id in wanted for i in e.images)}
    examples = [e for e in examples if id(e) in kept]
    if not examples:
        raise DataError(f"the {prefix} split is empty", "hold out images: data.validation_images, data.test_images")
    measured = grounding(model, examples, chosen.seed)
    metrics = {"loss": measured.loss, "perplexity": measured.perplexity, "grounding_gain": measured.gain}
    metrics |= losses_by_kind(model, examples)
    metrics |= _captions(model, examples, chosen, tracker, prefix)
    questioned = to_answer(examples, chosen.long_answers)
    if questioned:
        figures, rows = measure_long_answers(
            questioned,
            model.generate(
                [(e.images, e.turns[0].question) for e in questioned], chosen.max_answer_tokens, chosen.batch_size
            ),
        )
        metrics |= figures
        tracker.table(f"{prefix}_answers", rows[: 4 * SHOWN], image="image")
    questions = yes_no_questions(examples, chosen.yes_no, chosen.seed)
    if questions:
        answers = model.generate([(q.image, q.text) for q in questions], 8, chosen.batch_size)
        metrics |= score_yes_no(questions, [a.text for a in answers])
        if chosen.held_out_phrasings:
            rng = random.Random(f"held-out phrasings {chosen.seed}")
            prompts: list[Question] = [(q.image, held_out_phrasing(q.text, rng)) for q in questions]
            answers = model.generate(prompts, 8, chosen.batch_size)
            metrics[f"yes_no_accuracy_{HELD_OUT}"] = score_yes_no(questions, [a.text for a in answers])[
                "yes_no_accuracy"
            ]
    named = {f"{prefix}/{name}": value for name, value in metrics.items()}
    tracker.metrics(named)
    return named


def _captions(
    model: Multimodal, examples: Sequence[Example], chosen: EvaluationConfig, tracker: Tracker, prefix: str
) -> dict[str, float]:
    """Scores of one caption per image and question; all captions of that image and question are references."""
    groups: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        if len(example.images) == 1 and row_kind(example) == "caption":
            groups.setdefault((example.images[0].id, example.turns[0].question), []).append(example)
    if not groups:
        return {}
    firsts = [group[0] for group in groups.values()]
    references = [[e.turns[0].answer for e in group] for group in groups.values()]
    prompts = [(e.image, e.turns[0].question) for e in firsts]
    answers = _say(model, prompts, chosen)
    texts = [a.text for a in answers]
    metrics = {"eos_rate": sum(a.ended for a in answers) / len(answers), **caption_scores(texts, references)}
    if all("shape1" in e.attributes for e in firsts):
        attributes = [e.attributes for e in firsts]
        metrics |= attribute_accuracy(texts, attributes)
        if chosen.held_out_phrasings and all(match(question) for _, question in prompts):
            rng = random.Random(f"held-out phrasings {chosen.seed}")
            again = _say(model, [(image, held_out_phrasing(question, rng)) for image, question in prompts], chosen)
            accuracy = attribute_accuracy([a.text for a in again], attributes)
            metrics[f"exact_match_{HELD_OUT}"] = accuracy["exact_match"]
    else:
        hits = (a in refs for a, refs in zip(texts, references, strict=True))
        metrics["exact_match"] = sum(hits) / len(texts)
    rows: list[dict[str, Any]] = [
        {
            "image": e.image.source if e.image else "",
            "prediction": answer.text,
            "reference": refs[0],
            "correct": "yes" if answer.text in refs else "no",
            "ended": answer.ended,
        }
        for e, answer, refs in zip(firsts, answers, references, strict=True)
    ]
    tracker.table(f"{prefix}_predictions", rows[: 4 * SHOWN], image="image")
    tracker.figure(f"{prefix}_predictions", caption_figure(rows[:SHOWN]))
    return metrics


def _say(model: Multimodal, prompts: Sequence[Question], chosen: EvaluationConfig) -> list[GeneratedAnswer]:
    """Captions decoded greedily, or selected from samples by MBR decoding."""
    length, batch_size = chosen.max_new_tokens, chosen.batch_size
    if chosen.candidates == 1:
        return model.generate(prompts, length, batch_size)
    drawn = model.sample(prompts, chosen.candidates, chosen.temperature, length, batch_size * 4, chosen.seed)
    best = mbr_caption([[a.text for a in group] for group in drawn])
    return [group[k] for group, k in zip(drawn, best, strict=True)]


def caption_figure(rows: Sequence[Mapping[str, Any]], columns: int = 4) -> Figure:
    """Return a grid of images with predicted captions, and the reference where they differ.

    Args:
        rows: Mappings with ``image``, ``prediction`` and ``reference``.
        columns: Images per line.
    """

    def title(row: Mapping[str, Any]) -> tuple[str, bool]:
        right = row["prediction"] == row["reference"]
        prediction, truth = _wrapped(str(row["prediction"])), _wrapped(str(row["reference"]))
        return (prediction if right else f"{prediction}\n({truth})"), right

    return _grid(rows, title, columns)


def comparison_figure(rows: Sequence[Mapping[str, Any]], columns: int = 4) -> Figure:
    """Return a grid of images with a question, the answers before and after a training, and the reference.

    Args:
        rows: Mappings with ``image``, ``question``, ``before``, ``after`` and ``reference``.
        columns: Images per line.
    """

    def title(row: Mapping[str, Any]) -> tuple[str, bool]:
        question = [row["question"]] if row["question"] else []
        lines = [*question, f"before: {row['before']}", f"after: {row['after']}", f"({row['reference']})"]
        return "\n".join(_wrapped(str(line)) for line in lines), row["after"] == row["reference"]

    return _grid(rows, title, columns)


def _grid(
    rows: Sequence[Mapping[str, Any]], title: Callable[[Mapping[str, Any]], tuple[str, bool]], columns: int
) -> Figure:
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.9 * lines), layout="constrained")
    for axes in figure.subplots(lines, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, row in zip(figure.axes, rows, strict=False):
        with suppress(ImageError):  # Inputs of a custom encoder need not be image files.
            image = open_image(row["image"])
            axes.imshow(image.resize((320, 320 * image.height // image.width), Image.Resampling.LANCZOS))
        text, right = title(row)
        axes.set_title(text, fontsize=9, color="#1a7f37" if right else "#333333")
    return figure


def _wrapped(text: str, width: int = 38) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:5])
