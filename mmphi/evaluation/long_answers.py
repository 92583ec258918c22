"""Evaluation of answers other than captions: loss by kind of row, and ROUGE-L."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pycocoevalcap.rouge.rouge import Rouge

from mmphi.data.llava_row_types import LONG_KINDS
from mmphi.data.schema import Example
from mmphi.evaluation.ptb_tokenize import ptb_text
from mmphi.generation.batch_generate import GeneratedAnswer

if TYPE_CHECKING:
    from mmphi.models.multimodal import Multimodal


def row_kind(example: Example) -> str:
    """Return the kind of an example; ``caption`` by default."""
    return example.attributes.get("kind", "caption")


def losses_by_kind(model: Multimodal, examples: Sequence[Example]) -> dict[str, float]:
    """Return the loss of each kind of row in nats per supervised token (``loss/KIND``); empty for a single kind."""
    kinds = sorted({row_kind(example) for example in examples})
    if len(kinds) < 2:
        return {}
    metrics = {}
    for name in kinds:
        nats, tokens = model.losses([e for e in examples if row_kind(e) == name])
        metrics[f"loss/{name}"] = nats / max(tokens, 1)
    return metrics


def to_answer(examples: Sequence[Example], count: int) -> list[Example]:
    """Return the first examples of every kind with long answers, at most ``count`` of each."""
    return [e for name in LONG_KINDS for e in [e for e in examples if row_kind(e) == name][:count]]


def rouge_l(prediction: str, reference: str) -> float:
    """Return ROUGE-L (Lin 2004), 0 to 1, on COCO's tokenization, with beta 1.2 as in COCO's evaluation."""
    if not ptb_text(prediction) or not ptb_text(reference):
        return 0.0
    return float(Rouge().calc_score([ptb_text(prediction)], [ptb_text(reference)]))


def measure_long_answers(
    examples: Sequence[Example], answers: Sequence[GeneratedAnswer]
) -> tuple[dict[str, float], list[Mapping[str, Any]]]:
    """Score answers to the first questions of examples, by kind.

    Args:
        examples: Examples whose first question was asked.
        answers: One generated answer per example.

    Returns:
        Metrics ``rouge_l/KIND`` and ``eos_rate/KIND``, and table rows with image, kind, question, prediction and
        reference.
    """
    metrics: dict[str, float] = {}
    for name in sorted({row_kind(example) for example in examples}):
        pairs = [(e, a) for e, a in zip(examples, answers, strict=True) if row_kind(e) == name]
        scores = [rouge_l(answer.text, example.turns[0].answer) for example, answer in pairs]
        metrics[f"rouge_l/{name}"] = sum(scores) / len(scores)
        metrics[f"eos_rate/{name}"] = sum(answer.ended for _, answer in pairs) / len(pairs)
    rows: list[Mapping[str, Any]] = [
        {
            "image": e.image.source if e.image else "",
            "kind": row_kind(e),
            "question": e.turns[0].question,
            "prediction": answer.text,
            "reference": e.turns[0].answer,
        }
        for e, answer in zip(examples, answers, strict=True)
    ]
    return metrics, rows
