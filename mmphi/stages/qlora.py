"""Stage ``qlora``: trains a low-rank adapter on the quantised language model, with a previously trained projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmphi.config import DataSettings, LanguageSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.projector import ProjectorSettings
from mmphi.config.qlora import QloraSettings
from mmphi.errors import ModelError, SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage
from mmphi.stages.projector import image_features
from mmphi.stages.shared_models import (
    check_training,
    drop_without_features,
    evaluating,
    read,
    scenes_if_read,
    tokenized_rows,
)

if TYPE_CHECKING:
    from mmphi.data.schema import Example
    from mmphi.models.multimodal import Multimodal


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """Stages that provide the projector, unless ``qlora.model`` names one, and the data."""
    needed = list(scenes_if_read(settings))
    if settings(ProjectorSettings).features == "cached":
        needed.append("embed")
    if not settings(QloraSettings).model:
        needed.append("projector")
    return tuple(needed)


def check(settings: SettingsView) -> None:
    """Check the batch size, the mixture, the optimiser and the DoRA options."""
    from mmphi.data.mixture import parse_weights

    chosen = settings(QloraSettings)
    check_training("qlora", chosen)
    parse_weights(chosen.mixture, "qlora.mixture")
    if chosen.optimizer != "adamw":
        raise SettingsError(f"qlora.optimizer = {chosen.optimizer}, but adapters are trained with AdamW", "use adamw")
    if chosen.dora and chosen.base_precision == "8bit":  # PEFT 0.21 leaves the scales out of bitsandbytes' layers.
        raise SettingsError("qlora.dora does not work on qlora.base_precision = 8bit", "use 4bit or bf16")
    if chosen.dora and chosen.rslora:
        raise SettingsError("qlora.dora and qlora.rslora are both on", "DoRA learns the scale itself: turn rslora off")


def cost(settings: SettingsView) -> Cost:
    """Disk space of the adapter with its checkpoint, and GPU memory including the quantised language model."""
    from mmphi.stages.memory_estimates import adapter_disk, adapter_memory

    return Cost(adapter_disk(settings), memory_bytes=adapter_memory(settings))


def run(ctx: Context) -> Mapping[str, float]:
    """Train the adapter and save a self-contained model."""
    from mmphi.data.mixture import grouped, mixture_indices, parse_weights, sample_by_weight
    from mmphi.data.phrasing import typical_questions
    from mmphi.training.adapter import train_adapter
    from mmphi.training.best_checkpoint import remove_kept
    from mmphi.training.conversation_dataset import training_rows

    chosen, data = ctx.settings(QloraSettings), ctx.settings(DataSettings)
    examples, report = read(ctx.settings, ctx.upstream)
    model = joined(ctx, chosen)
    assert model.features is not None
    examples = drop_without_features(examples, model.features, report)
    made = caption_questions(examples, chosen)
    examples += made
    training = typical_questions(turn.question for row in training_rows(examples) for turn in row.turns)
    # Keep the typical questions of the projector's training, which the adapter builds on.
    model.questions = tuple(dict.fromkeys([*training, *model.questions]))
    weights = parse_weights(chosen.mixture, "qlora.mixture")
    texts = text_rows(ctx) if "text" in weights else []
    examples += texts
    for row in [*made, *texts]:
        report.keep(row.source)

    def choose(kept: Sequence[Example]) -> list[int]:
        if not weights:
            return mixture_indices([e.source for e in kept], data)
        return sample_by_weight(grouped(kept, weights, "qlora.mixture"), weights, data.split_seed)

    trained = train_adapter(
        model,
        examples,
        chosen,
        tracker=ctx.tracker,
        folder=ctx.folder,
        sequences=tokenized_rows(ctx, model, examples, chosen.max_length, report),
        choose=choose,
        text_loss=lambda: plain_text_loss(ctx, model),
    )
    if not ctx.first:
        return {}
    model.save_pretrained(ctx.folder)
    remove_kept(ctx.folder)
    _write_card(ctx, model, chosen, trained.figures)
    return {"qlora/steps": trained.steps, "qlora/result_step": trained.result_step, **trained.figures}


def joined(ctx: Context, chosen: QloraSettings) -> Multimodal:
    """Returns the projector's model with a quantised language model and a new adapter.

    Raises:
        ModelError: If the model has no projector or already has an adapter, or its features differ.
    """
    from mmphi.models.checkpoint import load_checkpoint
    from mmphi.training.adapter import with_new_adapter

    folder = ctx.models["qlora.model"] if chosen.model else ctx.upstream["projector"].path
    features = image_features(ctx)
    base = load_checkpoint(folder, precision=chosen.base_precision, features=features)
    if base.projector is None or base.vision is None:
        raise ModelError(f"{folder} has no projector", "train one first, and give its run or folder in qlora.model")
    if base.language.adapter is not None:
        raise ModelError(f"{folder} has an adapter already", "give the run of a projector in qlora.model")
    if features.digest != base.vision.digest:
        raise ModelError(
            "the projector was trained on other image features than these settings give",
            "give the vision section that it was trained with",
        )
    return with_new_adapter(base, chosen, ctx.tracker)


def caption_questions(examples: Sequence[Example], chosen: QloraSettings) -> list[Example]:
    """Generate yes/no conversations from the training and the validation split separately; none for the test split."""
    from mmphi.evaluation.yes_no import conversations

    if not chosen.questions:
        return []
    varied = chosen.phrasings == "varied"
    splits = [[e for e in examples if e.split == split] for split in ("train", "validation")]
    return [row for split in splits for row in conversations(split, chosen.questions, chosen.seed, varied=varied)]


def text_rows(ctx: Context) -> list[Example]:
    """Training texts of the stage ``scenes`` as conversations without images; empty if the data has no scenes."""
    from mmphi.stages.pretrain_scenes import scene_texts

    scenes = ctx.upstream.get("scenes")
    return list(scene_texts(scenes.path, held=False)) if scenes else []


def plain_text_loss(ctx: Context, model: Multimodal) -> dict[str, float]:
    """Loss on plain text (``qlora.plain_text``, else held-out scene texts), to detect forgetting of text."""
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


def _write_card(ctx: Context, model: Multimodal, chosen: QloraSettings, figures: Mapping[str, float]) -> None:
    from mmphi.models.model_card import language_part, language_title, shape_text, write_card

    assert model.vision is not None
    assert model.projector is not None
    scale = "alpha / sqrt(rank)" if chosen.rslora else "alpha / rank"
    write_card(
        ctx.folder,
        title=f"{language_title(ctx.settings(LanguageSettings).model)} with an adapter for questions about images",
        what="A low-rank adapter on a frozen, quantised causal language model, and a projector for its images.",
        base=ctx.settings(LanguageSettings).model,
        example='"what is this?", "photo.jpg"',
        questions=model.questions,
        run_id=ctx.tracker.run_id,
        figures=figures,
        parts={
            "language model": f"{language_part(ctx.settings(LanguageSettings).model)}, in {chosen.base_precision}"
            f" ({model.language.digest})",
            "adapter": f"rank {chosen.rank}, alpha {chosen.alpha:g}, scaled by {scale}{', DoRA' * chosen.dora}",
            "prompt style": model.language.prompt.style,
            "vision encoder": f"{model.vision.settings.model} {model.vision.settings.pretrained}".strip(),
            "projector": shape_text(model.projector.config),
        },
        lineage={name: result.run_id for name, result in ctx.upstream.items()},
    )


STAGE = Stage(
    name="qlora",
    version=3,
    help="train an adapter on the quantised language model, and the projector with it",
    reads=("qlora", "data", "language.model"),
    run=run,
    upstream=upstream,
    requests=("projector.features",),
    check=check,
    cost=cost,
    then=("evaluate",),
    asking=evaluating("qlora"),
    trains=True,
    talks=True,
)
