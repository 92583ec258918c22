"""Stage ``pretrain``: a Phi-shaped language model from scratch, on texts or on scenes written as words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from mmphi.errors import SettingsError
from mmphi.pipeline.stage import Context, Cost, Stage
from mmphi.settings import TrainingSettings, setting
from mmphi.settings.view import SettingsView
from mmphi.stages.common import check_training

if TYPE_CHECKING:
    from mmphi.models.packed import PackedModel
    from mmphi.text.prompt import Prompt
    from mmphi.text.sequences import Sample

VALIDATION = 200  # Texts, or stretches of text, kept apart.


class PretrainSettings(TrainingSettings):
    """A Phi-shaped language model trained from scratch."""

    corpus: list[str] = setting([], "text files; none means scenes written as words", file="path")
    learn: Literal["everything", "answers"] = setting("answers", "which tokens of scenes' texts are learned")
    layers: int = setting(4, "transformer layers", unit="layers", ge=1, le=128)
    width: int = setting(128, "hidden width", unit="units", ge=16)
    heads: int = setting(4, "attention heads", unit="heads", ge=1)
    context: int = setting(512, "longest context", unit="tokens", ge=16)
    vocabulary: int = setting(512, "size of an own byte-level BPE; 0 takes Phi-2's", unit="tokens", ge=0, le=200000)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> PretrainSettings:
        if self.width % self.heads:
            near = min((h for h in range(1, self.width + 1) if self.width % h == 0), key=lambda h: abs(h - self.heads))
            raise ValueError(
                f"heads = {self.heads} does not divide width = {self.width}; the nearest that does is {near}"
            )
        return self


def upstream(settings: SettingsView) -> tuple[str, ...]:
    """Scenes, where no text is given."""
    return () if settings(PretrainSettings).corpus else ("scenes",)


def check(settings: SettingsView) -> None:
    """A batch for every pass, and a context that holds a sequence."""
    chosen = settings(PretrainSettings)
    check_training("pretrain", chosen)
    if chosen.context < chosen.max_length:
        raise SettingsError(
            f"pretrain.max_length = {chosen.max_length}, but pretrain.context = {chosen.context}",
            f"the nearest max_length is {chosen.context}",
        )


def cost(settings: SettingsView) -> Cost:
    """Weights, and a checkpoint with two moments of each; 6 FLOPs a parameter and token."""
    chosen = settings(PretrainSettings)
    vocabulary = chosen.vocabulary or 51200
    parameters = 12 * chosen.layers * chosen.width**2 + 2 * vocabulary * chosen.width
    return Cost(16 * parameters)


def run(ctx: Context) -> Mapping[str, float]:
    """Train from scratch, and save in Hugging Face's format with the tokenizer."""
    import torch
    from transformers import PhiForCausalLM

    from mmphi.models.device import this_device
    from mmphi.models.language import phi_config
    from mmphi.models.packed import PackedModel
    from mmphi.text.prompt import Prompt
    from mmphi.text.tokenizer import PHI2_VOCABULARY, phi2_tokenizer, train_bpe
    from mmphi.training.steps import packed_steps
    from mmphi.training.trainer import train

    chosen = ctx.settings(PretrainSettings)
    rows = list(_scene_rows(ctx.upstream["scenes"].path)) if not chosen.corpus else []
    texts = [Path(path).read_text(encoding="utf-8", errors="replace") for path in chosen.corpus]
    if chosen.vocabulary:
        written = (f"{row['context']}\n" + "\n".join(map("\n".join, row["turns"])) for row in rows)
        tokenizer: Any = train_bpe(written if rows else texts, chosen.vocabulary)
        vocabulary = len(tokenizer)
    else:
        tokenizer, vocabulary = phi2_tokenizer(), PHI2_VOCABULARY
    prompt = Prompt(tokenizer, "plain")
    if rows:
        answers_only = chosen.learn == "answers"
        samples = list(scene_samples(rows[:-VALIDATION], prompt, chosen, answers_only=answers_only))
        held = {
            "val/loss": list(scene_samples(rows[-VALIDATION:], prompt, chosen, answers_only=answers_only)),
            "val/answer_loss": list(scene_samples(rows[-VALIDATION:], prompt, chosen, answers_only=True)),
        }
    else:
        stretches = list(text_samples(texts, prompt, chosen))
        samples, held = stretches[:-VALIDATION], {"val/loss": stretches[-VALIDATION:]}
    torch.manual_seed(chosen.seed)
    shape = phi_config(chosen.layers, chosen.width, chosen.heads, chosen.context, vocabulary, tokenizer.eos_token_id)
    model = PhiForCausalLM(shape).to(this_device())
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(map(len, samples))
    ctx.tracker.metrics({"pretrain/parameters": parameters, "pretrain/corpus_tokens": tokens})
    packed = PackedModel(model)
    validate = validator(packed, held)
    with packed.recomputing(chosen.gradient_checkpointing):
        train(
            packed,
            packed_steps(samples, {}, chosen),
            chosen,
            folder=ctx.folder,
            tracker=ctx.tracker,
            title="pretrain",
            validate=validate,
        )
    packed.eval()
    figures = validate(chosen.steps)
    if ctx.first:
        _save(ctx, model, prompt, figures)
    return figures


