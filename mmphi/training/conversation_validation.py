"""Validation of a multimodal model during training on conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmphi.config.shared import ConversationSettings
from mmphi.data.dataset_builder import stratified
from mmphi.data.schema import Example
from mmphi.evaluation.grounding import grounding
from mmphi.models.multimodal import Multimodal
from mmphi.tracking.tracker import Tracker

VALIDATION_EXAMPLES = 200  # Enough for the loss to within 0.02 nats; the full split is evaluated at the end.


class ConversationValidation:
    """Loss and grounding gain on held-out conversations, and answers about a few of their images.

    Args:
        model: The model that is trained.
        examples: Conversations of all splits; those of the validation split are used, or a stratified sample of them.
        settings: ``sample_images`` and ``sample_tokens`` are used.
        tracker: Records a table of answers at every call.

    Attributes:
        figures: Figures of the last call: ``val/loss`` in nats per token, ``val/grounding_gain`` in nats per token.
        rows: Answers of the last call.
        step: Step of the last call; -1 before the first.
    """

    def __init__(
        self, model: Multimodal, examples: Sequence[Example], settings: ConversationSettings, tracker: Tracker
    ) -> None:
        self.model, self.settings, self.tracker = model, settings, tracker
        self.held_out = stratified([e for e in examples if e.split == "validation"], VALIDATION_EXAMPLES, seed=0)
        self.figures: Mapping[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self.step = -1
        shown: dict[str, Example] = {}
        for example in self.held_out:
            if example.image is not None and len(shown) < settings.sample_images:
                shown.setdefault(example.image.id, example)
        self.shown = list(shown.values())

    def __bool__(self) -> bool:
        return bool(self.held_out)

    def __call__(self, step: int) -> Mapping[str, float]:
        """Measure the current model and record its answers for a step."""
        measured = grounding(self.model, self.held_out)
        self.figures = {"val/loss": measured.loss, "val/grounding_gain": measured.gain}
        prompts = [(e.images, e.turns[0].question) for e in self.shown]
        answers = self.model.generate(prompts, self.settings.sample_tokens)
        self.step = step
        self.rows = [
            {
                "step": step,
                "image": example.images[0].source,
                "prediction": answer.text,
                "reference": example.turns[0].answer,
                "correct": "yes" if answer.text == example.turns[0].answer else "no",
                "question": example.turns[0].question,
            }
            for example, answer in zip(self.shown, answers, strict=True)
        ]
        self.tracker.table("predictions", self.rows, image="image")
        return self.figures


def log_packing(model: Multimodal, title: str, tracker: Tracker) -> None:
    """Report if a model cannot be trained on packed rows and gets one sequence per row instead."""
    if model.packed.layout.kind == "alone":
        language = model.language
        tracker.say(
            f"{title}: {language.name} does not isolate packed sequences (logits differ by {language.packing_error:.2g}"
            " standard deviations, or sequences exceed its window): using one sequence per row"
        )
