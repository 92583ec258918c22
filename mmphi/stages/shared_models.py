"""What several stages do alike: reading the data, and borrowing frozen models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmphi.config.declared_view import SettingsView
from mmphi.config.section import Section
from mmphi.config.shared import (
    ConversationSettings,
    DataSettings,
    LanguageSettings,
    TrainingSettings,
    VisionSettings,
    sources_of,
    uses_scenes,
)
from mmphi.errors import DataError, SettingsError

if TYPE_CHECKING:
    from mmphi.data.features import ImageFeatures
    from mmphi.data.schema import Example, ReadReport
    from mmphi.data.tokenized_dataset import TokenizedDataset
    from mmphi.models.language.language_model import LanguageModel
    from mmphi.models.multimodal import Multimodal
    from mmphi.models.vision.vision_encoder import VisionEncoder
    from mmphi.pipeline.stage import Context, Result
    from mmphi.tracking.tracker import Tracker

# What decides which rows there are, what they say and which split they are in; neither weights nor limits of badness.
CONTENT = (
    *(f"data.sources.N.{name}" for name in ("kind", "name", "path", "images", "split", "revision")),
    *(f"data.sources.N.{name}" for name in ("image_column", "text_column")),
    "data.validation_images",
    "data.test_images",
    "data.split_seed",
    "data.max_images",
    "data.max_answer_words",
    "data.max_bad_share",
    "data.near_duplicates",
    "data.reading",
)


CHECKED_BYTES = 2_000_000  # Files of rows that are read before anything is built; larger ones take too long.


def check_training(name: str, chosen: TrainingSettings) -> None:
    """Refuse a batch that cannot be spread over forward passes and processes.

    Raises:
        SettingsError: Naming the nearest that can.
    """
    passes = chosen.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    if chosen.batch_size < passes:
        raise SettingsError(
            f"{name}.batch_size = {chosen.batch_size}, but each step makes {passes} forward passes over all processes",
            f"the nearest batch size is {passes}; or lower {name}.gradient_accumulation_steps",
        )
    if isinstance(chosen, ConversationSettings) and chosen.contrastive_weight and chosen.checkpoint_selection == "best":
        raise SettingsError(
            f"{name}.checkpoint_selection = best takes the lowest validation loss, and {name}.contrastive_weight raises"
            " that loss: the steps that it acts on would not be taken",
            f"{name}.checkpoint_selection last, or {name}.contrastive_weight 0",
        )


def evaluating(stage: str) -> Callable[[Section], Section]:
    """What ``evaluate`` is asked for with at the end of a stage: to measure that stage's model."""

    def asking(settings: Section) -> Section:
        evaluate: Section = getattr(settings, "evaluate")  # noqa: B009  # Stages do not know the class of all settings.
        return settings.model_copy(update={"evaluate": evaluate.model_copy(update={"stage": stage})})

    return asking


def scenes_if_read(settings: SettingsView) -> tuple[str, ...]:
    """The stage ``scenes``, where a source asks for it."""
    return ("scenes",) if uses_scenes(settings(DataSettings)) else ()


def read(settings: SettingsView, upstream: Mapping[str, Result]) -> tuple[list[Example], ReadReport]:
    """All examples of the data, and the account of how they were read."""
    from mmphi.data.dataset_builder import read_examples

    scenes = upstream.get("scenes")
    return read_examples(settings(DataSettings), scenes.path if scenes else None)


def log_report(report: ReadReport, tracker: Tracker, data: DataSettings) -> None:
    """Record the account of what was read.

    Raises:
        DataError: If more rows are bad than the settings allow, or none is left.
    """
    tracker.table("data_read", list(report.rows()))
    check_enough_rows(report, data)


