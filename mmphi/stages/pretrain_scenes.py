"""Pretraining on textual descriptions of scenes: short prompts and answers in packed rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.config.pretrain import PretrainSettings
from mmphi.data.schema import Example, Turn
from mmphi.errors import DataError
from mmphi.pipeline.stage import Context

if TYPE_CHECKING:
    from mmphi.text.prompt import Prompt
    from mmphi.text.tokenized_example import TokenizedExample

VALIDATION = 200  # Texts held out.


def pretrain_on_scenes(ctx: Context) -> tuple[Any, Prompt, dict[str, float]]:
    """Train on the texts of the stage ``scenes``.

    Returns:
        The model, its prompt, and its metrics.
    """
    from mmphi.models.language.phi import PHI2_VOCABULARY
    from mmphi.text.prompt import Prompt
    from mmphi.text.tokenizer import phi2_tokenizer, train_bpe
    from mmphi.training.conversation_pretraining import pretrain_on_conversations
    from mmphi.training.pretraining import model_config

    chosen = ctx.settings(PretrainSettings)
    rows = list(_scene_rows(ctx.upstream["scenes"].path))
    if len(rows) <= VALIDATION:
        raise DataError(
            f"{len(rows)} texts are too few to pretrain on: {VALIDATION} are held out", "raise scenes.texts"
        )
    if chosen.vocabulary:
        written = (f"{row['context']}\n" + "\n".join(map("\n".join, row["turns"])) for row in rows)
        tokenizer: Any = train_bpe(written, chosen.vocabulary)
        vocabulary = len(tokenizer)
    else:
        tokenizer, vocabulary = phi2_tokenizer(), PHI2_VOCABULARY
    prompt = Prompt(tokenizer, "plain")
    answers_only = chosen.loss_on == "answers"
    samples = list(scene_samples(rows[:-VALIDATION], prompt, chosen, answers_only=answers_only))
    held_out = {
        "val/loss": list(scene_samples(rows[-VALIDATION:], prompt, chosen, answers_only=answers_only)),
        "val/answer_loss": list(scene_samples(rows[-VALIDATION:], prompt, chosen, answers_only=True)),
    }
    model, figures = pretrain_on_conversations(
        samples,
        held_out,
        chosen,
        model_config(chosen, vocabulary, tokenizer.eos_token_id),
        folder=ctx.folder,
        tracker=ctx.tracker,
    )
    return model, prompt, figures


def _scene_rows(scenes: Path) -> Iterator[dict[str, Any]]:
    with (scenes / "corpus.jsonl").open() as file:
        for line in file:
            yield json.loads(line)


def scene_texts(scenes: Path, *, held: bool) -> Iterator[Example]:
    """Yield scene texts as conversations about a text instead of an image.

    Args:
        scenes: Result folder of the stage ``scenes``.
        held: Whether to yield the held-out texts; otherwise the training texts.
    """
    rows = list(_scene_rows(scenes))
    for number, row in enumerate(rows[-VALIDATION:] if held else rows[:-VALIDATION]):
        turns = tuple(Turn(question, answer) for question, answer in row["turns"])
        yield Example(f"text-{number}", (), turns, "scenes", context=row["context"])


def scene_samples(
    rows: Sequence[dict[str, Any]], prompt: Prompt, chosen: PretrainSettings, *, answers_only: bool = False
) -> Iterator[TokenizedExample]:
    """Yield scene texts in the prompt format that later holds projected images; longer than ``max_length`` are skipped.

    With ``answers_only``, only answers are supervised: they follow from the described grid and are learned several
    times faster. Otherwise all tokens but the first are supervised.
    """
    from mmphi.text.tokenized_example import join_spans

    for row in rows:
        turns = [(question, answer) for question, answer in row["turns"]]
        sample = join_spans(prompt.parts(turns, context=row["context"]))
        if len(sample) <= chosen.max_length:
            if not answers_only:
                sample.supervised[1:] = True
            yield sample
