"""Stage ``projector``: the layers between image features and language model, trained with both frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from mmphi.config import DataSettings, LanguageSettings, VisionSettings, setting
from mmphi.config.declared_view import SettingsView
from mmphi.config.shared import ConversationSettings
from mmphi.errors import DataError, SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage
from mmphi.stages.conversations import Validation, log_packing, training_dataset
from mmphi.stages.light_clip import LightClipSettings, config_of
from mmphi.stages.projector_warmup import align_to_captions
from mmphi.stages.shared_models import (
    check_data,
    check_training,
    drop_without_features,
    language_of,
    read,
    scenes_if_read,
    stored_features,
    vision_encoder_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mmphi.data.features import ImageFeatures
    from mmphi.data.schema import Example
    from mmphi.models.multimodal import Multimodal
    from mmphi.models.projector import Projector
    from mmphi.models.vision.vision_encoder import VisionReference

FEATURE_BYTES = 2  # They are stored in half precision.
ROOM = 8  # Tokens of text beside an image, at the least.
FITTED, FITTED_AT_ONCE = 4096, 256  # Images that means and spreads are taken from.


class ProjectorSettings(ConversationSettings):
    """The layers between image features and language model, trained with both frozen."""

    features: Literal["cached", "live"] = setting("cached", "stored features, or computed anew every step")
    layers: int = setting(2, "linear layers: 1 is linear, 2 is LLaVA-1.5's", unit="layers", ge=1, le=8)
    width: int = setting(0, "hidden width; 0 takes the language model's", unit="units", ge=0)
    parameters: int = setting(0, "choose the hidden width that comes nearest to this size; 0 takes `width`", ge=0)
    activation: Literal["gelu", "relu", "silu"] = setting("gelu", "between the layers")
    norm: bool = setting(False, "normalise every feature vector before the first layer")
    dropout: float = setting(0.0, "share of each layer's inputs dropped in training", ge=0, lt=1)
    compile: Literal["auto", "yes", "no"] = setting(
        "auto", "let torch compile the frozen language model's layers; auto: on a GPU, in 16 bit", matters=False
    )
    views: int = setting(
        1, "views of each training image in turn: itself, and parts of it, mirrored by half", ge=1, introduced=1
    )
    whiten: bool = setting(
        False, "give every channel of the features mean 0 and spread 1 over the training images", introduced=False
    )
    align_steps: int = setting(
        0,
        "steps before, in which features learn to name the words of captions; 0 for none",
        unit="steps",
        ge=0,
        introduced=0,
    )
    align_batch_size: int = setting(128, "images per such step", unit="images", ge=1, introduced=128)
    align_learning_rate: float = setting(2e-3, "peak learning rate of these steps", gt=0, le=1, introduced=2e-3)


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """What the parts to be joined come from."""
    needed = list(scenes_if_read(settings))
    if settings(LanguageSettings).model == "pretrain":
        needed.append("pretrain")
    if settings(VisionSettings).model == "light_clip":
        needed.append("light_clip")
    if settings(ProjectorSettings).features == "cached":
        needed.append("embed")
    return tuple(needed)


def check(settings: SettingsView) -> None:
    """A batch for every pass, a tower that gives such features, room for an image, a prompt that can be written."""
    from mmphi.models.vision.vision_encoder import LIGHT_CLIP, encoder_output_shape

    chosen, vision = settings(ProjectorSettings), settings(VisionSettings)
    check_training("projector", chosen)
    check_data(settings)
    light_clip = config_of(settings(LightClipSettings)) if vision.model == LIGHT_CLIP else None
    tokens, _ = encoder_output_shape(vision, light_clip)
    if chosen.max_length < tokens + ROOM:
        raise SettingsError(
            f"projector.max_length = {chosen.max_length} holds no image of {tokens} tokens and {ROOM} of text",
            f"the nearest is {tokens + ROOM}; or raise vision.pool",
        )
    check_prompt(settings(LanguageSettings))


def check_prompt(chosen: LanguageSettings) -> None:
    """Refuse a style that the tokenizer cannot write.

    Raises:
        SettingsError: If it brings no chat template.
    """
    from mmphi.models.language.language_model import tokenizer_of

    if chosen.prompt != "chat":
        return
    if chosen.model == "pretrain":
        raise SettingsError("language.prompt = chat, but a model trained here has no chat template", "use auto")
    if not tokenizer_of(chosen, chosen.model).chat_template:
        raise SettingsError("language.prompt = chat, but the tokenizer brings no chat template", "use plain or phi")


def cost(settings: SettingsView) -> Cost:
    """A projector and its optimiser are small: four copies of at most a few matrices."""
    return Cost(disk_bytes=4 * 4 * settings(ProjectorSettings).layers * 4096 * 4096)


def run(ctx: Context) -> Mapping[str, float]:
    """Train, and save a model that loads alone."""
    import torch

    from mmphi.data.llava_row_types import asked_for_captions
    from mmphi.data.mixture import mixture_indices
    from mmphi.data.phrasing import typical_questions
    from mmphi.models.language.compiling import compiled_layers, should_compile
    from mmphi.models.multimodal import Multimodal
    from mmphi.models.projector import Projector, ProjectorConfig
    from mmphi.models.vision.vision_encoder import VisionReference
    from mmphi.training.best_checkpoint import remove_kept
    from mmphi.training.trainer import train

    chosen, data = ctx.settings(ProjectorSettings), ctx.settings(DataSettings)
    examples, report = read(ctx.settings, ctx.upstream)
    features = image_features(ctx)
    examples = drop_without_features(examples, features, report)
    if not any(e.images for e in examples if e.split == "train"):
        raise DataError(f"no training example has an image\n{report.table()}", "check data.sources")
    language = language_of(ctx)
    torch.manual_seed(chosen.seed)
    shape = {name: getattr(chosen, name) for name in ("layers", "width", "activation", "norm", "dropout", "whiten")}
    config = ProjectorConfig(features.width, language.width, **shape)
    projector = Projector(config.of_size(chosen.parameters) if chosen.parameters else config)
    projector.fit(some_features(features, examples))
    light_clip = ctx.upstream.get("light_clip")
    question = asked_for_captions([e for e in examples if e.split == "train"])
    vision = VisionReference(
        ctx.settings(VisionSettings), features.digest, light_clip.path if light_clip else None, question
    )
    model = Multimodal(
        language, projector, features, chosen.max_length, vision, own_language="pretrain" in ctx.upstream
    )
    model.questions = typical_questions(t.question for e in examples if e.split == "train" for t in e.turns)
    log_packing(model, "projector", ctx.tracker)
    if chosen.align_steps:
        align_to_captions(
            ctx,
            model,
            chosen,
            examples,
            steps=chosen.align_steps,
            batch_size=chosen.align_batch_size,
            learning_rate=chosen.align_learning_rate,
            views=chosen.views,
        )
        torch.manual_seed(chosen.seed)  # What follows is drawn alike, whether naming was just done or long before.
    steps, chosen = training_dataset(
        ctx, model, chosen, examples, report, lambda kept: mixture_indices([e.source for e in kept], data), chosen.views
    )
    figures = {
        "parameters": sum(p.numel() for p in projector.parameters()),
        "image_tokens": features.tokens,
        "feature_bytes_per_image": features.tokens * features.width * FEATURE_BYTES,
        "supervised_tokens": steps.supervised(),
    }
    ctx.tracker.metrics({f"projector/{name}": value for name, value in figures.items()})
    held = [e for e in examples if e.split == "validation"]
    validation = Validation(model, held, chosen, ctx.tracker) if held else None
    compiled = should_compile(chosen.compile, model.packed, chosen.steps) and not chosen.gradient_checkpointing
    with (
        model.packed.recomputing(chosen.gradient_checkpointing),
        compiled_layers(model.packed, compiled, ctx.tracker.say),
    ):
        trained = train(
            model.packed,
            steps,
            chosen,
            folder=ctx.folder,
            tracker=ctx.tracker,
            title="projector",
            validate=validation,
            keep_best=chosen.result == "best",
        )
    if ctx.first:
        model.save_pretrained(ctx.folder)
        remove_kept(ctx.folder)
        _write_card(ctx, model, vision, projector, trained.figures or (validation.figures if validation else {}))
    return {"projector/steps": trained.steps, "projector/result_step": trained.best}


def some_features(features: ImageFeatures, examples: Sequence[Example]) -> Iterator[Tensor]:
    """Features (images, tokens, width) of training images, in parts, of some thousand images at most."""
    images = list({e.image.id: e.image for e in examples if e.split == "train" and e.image is not None}.values())
    some = images[:: -(-len(images) // FITTED)] if images else []
    for first in range(0, len(some), FITTED_AT_ONCE):
        yield features.get(some[first : first + FITTED_AT_ONCE])


def image_features(ctx: Context) -> ImageFeatures:
    """Stored features where the settings say so, else the tower itself."""
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
        what="A projector between a frozen image tower and a frozen causal language model.",
        base=chosen.model,
        example='"what is this?", "photo.jpg"',
        questions=model.questions,
        run_id=ctx.tracker.run_id,
        figures=figures,
        parts={
            "language model": f"{language_part(chosen.model)} ({model.language.digest})",
            "prompt style": model.language.prompt.style,
            "image tower": f"{vision.settings.model} {vision.settings.pretrained}".strip() + f" ({vision.digest})",
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
