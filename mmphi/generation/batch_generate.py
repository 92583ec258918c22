"""Batch generation: prompts of different lengths are left-padded, and features fill their spans."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from mmphi.text.packing import check_feature_lengths, features_by_kind, to_device
from mmphi.text.tokenized_example import FeatureSpan, TokenizedExample

if TYPE_CHECKING:
    from mmphi.models.multimodal import Multimodal

BAR_AFTER_S = 5.0  # A loop that takes longer shows a progress bar.
_GENERATING = threading.Lock()  # All threads share a model's ``generation_config``.


@dataclass(frozen=True)
class GeneratedAnswer:
    """One generated answer.

    Attributes:
        text: Decoded text without special tokens, stripped.
        ended: Whether an end token was generated before the length limit.
    """

    text: str
    ended: bool


@contextmanager
def default_generation_config(language_model: Any) -> Iterator[None]:
    """Replace a model's generation config with transformers' defaults inside the context.

    ``generate`` takes options that are not passed from the model's own config. A repetition penalty, a forced token or
    ``min_p`` there would make batch answers differ from chat answers, and samples from the model's distribution.
    """
    with _GENERATING:
        own = language_model.generation_config
        language_model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            language_model.generation_config = own


@torch.inference_mode()
def batch_generate(
    model: Multimodal, prompts: Sequence[TokenizedExample], batch_size: int, **how: Any
) -> list[list[GeneratedAnswer]]:
    """Generate one or more answers to each prompt.

    Args:
        model: Model that generates.
        prompts: Tokenized prompts with feature spans.
        batch_size: Prompts per forward pass.
        **how: Options of transformers' ``GenerationConfig``; see :func:`default_generation_config`.

    Returns:
        One list of answers per prompt, in the order of ``prompts``.
    """
    # Batches of similar lengths need less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, list[GeneratedAnswer]] = {}
    for first in tqdm(range(0, len(order), batch_size), "answers", leave=False, delay=BAR_AFTER_S):
        chosen = order[first : first + batch_size]
        answers.update(zip(chosen, _batch(model, [prompts[i] for i in chosen], how), strict=True))
    return [answers[i] for i in range(len(prompts))]


def _batch(model: Multimodal, prompts: Sequence[TokenizedExample], how: dict[str, Any]) -> list[list[GeneratedAnswer]]:
    tokenizer, longest, device = model.language.tokenizer, max(map(len, prompts)), model.device
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    spans: list[FeatureSpan] = []
    for row, prompt in enumerate(prompts):
        begin = longest - len(prompt)
        ids[row, begin:] = torch.from_numpy(prompt.input_ids)
        mask[row, begin:] = 1
        check_feature_lengths(prompt, model.sources)
        spans += [span._replace(start=row * longest + begin + span.start) for span in prompt.spans]
    features, places = (to_device(each, device) for each in features_by_kind(spans, model.sources))
    embeddings = model.packed.embed(ids.to(device), features, places)
    ends = model.language.ends
    with default_generation_config(model.language.model):
        tokens = model.language.model.generate(
            inputs_embeds=embeddings, attention_mask=mask.to(device), eos_token_id=ends, pad_token_id=ends[0], **how
        )
    answers = []
    for row in tokens.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        text = tokenizer.decode(row[:stop], skip_special_tokens=True).strip()
        answers.append(GeneratedAnswer(text, stop is not None))
    each = len(answers) // len(prompts)
    return [answers[i : i + each] for i in range(0, len(answers), each)]
