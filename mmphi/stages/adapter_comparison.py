"""What an adapter changes: figures and answers on rows kept apart, before its training and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config import LanguageSettings
from mmphi.config.qlora import QloraSettings
from mmphi.pipeline.stage import Context
from mmphi.stages.conversations import Validation

if TYPE_CHECKING:
    from mmphi.models.multimodal import Multimodal
    from mmphi.tracking.tracker import Tracker

BEFORE = "before.json"


def measured_before(ctx: Context, model: Multimodal, validation: Validation | None) -> dict[str, Any]:
    """Figures and answers of the model before its first step: measured once, and kept for a training that goes on."""
    kept = ctx.folder / BEFORE
    if ctx.first and not kept.exists():
        figures = dict(validation(0)) if validation else {}
        figures |= plain_text_loss(ctx, model)
        answers = [row["prediction"] for row in validation.rows] if validation else []
        kept.write_text(json.dumps({"figures": figures, "answers": answers}))
    return dict(json.loads(kept.read_text())) if ctx.first else {}


def measured_after(ctx: Context, model: Multimodal, validation: Validation | None, steps: int) -> dict[str, float]:
    """The same figures of the model as it is after so many steps."""
    if validation and validation.step != steps:  # It had come to its end before it was interrupted.
        validation(steps)
    return {**(validation.figures if validation else {}), **plain_text_loss(ctx, model)}


def plain_text_loss(ctx: Context, model: Multimodal) -> dict[str, float]:
    """What shows whether text is forgotten: the loss on the text that settings name, else on scenes as words."""
    from mmphi.evaluation.perplexity import PerplexityProtocol, text_loss
    from mmphi.stages.pretrain_scenes import scene_texts

    path, language = ctx.settings(QloraSettings).plain_text, model.language
    if path:
        found = text_loss(
            language.model, language.tokenizer, Path(path).read_text("utf-8"), PerplexityProtocol(512, 512, True, 32)
        )
        return {"val/text_loss": found.loss}
    if "scenes" in ctx.upstream and ctx.settings(LanguageSettings).model == "pretrain":
        nats, tokens = model.losses(list(scene_texts(ctx.upstream["scenes"].path, held=True)))
        return {"val/text_loss": nats / max(tokens, 1)}
    return {}


def record_before_and_after(rows: Sequence[Mapping[str, Any]], tracker: Tracker) -> None:
    """A table and a picture of answers before and after a training, side by side.

    Args:
        rows: With ``image``, ``question``, ``before``, ``prediction`` and ``reference``.
        tracker: The run to record in.
    """
    from mmphi.evaluation.evaluate import comparison_figure

    table = [
        {
            "image": row["image"],
            "question": row["question"],
            "before": row["before"],
            "after": row["prediction"],
            "reference": row["reference"],
        }
        for row in rows
    ]
    tracker.table("before_and_after", table, image="image")
    if table:
        tracker.figure("before_and_after", comparison_figure(table))
