"""The section of an adapter on a quantised language model."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mmphi.config.section import setting
from mmphi.config.shared import ConversationSettings, Precision


class QloraSettings(ConversationSettings):
    """A low-rank adapter on the frozen, quantised language model, trained on conversations."""

    model: str = setting(
        "",
        "folder or run of a trained projector to start from; empty takes the projector stage of these settings",
        file="model",
    )
    base_precision: Precision = setting(
        "4bit", "weights of the frozen language model: 4bit is NF4, quantised doubly", formerly="base"
    )
    rank: int = setting(16, "inner width of the adapter", unit="units", ge=1, le=4096)
    alpha: float = setting(32.0, "the adapter is scaled by alpha / rank, or alpha / sqrt(rank) with rslora", gt=0)
    rslora: bool = setting(False, "rank-stabilised scaling")
    dropout: float = setting(0.0, "share of the adapter's inputs dropped in training", ge=0, lt=1)
    dora: bool = setting(False, "train magnitudes and directions of the weights separately (DoRA)")
    targets: list[str] = setting([], "names of the layers that get an adapter; none takes all linear ones")
    learning_rate: float = setting(2e-4, "peak learning rate of the adapter", gt=0, le=1)
    projector_learning_rate: float = setting(2e-5, "peak learning rate of the projector; 0 freezes it", ge=0, le=1)
    paged: bool = setting(
        False, "let the optimiser's state move to the CPU where a GPU runs short of memory", affects_key=False
    )
    mixture: str = setting(
        "", "groups to train on and their weights (caption=1, scenes:questions=2, text=1); empty takes data's own"
    )
    questions: int = setting(
        0,
        "yes/no questions of each image, made from its captions, to train on as well; half have the answer no",
        unit="questions",
        ge=0,
    )
    phrasings: Literal["one", "varied"] = setting(
        "varied",
        "phrasings of the yes/no questions: one, or several with varied case and punctuation",
        legacy_default="one",
    )
    plain_text: str = setting("", "a text whose loss is measured before and after, to measure forgetting", file="path")

    @model_validator(mode="after")
    def _phrasings_of_questions(self) -> QloraSettings:
        """Reset ``phrasings`` if there are no questions: it has no effect, and earlier results stay valid."""
        if not self.questions:
            self.__dict__["phrasings"] = "one"
        return self
