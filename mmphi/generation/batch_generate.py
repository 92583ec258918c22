"""Answers in batches: prompts of different lengths padded on the left, features at their places."""

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
_GENERATING = threading.Lock()  # The settings of a model are shared by all threads.


@dataclass(frozen=True)
class GeneratedAnswer:
    """What the model said.

    Attributes:
        text: Without special tokens, stripped.
        ended: Whether it ended by itself, before the longest answer allowed.
    """

    text: str
    ended: bool


@contextmanager
def default_generation_config(language_model: Any) -> Iterator[None]:
    """Let a model's ``generate`` do what its arguments say and nothing else.

    transformers fills what they leave open from the model's own generation settings. A penalty for repetition, a
    forced token or ``min_p`` there would make its answers others than those of a conversation, and samples others than
    the model's distribution.
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
    """Answers to prompts, one or more of each.

    Args:
        model: Who answers.
        prompts: Tokens with places for image features.
        batch_size: Prompts at once.
        **how: Of transformers' ``GenerationConfig``; see :func:`default_generation_config`.

    Returns:
        The answers to each prompt, in order.
    """
    # Alike lengths together: less padding, and the answers go back to their places.
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
