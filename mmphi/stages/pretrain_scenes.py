"""Pretraining on scenes written as words: short prompts and answers, packed like a projector's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config.pretrain import PretrainSettings
from mmphi.data.schema import Example, Turn
from mmphi.pipeline.stage import Context

if TYPE_CHECKING:
    from mmphi.models.packed_vlm import PackedVLM
    from mmphi.text.prompt import Prompt
    from mmphi.text.tokenized_example import TokenizedExample

VALIDATION = 200  # Texts kept apart.


def train_on_scenes(ctx: Context) -> tuple[Any, Prompt, dict[str, float]]:
    """Train on the scenes of the stage ``scenes``.

    Returns:
        The model, its prompt, and its figures.
    """
    import torch
    from transformers import PhiForCausalLM

    from mmphi.models.device import this_device
    from mmphi.models.language.phi import PHI2_VOCABULARY, count_parameters
    from mmphi.models.packed_vlm import PackedVLM
    from mmphi.models.patches.module_patches import apply_patches
    from mmphi.stages.pretrain_texts import shape_of
    from mmphi.text.packing import Layout
    from mmphi.text.prompt import Prompt
    from mmphi.text.tokenizer import phi2_tokenizer, train_bpe
    from mmphi.training.lr_scaling import with_learning_rates
    from mmphi.training.packed_dataset import packed_dataset
    from mmphi.training.trainer import train

    chosen = ctx.settings(PretrainSettings)
    rows = list(_scene_rows(ctx.upstream["scenes"].path))
    if chosen.vocabulary:
        written = (f"{row['context']}\n" + "\n".join(map("\n".join, row["turns"])) for row in rows)
        tokenizer: Any = train_bpe(written, chosen.vocabulary)
        vocabulary = len(tokenizer)
    else:
        tokenizer, vocabulary = phi2_tokenizer(), PHI2_VOCABULARY
    prompt = Prompt(tokenizer, "plain")
    answers_only = chosen.learn == "answers"
    samples = list(scene_samples(rows[:-VALIDATION], prompt, chosen, answers_only=answers_only))
    held = {
        "val/loss": list(scene_samples(rows[-VALIDATION:], prompt, chosen, answers_only=answers_only)),
        "val/answer_loss": list(scene_samples(rows[-VALIDATION:], prompt, chosen, answers_only=True)),
    }
    torch.manual_seed(chosen.seed)
    shape = shape_of(chosen, vocabulary, tokenizer.eos_token_id)
    model = apply_patches(PhiForCausalLM(shape).to(this_device()))
    parameters, tokens = count_parameters(shape), sum(map(len, samples))
    ctx.tracker.metrics({"pretrain/parameters": parameters.total, "pretrain/corpus_tokens": tokens})
    packed = PackedVLM(model, layout=Layout(width=chosen.width))
    validate = validator(packed, held)
    batch_tokens = chosen.batch_size * tokens // max(1, len(samples))
    with packed.recomputing(chosen.gradient_checkpointing):
        train(
            packed,
            packed_dataset(samples, {}, chosen, layout=packed.layout),
            with_learning_rates(chosen, parameters.inner, chosen.width, batch_tokens),
            folder=ctx.folder,
            tracker=ctx.tracker,
            title="pretrain",
            validate=validate,
        )
    packed.eval()
    return model, prompt, validate(chosen.steps)


def _scene_rows(scenes: Path) -> Iterator[dict[str, Any]]:
    with (scenes / "corpus.jsonl").open() as file:
        for line in file:
            yield json.loads(line)


def scene_texts(scenes: Path, *, held: bool) -> Iterator[Example]:
    """The same rows as conversations about a text.

    Args:
        scenes: Folder of the stage ``scenes``.
        held: Those kept apart, or the others.
    """
    rows = list(_scene_rows(scenes))
    for number, row in enumerate(rows[-VALIDATION:] if held else rows[:-VALIDATION]):
        turns = tuple(Turn(question, answer) for question, answer in row["turns"])
        yield Example(f"text-{number}", (), turns, "scenes", context=row["context"])


def scene_samples(
    rows: Sequence[dict[str, Any]], prompt: Prompt, chosen: PretrainSettings, *, answers_only: bool = False
) -> Iterator[TokenizedExample]:
    """Scenes as words, in the prompt that a projector will later put their pictures into.

    ``answers_only`` leaves what reading the grid determines, which is learned several times faster; otherwise the grid
    is learned too, like any other text.
    """
    from mmphi.text.tokenized_example import join_spans

    for row in rows:
        turns = [(question, answer) for question, answer in row["turns"]]
        sample = join_spans(prompt.parts(turns, context=row["context"]))
        if len(sample) <= chosen.max_length:
            if not answers_only:
                sample.supervised[1:] = True
            yield sample


def validator(packed: PackedVLM, held: Mapping[str, Sequence[TokenizedExample]]) -> Callable[[int], dict[str, float]]:
    """Loss per supervised token of each set of samples kept apart."""
    import torch

    from mmphi.text.packing import packs, to_device

    device = next(packed.parameters()).device

    @torch.inference_mode()
    def loss(samples: Sequence[TokenizedExample]) -> float:
        nats, tokens = 0.0, 0
        for pack in packs(samples, {}, 4096, layout=packed.layout):
            nats += float(packed(**to_device(pack, device)))
            tokens += len(pack["targets"])
        return nats / tokens

    def validate(_: int) -> dict[str, float]:
        return {name: loss(samples) for name, samples in held.items()}

    return validate
