"""Stage ``pretrain``: a Phi-shaped language model from scratch, on texts or on scenes written as words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.settings import PretrainSettings, Settings
from mmphi.stage import Context, Cost, Stage

if TYPE_CHECKING:
    from mmphi.data.sequences import Sample
    from mmphi.models.multimodal import PackedModel
    from mmphi.models.prompt import Prompt

VALIDATION = 200  # Texts, or stretches of text, kept apart.


def upstream(settings: Settings) -> tuple[str, ...]:
    """Scenes, where no text is given."""
    return () if settings.pretrain.corpus else ("scenes",)


def inputs(settings: Settings) -> dict[str, Path]:
    """The text files."""
    return {f"pretrain.corpus.{i}": Path(path) for i, path in enumerate(settings.pretrain.corpus)}


def cost(settings: Settings) -> Cost:
    """Weights, and a checkpoint with two moments of each; 6 FLOPs a parameter and token."""
    chosen = settings.pretrain
    vocabulary = chosen.vocabulary or 51200
    parameters = 12 * chosen.layers * chosen.width**2 + 2 * vocabulary * chosen.width
    return Cost(16 * parameters)


def run(ctx: Context) -> Mapping[str, float]:
    """Train from scratch, and save in Hugging Face's format with the tokenizer."""
    import torch
    from transformers import PhiForCausalLM

    from mmphi.models.assemble import this_device
    from mmphi.models.language import phi_config
    from mmphi.models.multimodal import PackedModel
    from mmphi.models.prompt import Prompt
    from mmphi.models.tokenizer import PHI2_VOCABULARY, phi2_tokenizer, train_bpe
    from mmphi.training.trainer import train

    chosen, seed = ctx.settings.pretrain, ctx.settings.seed
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
    torch.manual_seed(seed)
    model = PhiForCausalLM(phi_config(chosen, vocabulary, tokenizer.eos_token_id)).to(this_device())
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(map(len, samples))
    ctx.tracker.metrics({"pretrain/parameters": parameters, "pretrain/corpus_tokens": tokens})
    packed = PackedModel(model)
    validate = validator(packed, held)
    train(
        packed,
        samples,
        None,
        chosen,
        seed=seed,
        folder=ctx.folder,
        tracker=ctx.tracker,
        title="pretrain",
        validate=validate,
    )
    model.save_pretrained(ctx.folder / "model")
    tokenizer.save_pretrained(ctx.folder / "model")
    packed.eval()
    return validate(chosen.steps)


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
    from mmphi.data.sequences import join

    for row in rows:
        turns = [(question, answer) for question, answer in row["turns"]]
        sample = join(prompt.parts(turns, image=False, context=row["context"]), None, 0)
        if len(sample) <= chosen.max_length:
            if not answers_only:
                sample.supervised[1:] = True
            yield sample


def text_samples(texts: Sequence[str], prompt: Prompt, chosen: PretrainSettings) -> Iterator[Sample]:
    """Texts cut into stretches of ``max_length`` tokens, all of them learned, interleaved so that any end is a mix."""
    import numpy as np

    from mmphi.data.sequences import Sample
    from mmphi.errors import DataError

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

    from mmphi.data.packing import packs, to_device

    device = next(packed.parameters()).device

    @torch.inference_mode()
    def loss(samples: Sequence[Sample]) -> float:
        nats, tokens = 0.0, 0
        for pack in packs(samples, None, 4096):
            nats += float(packed(**to_device(pack, device)))
            tokens += len(pack["targets"])
        return nats / tokens

    def validate(_: int) -> dict[str, float]:
        return {name: loss(samples) for name, samples in held.items()}

    return validate


STAGE = Stage(
    name="pretrain",
    version=1,
    help="train a Phi-shaped language model from scratch",
    sections=("pretrain",),
    run=run,
    upstream=upstream,
    inputs=inputs,
    cost=cost,
)