def _save(ctx: Context, model: Any, prompt: Prompt, figures: Mapping[str, float]) -> None:
    """Write the model in Hugging Face's format, and what it takes to load it alone."""
    from mmphi.models.bundle import LANGUAGE
    from mmphi.models.card import write_card
    from mmphi.models.language import Language, language_digest, save_language
    from mmphi.models.multimodal import Multimodal
    from mmphi.settings import LanguageSettings

    folder, chosen = ctx.folder, ctx.settings(PretrainSettings)
    save_language(model, prompt, folder / LANGUAGE)
    name = str(folder / LANGUAGE)
    settings = LanguageSettings(model=name, prompt=prompt.style)
    language = Language(model, prompt.tokenizer, prompt, chosen.width, name, language_digest(name, ""), settings)
    Multimodal(language, None, None, chosen.context, own_language=True).save_pretrained(folder)
    write_card(
        folder,
        title="A language model from scratch",
        what=f"A Phi-shaped causal language model with {model.num_parameters():,} parameters.",
        base="none",
        example='"what color is the big shape?"',
        run_id=ctx.tracker.run_id,
        figures=figures,
        parts={"layers": chosen.layers, "width": chosen.width, "heads": chosen.heads, "prompt style": prompt.style},
        lineage={name: result.run_id for name, result in ctx.upstream.items()},
    )


def _scene_rows(scenes: Path) -> Iterator[dict[str, Any]]:
    with (scenes / "corpus.jsonl").open() as file:
        for line in file:
            yield json.loads(line)


def scene_samples(
    rows: Sequence[dict[str, Any]], prompt: Prompt, chosen: PretrainSettings, *, answers_only: bool = False
) -> Iterator[Sample]:
    """Scenes as words, in the prompt that a projector will later put their pictures into.

    ``answers_only`` leaves what reading the grid determines, which is learned several times faster; otherwise the grid
    is learned too, like any other text.
    """
    from mmphi.text.sequences import join

    for row in rows:
        turns = [(question, answer) for question, answer in row["turns"]]
        sample = join(prompt.parts(turns, context=row["context"]))
        if len(sample) <= chosen.max_length:
            if not answers_only:
                sample.supervised[1:] = True
            yield sample


def text_samples(texts: Sequence[str], prompt: Prompt, chosen: PretrainSettings) -> Iterator[Sample]:
    """Texts cut into stretches of ``max_length`` tokens, all of them learned, interleaved so that any end is a mix."""
    import numpy as np

    from mmphi.errors import DataError
    from mmphi.text.sequences import Sample

    stretches = []
    for text in texts:
        ids = prompt.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [prompt.tokenizer.bos_token_id, *ids, prompt.tokenizer.eos_token_id]
        for first in range(0, len(ids) - 1, chosen.max_length - 1):
            stretch = np.asarray(ids[first : first + chosen.max_length], np.int32)
            supervised = np.ones(len(stretch), np.bool_)
            supervised[0] = False
            stretches.append(Sample(stretch, supervised))
    if len(stretches) <= 2 * VALIDATION:
        raise DataError(
            f"the corpus has only {len(stretches)} stretches of {chosen.max_length} tokens",
            "give more text in pretrain.corpus, or lower pretrain.max_length",
        )
    order = np.random.default_rng(0).permutation(len(stretches))
    yield from (stretches[i] for i in order)


def validator(packed: PackedModel, held: Mapping[str, Sequence[Sample]]) -> Callable[[int], dict[str, float]]:
    """Loss per supervised token of each set of samples kept apart."""
    import torch

    from mmphi.text.packing import packs, to_device

    device = next(packed.parameters()).device

    @torch.inference_mode()
    def loss(samples: Sequence[Sample]) -> float:
        nats, tokens = 0.0, 0
        for pack in packs(samples, {}, 4096):
            nats += float(packed(**to_device(pack, device)))
            tokens += len(pack["targets"])
        return nats / tokens

    def validate(_: int) -> dict[str, float]:
        return {name: loss(samples) for name, samples in held.items()}

    return validate


STAGE = Stage(
    name="pretrain",
    version=2,
    help="train a Phi-shaped language model from scratch",
    reads=("pretrain",),
    run=run,
    upstream=upstream,
    trains=True,
    check=check,
    cost=cost,
)
