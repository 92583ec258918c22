"""Stage ``pretrain``: trains a Phi-shaped language model from scratch, on a corpus or on texts about scenes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmphi.config.corpus import CorpusSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.pretrain import PretrainSettings
from mmphi.errors import SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage
from mmphi.stages.shared_models import check_training

if TYPE_CHECKING:
    from mmphi.text.prompt import Prompt


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """``tokens`` for a corpus or a store, nothing for a stream, else ``scenes``."""
    source = settings(PretrainSettings).source
    if source == "stream":
        return ()
    return ("tokens",) if source == "store" or settings(CorpusSettings).sources else ("scenes",)


def check(settings: SettingsView) -> None:
    """Check the batch size, the stop criteria and the context length."""
    chosen = settings(PretrainSettings)
    if chosen.source == "stream" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError(
            "pretrain.source = stream needs one process, not several", "fill a store first: --source store"
        )
    if chosen.source != "files" or settings(CorpusSettings).sources:
        from mmphi.training.stop_criteria import parse_stop

        parse_stop(chosen.stop)
        passes = chosen.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
        rows = chosen.batch_tokens // chosen.context
        if rows % passes:
            near = max(1, round(rows / passes)) * passes * chosen.context
            raise SettingsError(
                f"pretrain.batch_tokens = {chosen.batch_tokens} are {rows} rows of {chosen.context} tokens, which "
                f"cannot be spread evenly over {passes} forward passes",
                f"the nearest batch_tokens is {near}",
            )
        return
    check_training("pretrain", chosen)
    if chosen.context < chosen.max_length:
        raise SettingsError(
            f"pretrain.max_length = {chosen.max_length}, but pretrain.context = {chosen.context}",
            f"the nearest max_length is {chosen.context}",
        )


def unused(settings: SettingsView) -> tuple[str, ...]:
    """``textgen`` unless text is generated in a stream, and ``corpus`` if the model is trained on scenes."""
    generated = settings(PretrainSettings).source == "stream"
    read = "tokens" in upstream(settings)
    return (*(() if generated else ("textgen",)), *(() if generated or read else ("corpus",)))


def cost(settings: SettingsView) -> Cost:
    """Disk space of the weights and of a checkpoint with two moments per weight."""
    from mmphi.models.language.phi import SIZES, PhiSize, parameters_of

    chosen = settings(PretrainSettings)
    if chosen.size != "custom":
        return Cost(16 * parameters_of(SIZES[chosen.size]).total)
    shape = PhiSize(chosen.layers, chosen.width, chosen.heads, chosen.tied)
    return Cost(16 * parameters_of(shape, *([chosen.vocabulary] if chosen.vocabulary else [])).total)


def run(ctx: Context) -> Mapping[str, float]:
    """Train from scratch and save the model with its tokenizer in Hugging Face format."""
    if ctx.settings(PretrainSettings).source == "stream":
        from mmphi.stages.pretrain_texts import pretrain_on_stream as train_on
    elif "tokens" in ctx.upstream:
        from mmphi.stages.pretrain_texts import pretrain_on_shards as train_on
    else:
        from mmphi.stages.pretrain_scenes import pretrain_on_scenes as train_on

    model, prompt, figures = train_on(ctx)
    if ctx.first:
        _save(ctx, model, prompt, figures)
    return figures


def _save(ctx: Context, model: Any, prompt: Prompt, figures: Mapping[str, float]) -> None:
    """Write the model in Hugging Face format, with the files that make the folder self-contained."""
    from mmphi.config import LanguageSettings
    from mmphi.models.checkpoint import LANGUAGE
    from mmphi.models.language.language_model import LanguageModel, language_model_digest, save_language_model
    from mmphi.models.model_card import write_card
    from mmphi.models.multimodal import Multimodal

    folder, config = ctx.folder, model.config
    save_language_model(model, prompt, folder / LANGUAGE)
    name = str(folder / LANGUAGE)
    settings = LanguageSettings(model=name, prompt=prompt.style)
    digest = language_model_digest(name, "")
    language = LanguageModel(model, prompt.tokenizer, prompt, config.hidden_size, name, digest, settings)
    Multimodal(language, None, None, config.max_position_embeddings, own_language=True).save_pretrained(folder)
    write_card(
        folder,
        title="A language model from scratch",
        what=f"A Phi-shaped causal language model with {model.num_parameters():,} parameters.",
        base="none",
        example='"what color is the big shape?"' if "scenes" in ctx.upstream else '"The"',
        run_id=ctx.tracker.run_id,
        figures=figures,
        parts={
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "prompt style": prompt.style,
        },
        lineage={name: result.run_id for name, result in ctx.upstream.items()},
    )


STAGE = Stage(
    name="pretrain",
    version=4,
    help="train a Phi-shaped language model from scratch",
    reads=("pretrain", "corpus.sources.N.path", "corpus.sources.N.weight", "textgen"),
    run=run,
    upstream=upstream,
    unused=unused,
    requests=("store",),
    trains=True,
    check=check,
    cost=cost,
    talks=True,
)