def tokenized_rows(
    ctx: Context, model: Multimodal, examples: Sequence[Example], max_length: int, report: ReadReport
) -> TokenizedDataset:
    """The training conversations as token sequences, which this process holds once; the report is recorded.

    Args:
        ctx: Of the stage.
        model: Gives the prompt and the number of tokens of each image.
        examples: Conversations of all splits.
        max_length: Longest sequence, in tokens; longer conversations are counted in the report.
        report: The account of what was read.

    Raises:
        DataError: If more rows are unusable than the settings allow, or none is left.
    """
    from mmphi.data.tokenized_dataset import count_left_out, tokenization_identity
    from mmphi.training.conversation_dataset import tokenize_training_rows, training_rows

    training = training_rows(examples)
    identity = tokenization_identity(training, model.language.prompt, model.length, max_length)
    sequences = ctx.resources.once("encoded", identity, lambda: tokenize_training_rows(model, training, max_length))
    count_left_out(sequences, training, max_length, report)
    log_report(report, ctx.tracker, ctx.settings(DataSettings))
    return sequences


def check_data(settings: SettingsView) -> None:
    """Read small data before anything is built, so that what is wrong with them is reported at once.

    Raises:
        DataError: As reading them in a stage does: too few images, too many unusable rows, a file that cannot be read.
    """
    from mmphi.data.dataset_builder import read_examples

    data = settings(DataSettings)
    sources = sources_of(data)
    files = [Path(source.path) for source in sources if source.kind in ("llava", "captions", "karpathy")]
    readable = len(files) == len(sources) and all(file.is_file() for file in files)
    if readable and sum(file.stat().st_size for file in files) <= CHECKED_BYTES:
        check_enough_rows(read_examples(data, None)[1], data)


def check_enough_rows(report: ReadReport, data: DataSettings) -> None:
    """Refuse data of which no row is left, or too few.

    Raises:
        DataError: If more rows are bad than the settings allow, or none is left.
    """
    if not report.kept.total() and not report.dropped:
        raise DataError("the data has no rows", "check the files that data.sources name")
    if report.bad_share > data.max_bad_share or not report.kept.total():
        raise DataError(
            f"{report.bad_share:.1%} of the rows cannot be used; at most {data.max_bad_share:.1%} may be\n"
            + report.table(),
            "fix the data, or raise data.max_bad_share",
        )


def language_of(ctx: Context) -> LanguageModel:
    """The frozen language model, as this process has it."""
    from mmphi.models.checkpoint import get_shared_language_model
    from mmphi.models.device import this_device

    pretrained = ctx.upstream.get("pretrain")
    folder = pretrained.path if pretrained else None
    return get_shared_language_model(ctx.settings(LanguageSettings), folder, this_device(), ctx.resources.once)


def vision_encoder_of(ctx: Context) -> VisionEncoder:
    """The frozen vision encoder, as this process has it."""
    from mmphi.models.checkpoint import get_shared_vision_encoder
    from mmphi.models.device import this_device

    light_clip, chosen = ctx.upstream.get("light_clip"), ctx.settings(VisionSettings)
    folder = light_clip.path if light_clip else None
    identity = f"{chosen.model_dump_json()}/{light_clip.key if light_clip else ''}"
    return get_shared_vision_encoder(chosen, folder, this_device(), ctx.resources.once, identity)


def stored_features(ctx: Context) -> ImageFeatures:
    """The stored features of the stage ``embed``, as this process has them."""
    from mmphi.data.features import FeatureStore

    embed = ctx.upstream["embed"]
    return ctx.resources.once("features", embed.run_id, lambda: FeatureStore(embed.path))


def drop_without_features(examples: list[Example], features: ImageFeatures, report: ReadReport) -> list[Example]:
    """The examples whose images have features; the others are counted."""
    from mmphi.data.dataset_builder import images_of

    features.prepare(images_of(examples))
    seen = []
    for example in examples:
        missing = next((image for image in example.images if image not in features), None)
        if missing is None:
            seen.append(example)
        else:
            report.drop_kept(example.source, f"{example.id}: {missing.id}", "unreadable image")
    return seen
