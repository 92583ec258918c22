"""Training batches of a multimodal model, built from conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mmphi.config.shared import ConversationSettings
from mmphi.data.schema import Example
from mmphi.data.tokenized_dataset import Subset, TokenizedDataset, tokenized_examples
from mmphi.errors import DataError
from mmphi.models.multimodal import Multimodal
from mmphi.training.packed_dataset import PackedStepDataset, packed_dataset

Choose = Callable[[Sequence[Example]], Sequence[int]]
S = TypeVar("S", bound=ConversationSettings)


def training_rows(examples: Sequence[Example]) -> list[Example]:
    """Returns the examples of the training split, in order."""
    return [example for example in examples if example.split == "train"]


def tokenize_training_rows(model: Multimodal, examples: Sequence[Example], max_length: int) -> TokenizedDataset:
    """Tokenize the conversations of the training split.

    Args:
        model: Provides the prompt, the tokenizer and the number of tokens of each image.
        examples: Conversations of all splits.
        max_length: Longest sequence, in tokens; longer conversations are listed in ``left_out``.
    """
    return tokenized_examples(training_rows(examples), model.language.prompt, model.length, max_length)


def conversation_dataset(
    model: Multimodal,
    sequences: TokenizedDataset,
    settings: S,
    *,
    choose: Choose | None = None,
    views: int = 1,
) -> tuple[PackedStepDataset, S]:
    """Returns the batches of a training in step order, and its settings.

    Args:
        model: Provides the image features and the layout of packed rows.
        sequences: Result of :func:`tokenize_training_rows`.
        settings: Training settings.
        choose: Maps the examples to the indices to train on, of any number; all by default.
        views: Number of augmented views per image, used in rotation.

    Returns:
        The batches, and the settings with the number of steps that reaches ``supervised_tokens``, if that is set.

    Raises:
        DataError: If no conversation is left.
    """
    kept = sequences.kept
    if not len(kept):
        raise DataError(
            f"no training conversation fits in {settings.max_length} tokens, or there is none", "raise max_length"
        )
    samples = Subset(sequences, choose(kept) if choose is not None else range(len(kept)))
    how: dict[str, Any] = {
        "layout": model.packed.layout,
        "views": views,
        "max_examples_per_image": settings.max_examples_per_image,
    }
    how |= {"contrast": settings.contrastive_weight, "contrast_from": settings.contrastive_start}
    dataset = packed_dataset(samples, model.sources, settings, **how)
    if settings.supervised_tokens:
        settings = settings.model_copy(update={"steps": dataset.until(settings.supervised_tokens)})
        dataset = packed_dataset(samples, model.sources, settings, **how)
    return dataset, settings
