"""Pretraining on a corpus of any size: memory-mapped shards, or a stream of generated text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mmphi.config.corpus import CorpusSettings
from mmphi.config.pretrain import PretrainSettings
from mmphi.config.textgen import TextgenSettings
from mmphi.pipeline.stage import Context

if TYPE_CHECKING:
    from mmphi.text.prompt import Prompt


def pretrain_on_shards(ctx: Context) -> tuple[Any, Prompt, dict[str, float]]:
    """Train on the shards of the stage ``tokens``.

    Returns:
        The model, its prompt, and its metrics.
    """
    from transformers import AutoTokenizer

    from mmphi.data.token_shards import INDEX, TokenShards
    from mmphi.text.prompt import Prompt
    from mmphi.training.pretraining import ShardTexts, model_config, pretrain

    chosen, folder = ctx.settings(PretrainSettings), ctx.upstream["tokens"].path
    index = json.loads((folder / INDEX).read_text())
    prompt = Prompt(AutoTokenizer.from_pretrained(folder / "tokenizer"), "plain")
    config = model_config(chosen, index["vocabulary"], index["end"])
    weights = [source.weight for source in ctx.settings(CorpusSettings).sources] or [0.0]
    texts = ShardTexts(TokenShards(folder, index["shards"]), weights, chosen, ctx.tracker)
    model, figures = pretrain(chosen, config, prompt, texts, folder=ctx.folder, tracker=ctx.tracker, first=ctx.first)
    return model, prompt, figures


def pretrain_on_stream(ctx: Context) -> tuple[Any, Prompt, dict[str, float]]:
    """Train on text while it is being generated, with Phi-2's tokenizer.

    Returns:
        The model, its prompt, and its metrics.
    """
    from mmphi.models.language.phi import PHI2_VOCABULARY
    from mmphi.stages.pretrain_stream import GeneratedStream
    from mmphi.text.prompt import Prompt
    from mmphi.text.tokenizer import phi2_tokenizer
    from mmphi.textgen.generator_pool import backend_of
    from mmphi.training.pretraining import model_config, pretrain

    chosen, tokenizer = ctx.settings(PretrainSettings), phi2_tokenizer()
    prompt = Prompt(tokenizer, "plain")
    config = model_config(chosen, PHI2_VOCABULARY, tokenizer.eos_token_id)
    with GeneratedStream(ctx, tokenizer, backend_of(ctx.settings(TextgenSettings), ctx.tracker.say)) as stream:
        model, figures = pretrain(
            chosen, config, prompt, stream, folder=ctx.folder, tracker=ctx.tracker, first=ctx.first
        )
        figures |= stream.closing_figures(figures["pretrain/seconds"])
    return model, prompt, figures
