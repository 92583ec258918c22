"""Training of a projector between image features and a frozen language model.

Liu et al. 2023 (arXiv 2304.08485) train this projector first, on captions. The settings are those of
:class:`mmphi.config.projector.ProjectorSettings`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from mmphi.config.projector import ProjectorSettings
from mmphi.data.features import ImageFeatures
from mmphi.data.schema import Example
from mmphi.data.tokenized_dataset import TokenizedDataset
from mmphi.errors import DataError
from mmphi.models.language.compiling import compiled_layers, should_compile
from mmphi.models.language.language_model import LanguageModel
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, projector_config
from mmphi.tracking.tracker import SilentTracker, Tracker
from mmphi.training.conversation_dataset import Choose, conversation_dataset, tokenize_training_rows
from mmphi.training.conversation_validation import ConversationValidation, log_packing
from mmphi.training.projector_warmup import align_to_captions
from mmphi.training.trainer import TrainingResult, train

FEATURE_BYTES = 2  # Features are stored in half precision.
STATISTICS_IMAGES, STATISTICS_BATCH = 4096, 256  # Images for the statistics of features.


def new_projector(
    language: LanguageModel, features: ImageFeatures, settings: ProjectorSettings, examples: Sequence[Example]
) -> Projector:
    """Returns a projector with seeded weights; with ``standardize``, fitted to features of training images.

    Args:
        language: Language model, whose width is the output width.
        features: Image features, whose width is the input width.
        settings: Seed and shape of the projector.
        examples: Conversations of all splits.
    """
    torch.manual_seed(settings.seed)
    projector = Projector(projector_config(settings, features.width, language.width, features.tokens))
    projector.fit(_training_features(features, examples))
    return projector


def _training_features(features: ImageFeatures, examples: Sequence[Example]) -> Iterator[Tensor]:
    """Yields batches (images, tokens, width) of features of at most ``STATISTICS_IMAGES`` training images."""
    images = list({e.image.id: e.image for e in examples if e.split == "train" and e.image is not None}.values())
    some = images[:: -(-len(images) // STATISTICS_IMAGES)] if images else []
    for first in range(0, len(some), STATISTICS_BATCH):
        yield features.get(some[first : first + STATISTICS_BATCH])


def train_projector(
    model: Multimodal,
    examples: Sequence[Example],
    settings: ProjectorSettings,
    *,
    tracker: Tracker | None = None,
    folder: Path | None = None,
    sequences: TokenizedDataset | None = None,
    choose: Choose | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> TrainingResult:
    """Train the projector of a model; its language model stays frozen.

    Args:
        model: Model with a projector of :func:`new_projector`, which is trained in place.
        examples: Conversations of all splits; the validation split is used for validation only.
        settings: Steps, batch size, learning rate, ...
        tracker: Receives metrics, tables and messages; by default they are discarded.
        folder: Checkpoint folder, from which a later call resumes; a temporary folder by default.
        sequences: Tokenized training conversations; by default ``examples`` are tokenized.
        choose: Maps the training conversations to the indices to train on; all by default.
        callbacks: Additional callbacks of transformers' Trainer.
        progress: Whether progress bars are shown.

    Returns:
        The result; its figures are empty without a validation split.

    Raises:
        DataError: If no training conversation has an image, or fits in ``max_length``.
        TrainingError: If the loss becomes NaN or infinite.
    """
    tracker = tracker or SilentTracker()
    projector, features = model.projector, model.features
    assert projector is not None
    assert features is not None
    if not any(e.images for e in examples if e.split == "train"):
        raise DataError("no training example has an image", "check the data")
    with ExitStack() as stack:
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmphi-")))
        log_packing(model, "projector", tracker)
        if settings.alignment_steps:
            align_to_captions(model, examples, settings, tracker=tracker, folder=folder, progress=progress)
            torch.manual_seed(settings.seed)  # Same random numbers whether the alignment was resumed or not.
        if sequences is None:
            sequences = tokenize_training_rows(model, examples, settings.max_length)
        dataset, settings = conversation_dataset(
            model, sequences, settings, choose=choose, views=settings.num_augmentations
        )
        figures = {
            "parameters": sum(p.numel() for p in projector.parameters()),
            "image_tokens": projector.output_tokens(features.tokens),
            "feature_bytes_per_image": features.tokens * features.width * FEATURE_BYTES,
            "supervised_tokens": dataset.supervised(),
        }
        tracker.metrics({f"projector/{name}": value for name, value in figures.items()})
        validation = ConversationValidation(model, examples, settings, tracker)
        compiled = should_compile(settings.compile, model.packed, settings.steps)
        stack.enter_context(model.packed.recomputing(settings.gradient_checkpointing))
        stack.enter_context(
            compiled_layers(model.packed, compiled and not settings.gradient_checkpointing, tracker.say)
        )
        trained = train(
            model.packed,
            dataset,
            settings,
            folder=folder,
            tracker=tracker,
            title="projector",
            validate=validation or None,
            callbacks=callbacks,
            keep_best=settings.checkpoint_selection == "best",
            progress=progress,
        )
    return replace(trained, figures=trained.figures or validation.figures)
