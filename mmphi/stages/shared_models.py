"""Shared by several stages: reading the data, and access to frozen models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmphi.config.declared_view import SettingsView
from mmphi.config.section import Section
from mmphi.config.shared import (
    REGISTERED_KINDS,
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

# Settings that determine the rows, their content and their splits; mixture weights are not among them.
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


CHECKED_BYTES = 2_000_000  # Larger data files are not checked before the build, because reading them takes too long.


def check_training(name: str, chosen: TrainingSettings) -> None:
    """Check the batch size and the checkpoint selection of a training.

    Raises:
        SettingsError: If a batch has fewer examples than forward passes over all processes, or if
            ``checkpoint_selection`` is ``best`` together with a contrastive phase.
    """
    passes = chosen.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    if chosen.batch_size < passes:
        raise SettingsError(
            f"{name}.batch_size = {chosen.batch_size}, but each step makes {passes} forward passes over all processes",
            f"the nearest batch size is {passes}; or lower {name}.gradient_accumulation_steps",
        )
    if isinstance(chosen, ConversationSettings) and chosen.contrastive_weight and chosen.checkpoint_selection == "best":
        raise SettingsError(
            f"{name}.checkpoint_selection = best conflicts with {name}.contrastive_weight, which raises the validation"
            " loss: no checkpoint of the contrastive phase would be selected",
            f"{name}.checkpoint_selection last, or {name}.contrastive_weight 0",
        )


def evaluating(stage: str) -> Callable[[Section], Section]:
    """Returns a function that sets ``evaluate.stage`` to a stage, for the evaluation that follows it."""

    def asking(settings: Section) -> Section:
        evaluate: Section = getattr(settings, "evaluate")  # noqa: B009  # Stages do not know the class of all settings.
        return settings.model_copy(update={"evaluate": evaluate.model_copy(update={"stage": stage})})

    return asking


def scenes_if_read(settings: SettingsView) -> tuple[str, ...]:
    """``scenes`` if a data source uses drawn scenes."""
    return ("scenes",) if uses_scenes(settings(DataSettings)) else ()


def read(settings: SettingsView, upstream: Mapping[str, Result]) -> tuple[list[Example], ReadReport]:
    """All examples of the data, and the report of how they were read."""
    from mmphi.data.dataset_builder import read_examples

    data = settings(DataSettings)
    refuse_registered_kinds(data)
    scenes = upstream.get("scenes")
    return read_examples(data, scenes.path if scenes else None)


def refuse_registered_kinds(data: DataSettings) -> None:
    """Refuse sources whose reader exists in this process only.

    Raises:
        SettingsError: If there is one: a key would not change with the reader's code, and other processes lack it.
    """
    for number, source in enumerate(data.sources):
        if source.kind in REGISTERED_KINDS:
            raise SettingsError(
                f"data.sources.{number}.kind = {source.kind!r} is registered in this program only, so that no result of"
                " a stage can depend on it",
                "train in the program: mmphi.data.dataset_builder.read_examples, and fit of mmphi.join or mmphi.load",
            )


def log_report(report: ReadReport, tracker: Tracker, data: DataSettings) -> None:
    """Record the report of how the data was read.

    Raises:
        DataError: If more rows are unusable than the settings allow, or none is left.
    """
    tracker.table("data_read", list(report.rows()))
    check_enough_rows(report, data)


def tokenized_rows(
    ctx: Context, model: Multimodal, examples: Sequence[Example], max_length: int, report: ReadReport
) -> TokenizedDataset:
    """Returns the tokenized training conversations, cached in the process, and records the report.

    Args:
        ctx: Context of the stage.
        model: Model that provides the prompt and the number of tokens per image.
        examples: Conversations of all splits.
        max_length: Maximum sequence length in tokens; longer conversations are counted in the report.
        report: Report of how the data was read.

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
    """Read small data files before anything is built, to report errors early.

    Raises:
        DataError: If there are too few images or too many unusable rows, or a file cannot be read.
    """
    from mmphi.data.dataset_builder import read_examples
    from mmphi.data.readers import READERS

    data = settings(DataSettings)
    refuse_registered_kinds(data)
    sources = sources_of(data)
    files = [Path(source.path) for source in sources if READERS[source.kind].local]
    readable = len(files) == len(sources) and all(file.is_file() for file in files)
    if readable and sum(file.stat().st_size for file in files) <= CHECKED_BYTES:
        check_enough_rows(read_examples(data, None)[1], data)


def check_enough_rows(report: ReadReport, data: DataSettings) -> None:
    """Check that enough rows are usable.

    Raises:
        DataError: If more rows are unusable than ``data.max_bad_share`` allows, or none is left.
    """
    if not report.kept.total() and not report.dropped:
        raise DataError("the data has no rows", "check the files that data.sources name")
    if report.bad_share > data.max_bad_share or not report.kept.total():
        raise DataError(
            f"{report.bad_share:.1%} of the rows cannot be used; the limit is {data.max_bad_share:.1%}\n"
            + report.table(),
            "fix the data, or raise data.max_bad_share",
        )


def language_of(ctx: Context) -> LanguageModel:
    """The frozen language model, from the process cache."""
    from mmphi.models.checkpoint import get_shared_language_model
    from mmphi.models.device import this_device

    pretrained = ctx.upstream.get("pretrain")
    folder = pretrained.path if pretrained else None
    return get_shared_language_model(ctx.settings(LanguageSettings), folder, this_device(), ctx.resources.once)


def vision_encoder_of(ctx: Context) -> VisionEncoder:
    """The frozen vision encoder, from the process cache."""
    from mmphi.models.checkpoint import get_shared_vision_encoder
    from mmphi.models.device import this_device

    light_clip, chosen = ctx.upstream.get("light_clip"), ctx.settings(VisionSettings)
    folder = light_clip.path if light_clip else None
    identity = f"{chosen.model_dump_json()}/{light_clip.key if light_clip else ''}"
    return get_shared_vision_encoder(chosen, folder, this_device(), ctx.resources.once, identity)


def stored_features(ctx: Context) -> ImageFeatures:
    """The stored features of the stage ``embed``, from the process cache."""
    from mmphi.data.features import FeatureStore

    embed = ctx.upstream["embed"]
    return ctx.resources.once("features", embed.run_id, lambda: FeatureStore(embed.path))


def drop_without_features(examples: list[Example], features: ImageFeatures, report: ReadReport) -> list[Example]:
    """Returns the examples whose images all have features; the others are counted in the report."""
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
