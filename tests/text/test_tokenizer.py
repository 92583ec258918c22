from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmphi.text.tokenizer import phi2_tokenizer, train_bpe

SAMPLES = [
    "Hello, world! It's 3.14.",
    "def f(x):\n    if x:\n        return x  # indented\n\treturn\t\t-1",
    " " * 40 + "x" + "\t" * 12 + "y",
    "日本語 émigré 👩‍👩‍👧 ñ \u200b end",
    "a  b   c\n\n\n d",
    "<|endoftext|>after",
]


@pytest.fixture(scope="module")
def tokenizer():
    return phi2_tokenizer()


def test_known_ids(tokenizer):
    """Ids that GPT-2 and Phi-2 are known to give."""
    assert len(tokenizer) == 50295
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.unk_token_id == 50256
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert tokenizer("<|endoftext|>")["input_ids"] == [50256]
    assert tokenizer.convert_ids_to_tokens(50257) == " " * 31
    assert tokenizer("  ")["input_ids"] == [50286]
    assert tokenizer("\t\t")["input_ids"] == [50294]


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.real
def test_equals_the_real_tokenizer(tokenizer):
    """Token for token, on books, code and Unicode."""
    from transformers import PreTrainedTokenizerFast

    folder = os.environ.get("MMPHI_REAL")
    if not folder:
        pytest.skip("MMPHI_REAL is not set")
    real = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "phi-2" / "tokenizer.json"))
    assert len(real) == len(tokenizer)
    texts = [p.read_text(errors="replace")[:300_000] for p in (Path(folder) / "text").glob("*.txt")]
    texts += [p.read_text() for p in Path(__file__).parents[2].glob("mmphi/**/*.py")]
    texts += [*SAMPLES, "".join(map(chr, range(32, 0x3000)))]
    assert len(texts) > 40
    for text in texts:
        assert tokenizer(text)["input_ids"] == real(text)["input_ids"]


def test_own_bpe_is_deterministic_and_as_large_as_asked():
    texts = ["a big red circle left of a small blue square"] * 50 + ["a big green cross above a small red circle"] * 50
    one, two = train_bpe(texts, 300), train_bpe(texts, 300)
    assert len(one) <= 300
    assert one.get_vocab() == two.get_vocab()
    assert one("é 👍 red circle")["input_ids"] == two("é 👍 red circle")["input_ids"]
    assert one.decode(one("é 👍 red circle")["input_ids"]) == "é 👍 red circle"
    assert len(one(" circle")["input_ids"]) == 1
