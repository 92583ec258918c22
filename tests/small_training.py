"""A training of a projector that takes a second, always from the same beginning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from builders import RandomFeatures, Recorder, encode, example, tiny_language

from mmphi.config import TrainingSettings
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.training.packed_dataset import packed_dataset
from mmphi.training.trainer import TrainingResult, train

ANSWERS = ["a dog", "two men on a bench", "snow", "a cat sits", "the red bus turns left", "b" * 60, "it rains", "ok"]


def new_projector(dropout: float = 0.0) -> Projector:
    """For :class:`~builders.RandomFeatures` and :func:`~builders.tiny_language`; always the same weights."""
    torch.manual_seed(1)
    return Projector(ProjectorConfig(RandomFeatures.width, 32, dropout=dropout))


def trained(
    projector: Projector, folder: Path, changes: dict[str, Any], answers: Sequence[str] = ANSWERS, **options: Any
) -> TrainingResult:
    """Train a projector for a few steps.

    Args:
        projector: To be trained.
        folder: Of the training.
        changes: In the settings.
        answers: To learn.
        **options: Of :func:`~mmphi.training.trainer.train`.
    """
    language = tiny_language()
    model = PackedVLM(language.model, image=projector)
    samples = [encode(example(i, a), language.prompt, RandomFeatures.tokens, 200) for i, a in enumerate(answers)]
    settings = TrainingSettings(**{"steps": 6, "batch_size": 4, "save_every": 2, "log_every": 1, **changes})
    with model.recomputing(settings.gradient_checkpointing):
        return train(
            model,
            packed_dataset(samples, {"image": RandomFeatures()}, settings),
            settings,
            folder=folder,
            **{"tracker": Recorder(), "title": "test"} | options,
        )


def weights(projector: Projector) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in projector.parameters()])
