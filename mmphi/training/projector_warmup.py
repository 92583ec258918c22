"""Alignment warm-up: trains the projector on the words of captions, without running the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmphi.config.projector import ProjectorSettings
from mmphi.data.features import ImageFeatures
from mmphi.data.schema import Example, ImageRef
from mmphi.models.multimodal import Multimodal
from mmphi.tracking.tracker import PrefixedTracker, Tracker
from mmphi.training.caption_alignment import (
    BagOfWordsAlignmentLoss,
    CaptionAlignmentDataset,
    CaptionWords,
    alignment_loss,
    caption_words,
    collate,
    match_embedding_norm,
    word_frequencies,
)
from mmphi.training.trainer import train

MEASURED = 200  # Maximum number of validation images.


def align_to_captions(
    model: Multimodal,
    examples: Sequence[Example],
    settings: ProjectorSettings,
    *,
    tracker: Tracker,
    folder: Path,
    progress: bool = True,
) -> None:
    """Train the projector to predict the words of captions, then match the norm of its outputs to word embeddings.

    Args:
        model: Model whose projector is trained; only the tokenizer and embeddings of its language model are used.
        examples: Conversations of all splits.
        settings: ``alignment_steps``, ``alignment_batch_size``, ``alignment_learning_rate``, ``num_augmentations`` and
            the seed are used.
        tracker: Records metrics under ``align/``.
        folder: Checkpoints are written to its subfolder ``align``.
        progress: Whether a progress bar is shown.
    """
    features, projector = model.features, model.projector
    assert features is not None
    assert projector is not None
    tracker = PrefixedTracker(tracker, "align")
    steps, batch_size = settings.alignment_steps, settings.alignment_batch_size
    known, images = caption_words(model.language, _answers(examples, "train", steps * batch_size))
    if not images:
        tracker.say("alignment warm-up skipped: no training image has an answer")
        return
    embeddings = model.language.embeddings(known)
    usage = word_frequencies(images, len(known)).to(embeddings.device)
    task = BagOfWordsAlignmentLoss(projector, embeddings, usage)
    shape = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": settings.alignment_learning_rate,
        "gradient_accumulation_steps": 1,
    }
    own = settings.model_copy(update={**shape, "optimizer": "adamw", "checkpoint_selection": "last"})
    _, held = caption_words(model.language, _answers(examples, "validation", MEASURED), known)
    usual = -float((task.usual.cpu()[[w for h in held for w in h.words]] * _counts(held)).sum()) if held else 0.0

    def measure(step: int) -> Mapping[str, float]:
        loss = alignment_loss(task, held, features)
        rows = _named(model, task, held[: settings.sample_images], known, features)
        tracker.table("words", [{"step": step, **row} for row in rows], image="image")
        return {"val/loss": loss, "val/gain": usual / max(1.0, float(_counts(held).sum())) - loss}

    train(
        task,
        CaptionAlignmentDataset(
            images, features, steps=steps, batch_size=batch_size, seed=settings.seed, views=settings.num_augmentations
        ),
        own,
        folder=folder / "align",
        tracker=tracker,
        title="align",
        validate=measure if held else None,
        progress=progress,
    )
    some = collate(images[:batch_size], features)["features"]
    match_embedding_norm(projector, some, float((embeddings.norm(dim=-1) * usage).sum() / usage.sum()))


def _answers(examples: Sequence[Example], split: str, most: int) -> list[tuple[ImageRef, list[str]]]:
    """At most ``most`` images of a split, with all answers about them."""
    found: dict[str, tuple[ImageRef, list[str]]] = {}
    for example in examples:
        if example.split == split and example.image is not None:
            if example.image.id not in found and len(found) == most:
                continue
            _, captions = found.setdefault(example.image.id, (example.image, []))
            captions += [turn.answer for turn in example.turns]
    return list(found.values())


def _counts(images: Sequence[CaptionWords]) -> Tensor:
    return torch.tensor([count for one in images for count in one.counts], dtype=torch.float32)


def _named(
    model: Multimodal,
    task: BagOfWordsAlignmentLoss,
    images: Sequence[CaptionWords],
    known: Sequence[int],
    features: ImageFeatures,
) -> list[dict[str, Any]]:
    """Table rows of the likeliest word at each position of some images, relative to the words' frequencies."""
    if not images:
        return []
    seen = features.get([one.image for one in images]).to(task.words.device)
    with torch.no_grad():
        above = task.places(seen) - task.usual
    rows = []
    for one, likeliest in zip(images, above.argmax(dim=-1).tolist(), strict=True):
        words = [model.language.tokenizer.decode([known[place]]).strip() for place in likeliest]
        rows.append({"image": one.image.source, "words": " ".join(words)})
    return rows
