"""What stages share that learn from conversations: their sequences and steps, and what is measured meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mmphi.config import DataSettings
from mmphi.config.shared import ConversationSettings
from mmphi.pipeline.stage import Context
from mmphi.stages.shared_models import log_report

if TYPE_CHECKING:
    from mmphi.data.schema import Example, ReadReport
    from mmphi.models.multimodal import Multimodal
    from mmphi.tracking.tracker import Tracker
    from mmphi.training.packed_dataset import PackedStepDataset

VALIDATION_EXAMPLES = 200  # Enough for a loss to 0.02 nats; the full split is evaluated at the end.


C = TypeVar("C", bound=ConversationSettings)


def training_dataset(
    ctx: Context,
    model: Multimodal,
    chosen: C,
    examples: Sequence[Example],
    report: ReadReport,
    mixed: Callable[[Sequence[Example]], Sequence[int]],
    views: int = 1,
) -> tuple[PackedStepDataset, C]:
    """What a training learns from, in its order.

    Args:
        ctx: Of the stage.
        model: Whose prompt writes the conversations, and whose images stand in them.
        chosen: The training's settings.
        examples: Of all splits; those to train on are taken.
        report: Counts what is left out; it is recorded.
        mixed: Which of the examples given to take, by index and in any number.
        views: Of each image, in turn.

    Returns:
        The steps, and the settings with as many as there are.
    """
    from mmphi.data.tokenized_dataset import Subset, count_left_out, tokenization_identity, tokenized_examples
    from mmphi.training.packed_dataset import packed_dataset

    training = [e for e in examples if e.split == "train"]
    conversations = training, model.language.prompt, model.length, chosen.max_length
    sequences = ctx.resources.once(
        "encoded", tokenization_identity(*conversations), lambda: tokenized_examples(*conversations)
    )
    count_left_out(sequences, training, chosen.max_length, report)
    log_report(report, ctx.tracker, ctx.settings(DataSettings))
    samples = Subset(sequences, mixed(sequences.kept))
    how: dict[str, Any] = {"layout": model.packed.layout, "views": views, "together": chosen.together}
    how |= {"contrast": chosen.contrast, "contrast_from": chosen.contrast_from}
    steps = packed_dataset(samples, model.sources, chosen, **how)
    if chosen.supervised_tokens:
        chosen = chosen.model_copy(update={"steps": steps.until(chosen.supervised_tokens)})
        steps = packed_dataset(samples, model.sources, chosen, **how)
    return steps, chosen


def log_packing(model: Multimodal, title: str, tracker: Tracker) -> None:
    """Tell where a model does not take packed rows."""
    if model.packed.layout.kind == "alone":
        language = model.language
        tracker.say(
            f"{title}: {language.name} does not keep packed sequences apart (by {language.packing_error:.2g} of its"
            " logits' spread, or past its window): one sequence a row"
        )


class Validation:
    """Loss and grounding gain on held-out images, and what the model says about a few of them.

    Attributes:
        figures: Those of the last evaluation.
        rows: What was said at it.
        step: When that was; -1 before the first.
    """

    def __init__(
        self, model: Multimodal, examples: Sequence[Example], chosen: ConversationSettings, tracker: Tracker
    ) -> None:
        from mmphi.data.dataset_builder import stratified

        self.model, self.chosen, self.tracker = model, chosen, tracker
        self.held = stratified(examples, VALIDATION_EXAMPLES, seed=0)
        self.figures: Mapping[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        self.step = -1
        shown: dict[str, Example] = {}
        for example in self.held:
            if example.image is not None and len(shown) < chosen.sample_images:
                shown.setdefault(example.image.id, example)
        self.shown = list(shown.values())

    def __call__(self, step: int) -> Mapping[str, float]:
        """Measure after a step."""
        from mmphi.evaluation.grounding import grounding

        measured = grounding(self.model, self.held)
        self.figures = {"val/loss": measured.loss, "val/grounding_gain": measured.gain}
        prompts = [(e.images, e.turns[0].question) for e in self.shown]
        self.step = step
        self.rows = [
            {
                "step": step,
                "image": e.images[0].path,
                "prediction": answer.text,
                "reference": e.turns[0].answer,
                "correct": "yes" if answer.text == e.turns[0].answer else "no",
                "question": e.turns[0].question,
            }
            for e, answer in zip(self.shown, self.model.generate(prompts, self.chosen.sample_tokens), strict=True)
        ]
        self.tracker.table("predictions", self.rows, image="image")
        return self.figures
