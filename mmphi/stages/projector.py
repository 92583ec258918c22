"""Stage ``projector``: trains the layers between image features and language model; both stay frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mmphi.config import DataSettings, LanguageSettings, VisionSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.light_clip import LightClipSettings
from mmphi.config.projector import ProjectorSettings
from mmphi.errors import DataError, SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage
from mmphi.stages.light_clip import config_of
from mmphi.stages.shared_models import (
    check_data,
    check_training,
    drop_without_features,
    language_of,
    read,
    scenes_if_read,
    stored_features,
    tokenized_rows,
    vision_encoder_of,
)

if TYPE_CHECKING:
    from mmphi.data.features import ImageFeatures
    from mmphi.models.multimodal import Multimodal
    from mmphi.models.projector import Projector
    from mmphi.models.vision.vision_encoder import VisionReference

ROOM = 8  # Minimum text tokens in a sequence with an image.
# The setting that reduces the tokens per image, by projector kind.
FEWER_TOKENS = {"mlp": "raise vision.pool", "resampler": "lower projector.queries"}


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """Stages that provide the data, the language model, the vision encoder and its features."""
    needed = list(scenes_if_read(settings))
    if settings(LanguageSettings).model == "pretrain":
        needed.append("pretrain")
    if settings(VisionSettings).model == "light_clip":
        needed.append("light_clip")
    if settings(ProjectorSettings).features == "cached":
        needed.append("embed")
    return tuple(needed)


def check(settings: SettingsView) -> None:
    """Check the batch size, the data, the encoder's output shape, the sequence length and the prompt style."""
    from mmphi.models.vision.vision_encoder import LIGHT_CLIP, encoder_output_shape

    chosen, vision = settings(ProjectorSettings), settings(VisionSettings)
    check_training("projector", chosen)
    check_data(settings)
    light_clip = config_of(settings(LightClipSettings)) if vision.model == LIGHT_CLIP else None
    tokens, width = encoder_output_shape(vision, light_clip)
    if chosen.kind != "mlp" or chosen.parameters:
        from mmphi.models.projector import projector_config
        from mmphi.models.projector_kinds import KINDS

        # The language model's width is unknown here; the minimum width rejects nothing that would fit.
        config = projector_config(chosen, width, 1, tokens)
        tokens = tokens if chosen.kind == "mlp" else KINDS[chosen.kind].output_tokens(config.shape)
    if chosen.max_length < tokens + ROOM:
        raise SettingsError(
            f"projector.max_length = {chosen.max_length} is less than {tokens} tokens of an image and {ROOM} of text",
            f"the nearest is {tokens + ROOM}; or {FEWER_TOKENS.get(chosen.kind, 'raise projector.merge')}",
        )
    check_prompt(settings(LanguageSettings))


def check_prompt(chosen: LanguageSettings) -> None:
    """Check that the tokenizer supports the prompt style.

    Raises:
        SettingsError: If the style is ``chat`` and the tokenizer has no chat template.
    """
    from mmphi.models.language.language_model import tokenizer_of

    if chosen.prompt != "chat":
        return
    if chosen.model == "pretrain":
        raise SettingsError("language.prompt = chat, but a model trained here has no chat template", "use auto")
    if not tokenizer_of(chosen, chosen.model).chat_template:
        raise SettingsError("language.prompt = chat, but the tokenizer has no chat template", "use plain or phi")


def cost(settings: SettingsView) -> Cost:
    """Disk space of the projector with its checkpoint, and GPU memory including the frozen language model."""
    from mmphi.stages.memory_estimates import projector_disk, projector_memory

    return Cost(projector_disk(settings), memory_bytes=projector_memory(settings))


def run(ctx: Context) -> Mapping[str, float]:
    """Train the projector and save a self-contained model."""
    from mmphi.data.llava_row_types import caption_question
    from mmphi.data.mixture import mixture_indices
    from mmphi.data.phrasing import typical_questions
    from mmphi.models.multimodal import Multimodal
    from mmphi.models.vision.vision_encoder import VisionReference
    from mmphi.training.best_checkpoint import remove_kept
    from mmphi.training.conversation_dataset import training_rows
    from mmphi.training.projector import new_projector, train_projector

    chosen, data = ctx.settings(ProjectorSettings), ctx.settings(DataSettings)
    examples, report = read(ctx.settings, ctx.upstream)
    features = image_features(ctx)
    examples = drop_without_features(examples, features, report)
    training = training_rows(examples)
    if not any(e.images for e in training):
        raise DataError(f"no training example has an image\n{report.table()}", "check data.sources")
    language, light_clip = language_of(ctx), ctx.upstream.get("light_clip")
    projector = new_projector(language, features, chosen, examples)
    vision = VisionReference(
        ctx.settings(VisionSettings),
        features.digest,
        light_clip.path if light_clip else None,
        caption_question(training),
    )
    model = Multimodal(
        language, projector, features, chosen.max_length, vision, own_language="pretrain" in ctx.upstream
    )
    model.questions = typical_questions(t.question for e in training for t in e.turns)
    trained = train_projector(
        model,
        examples,
        chosen,
        tracker=ctx.tracker,
        folder=ctx.folder,
        sequences=tokenized_rows(ctx, model, examples, chosen.max_length, report),
        choose=lambda kept: mixture_indices([e.source for e in kept], data),
    )
    if ctx.first:
        model.save_pretrained(ctx.folder)
        remove_kept(ctx.folder)
        _write_card(ctx, model, vision, projector, trained.figures)
    return {"projector/steps": trained.steps, "projector/result_step": trained.result_step}


def image_features(ctx: Context) -> ImageFeatures:
    """Stored features if ``projector.features`` is ``cached``, else features computed by the encoder."""
    from mmphi.data.features import LiveFeatures

    if ctx.settings(ProjectorSettings).features == "cached":
        return stored_features(ctx)
    return LiveFeatures(vision_encoder_of(ctx))


def _write_card(
    ctx: Context, model: Multimodal, vision: VisionReference, projector: Projector, figures: Mapping[str, float]
) -> None:
    from mmphi.models.model_card import language_part, language_title, shape_text, write_card

    chosen = ctx.settings(LanguageSettings)
    write_card(
        ctx.folder,
        title=f"{language_title(chosen.model)} with a projector for images",
        what="A projector between a frozen vision encoder and a frozen causal language model.",
        base=chosen.model,
        example='"what is this?", "photo.jpg"',
        questions=model.questions,
        run_id=ctx.tracker.run_id,
        figures=figures,
        parts={
            "language model": f"{language_part(chosen.model)} ({model.language.digest})",
            "prompt style": model.language.prompt.style,
            "vision encoder": f"{vision.settings.model} {vision.settings.pretrained}".strip() + f" ({vision.digest})",
            "projector": shape_text(projector.config),
        },
        lineage={name: result.run_id for name, result in ctx.upstream.items()},
    )


STAGE = Stage(
    name="projector",
    version=5,
    help="train the layers between image features and the frozen language model",
    reads=("projector", "language", "vision", "data"),
    run=run,
    upstream=upstream,
    requests=("light_clip",),
    check=check,
    cost=cost,
    then=("evaluate",),
    trains=True,
    talks=True,
)
