"""Table of metrics: name, unit, direction and meaning; for caption metrics also the function.

To add a caption metric, write a function of predictions and references and add it to :data:`CAPTION_METRICS`. The stage
``evaluate`` computes it and MLflow's comparison pages show it; ``docs/reference/metrics.md`` must document it. A metric
that is renamed gets a line in :data:`mmphi.config.former_names.FORMER_METRICS`, with which stored runs are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmphi.evaluation.captioning import bleu4, cider

Direction = Literal["higher", "lower", ""]
CaptionFunction = Callable[[Sequence[str], Sequence[Sequence[str]]], float]


@dataclass(frozen=True)
class Metric:
    """A metric of an evaluation.

    Attributes:
        unit: Unit and range of its values.
        better: Whether higher or lower values are better; empty if neither.
        meaning: Description in one line.
        function: Function of predictions and references, for caption metrics only.
    """

    unit: str
    better: Direction
    meaning: str
    function: CaptionFunction | None = None


CAPTION_METRICS: Mapping[str, Metric] = {
    "cider": Metric("0 to 10", "higher", "CIDEr-D of captions (Vedantam et al. 2015), COCO's tokenization", cider),
    "bleu4": Metric(
        "0 to 100", "higher", "corpus BLEU-4 of captions (Papineni et al. 2002), COCO's tokenization", bleu4
    ),
}
# Keys are names without the split: `cider` is recorded as `test/cider`.
METRICS: Mapping[str, Metric] = {
    "loss": Metric(
        "nats per token", "lower", "mean cross-entropy of the supervised tokens; `loss/KIND` of one kind of row"
    ),
    "perplexity": Metric("", "lower", "exponential of the loss"),
    "grounding_gain": Metric("nats per token", "higher", "loss with another image minus loss with the right one"),
    **CAPTION_METRICS,
    "exact_match": Metric("share", "higher", "captions that equal a reference; on drawn scenes, all attributes right"),
    "exact_match_held_out_phrasing": Metric("share", "higher", "the same, asked in wordings that no training contains"),
    "attribute_accuracy": Metric("share", "higher", "attributes of drawn scenes that a caption states correctly"),
    "eos_rate": Metric(
        "share", "", "answers that end with an end token before the length limit; `eos_rate/KIND` of long answers"
    ),
    "rouge_l": Metric("share", "higher", "ROUGE-L of long answers (Lin 2004); `rouge_l/KIND` of one kind of row"),
    "yes_no_accuracy": Metric("share", "higher", "correct answers to balanced yes/no questions (POPE, Li et al. 2023)"),
    "yes_no_accuracy_held_out_phrasing": Metric("share", "higher", "the same in wordings that no training contains"),
    "yes_no_f1": Metric("share", "higher", "F1 of the answer yes"),
    "yes_no_share_of_yes": Metric(
        "share", "", "answers that are yes; half of the questions are to be answered with it"
    ),
    "text_loss": Metric("nats per token", "lower", "loss on plain text: how much an adapter forgets"),
    "audio_gain": Metric("nats per token", "higher", "loss with another recording minus loss with the right one"),
    "wer": Metric("share of words", "lower", "word error rate, after Whisper's normalization"),
}


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute every caption metric, by name.

    Args:
        predictions: One caption per image.
        references: One or more captions of each image.
    """
    return {
        name: metric.function(predictions, references)
        for name, metric in CAPTION_METRICS.items()
        if metric.function is not None
    }


def documented(name: str) -> str:
    """Return the key in :data:`METRICS` of a recorded metric; empty if there is none.

    Args:
        name: Recorded name with the split, such as ``test/loss/caption``.
    """
    parts = name.split("/")[1:]
    return next((found for end in range(len(parts), 0, -1) if (found := "/".join(parts[:end])) in METRICS), "")
