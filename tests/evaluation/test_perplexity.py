from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_language

from mmphi.errors import DataError
from mmphi.evaluation.perplexity import PerplexityProtocol, text_loss

TEXT = "The quick brown fox jumps over the lazy dog. " * 9


def test_windows_are_the_published_protocol():
    """AutoAWQ's evaluation, written out: whole windows one after the other, the rest left out."""
    language = tiny_language()
    ids = torch.tensor(language.tokenizer(TEXT)["input_ids"])
    nats = []
    for i in range(len(ids) // 64):
        window = ids[None, i * 64 : (i + 1) * 64]
        logits = language.model(window).logits[:, :-1]
        nats.append(F.cross_entropy(logits[0], window[0, 1:]).item())
    found = text_loss(language.model, language.tokenizer, TEXT, PerplexityProtocol(64, 64))
    assert found.loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert found.tokens == 63 * (len(ids) // 64)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize("stride", [16, 64, 50])
def test_a_stride_scores_every_token_once_with_what_is_before_it(stride):
    language = tiny_language()
    ids = torch.tensor(language.tokenizer(TEXT)["input_ids"])
    protocol = PerplexityProtocol(64, stride, tail=True)
    scored = [i for _, end, first in protocol.windows(len(ids)) for i in range(first, end)]
    # Without overlap the first token of a window has nothing before it, and is only given.
    assert scored == [i for i in range(1, len(ids)) if stride < 64 or i % 64]
    for begin, end, first in protocol.windows(len(ids)):
        assert end - begin <= 64
        assert first - begin >= 64 - stride or begin == 0 or end == len(ids)
    found = text_loss(language.model, language.tokenizer, TEXT, protocol)
    nats = 0.0
    for begin, end, first in protocol.windows(len(ids)):
        logits = language.model(ids[None, begin:end]).logits[0]
        nats += float(F.cross_entropy(logits[first - begin - 1 : -1], ids[first:end], reduction="sum"))
    assert found.nats == pytest.approx(nats, rel=1e-4)


def test_bits_per_byte_are_of_the_bytes_scored():
    language = tiny_language()
    found = text_loss(language.model, language.tokenizer, TEXT, PerplexityProtocol(10_000, 10_000))
    assert found.bytes == len(TEXT.encode()) - 1  # A token a byte; the first is given.
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


def test_few_windows_and_none():
    language = tiny_language()
    assert text_loss(language.model, language.tokenizer, TEXT, PerplexityProtocol(32, 32, most_windows=2)).tokens == 62
    with pytest.raises(DataError, match="too short"):
        text_loss(language.model, language.tokenizer, "x", PerplexityProtocol())


@pytest.mark.skipif("MMPHI_MODELS" not in os.environ, reason="needs a pretrained model")
@pytest.mark.real
def test_a_pretrained_model_on_a_real_text():
    """SmolLM2-135M on WikiText-2's test split is near what small pretrained models are known to have."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(os.cpu_count() or 1)  # Nothing here is compared to the bit.
    folder = next(Path(os.environ["MMPHI_MODELS"]).glob("*mol*135*"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = (Path(os.environ["MMPHI_REAL"]) / "text" / "wikitext2-raw-test.txt").read_text()
    found = text_loss(model, tokenizer, text, PerplexityProtocol(1024, 1024, most_windows=4))
    assert 10 < found.perplexity < 40
    assert 0.7 < found.bits_per_byte < 1.2
