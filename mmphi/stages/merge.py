"""Stage ``merge``: merges an adapter into its base model and saves a self-contained model with the projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from mmphi.config import LanguageSettings, Section, setting
from mmphi.config.declared_view import SettingsView
from mmphi.config.projector import ProjectorSettings
from mmphi.errors import ModelError
from mmphi.pipeline.stage import Context, Stage
from mmphi.stages.projector import image_features
from mmphi.stages.shared_models import CONTENT, drop_without_features, read, scenes_if_read

SCORED = 200  # Held-out conversations on which the loss before and after merging is measured.


class MergeSettings(Section):
    """An adapter merged into its dequantised base."""

    model: str = setting("", "folder or run of the adapter; empty uses that of the stage qlora", file="model")
    precision: Literal["bf16", "fp32"] = setting("bf16", "precision of the merged weights; merging is computed in fp32")


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """Stages that provide the adapter, unless ``merge.model`` names one, and the data for measuring the loss."""
    needed = list(scenes_if_read(settings))
    if settings(ProjectorSettings).features == "cached":
        needed.append("embed")
    return (*needed, *(() if settings(MergeSettings).model else ("qlora",)))


def run(ctx: Context) -> Mapping[str, float]:
    """Merge the adapter, measure the loss before and after, and save the model.

    Raises:
        ModelError: If the model has no adapter.
    """
    import torch

    from mmphi.data.dataset_builder import stratified
    from mmphi.models.checkpoint import LANGUAGE, load_checkpoint
    from mmphi.models.language.adapter import merge_adapter
    from mmphi.models.language.language_model import DTYPES, language_model_digest, save_language_model
    from mmphi.models.multimodal import Multimodal

    chosen = ctx.settings(MergeSettings)
    folder = ctx.models["merge.model"] if chosen.model else ctx.upstream["qlora"].path
    model = load_checkpoint(folder, features=image_features(ctx))
    assert model.features is not None
    if model.language.adapter is None:
        raise ModelError(f"{folder} has no adapter to merge", "give the run of a qlora in merge.model")
    examples, report = read(ctx.settings, ctx.upstream)
    held = [e for e in examples if e.split == "validation"]
    held = stratified(drop_without_features(held, model.features, report), SCORED, seed=0)

    def loss(of: Multimodal) -> float:
        nats, tokens = of.losses(held)
        return nats / max(tokens, 1)

    before = loss(model)
    language = merge_adapter(model.language, torch.bfloat16 if chosen.precision == "bf16" else DTYPES["fp32"])
    place = ctx.folder / LANGUAGE
    save_language_model(language.model, language.prompt, place)
    settings = language.settings.model_copy(update={"model": str(place), "tokenizer": "", "revision": ""})
    language = replace(language, name=str(place), digest=language_model_digest(str(place), ""), settings=settings)
    joined = model.with_parts(language=language, own_language=True, audio_source=None)
    after = loss(joined)
    joined.save_pretrained(ctx.folder)
    ctx.tracker.say(f"merge: {before:.4f} nats/token before, {after:.4f} after, on {len(held)} held-out conversations")
    _write_card(ctx, {"val/loss before": before, "val/loss": after}, joined.questions)
    return {"before/val/loss": before, "val/loss": after}


def _write_card(ctx: Context, figures: Mapping[str, float], questions: Sequence[str]) -> None:
    from mmphi.models.model_card import language_part, language_title, write_card

    base, chosen = ctx.settings(LanguageSettings).model, ctx.settings(MergeSettings)
    write_card(
        ctx.folder,
        title=f"{language_title(base)} with a merged adapter for questions about images",
        what="An adapter merged into its dequantised language model, and a projector for its images.",
        base=base,
        example='"what is this?", "photo.jpg"',
        run_id=ctx.tracker.run_id,
        figures=figures,
        parts={"language model": f"{language_part(base)}, merged, in {chosen.precision}"},
        questions=questions,
        lineage={name: result.run_id for name, result in ctx.upstream.items()},
    )


STAGE = Stage(
    name="merge",
    version=1,
    help="merge an adapter into its dequantised language model",
    reads=("merge", *CONTENT, "data.sources.N.question", "language.model"),
    run=run,
    upstream=upstream,
    requests=("projector.features",),
    talks=True,
)
