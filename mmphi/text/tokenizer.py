"""Phi-2's tokenizer, built offline, and a byte-level BPE trained on given texts.

Phi-2 uses CodeGen's tokenizer: GPT-2's byte-level BPE, whose ranks come with openai-whisper, and 38 tokens of
whitespace from id 50257 on: runs of 31 to 2 spaces, then of 9 to 2 tabs.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmphi.errors import ModelError

END = "<|endoftext|>"
WHITESPACE = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]


def _byte_names() -> dict[int, str]:
    """GPT-2's printable name of every byte (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _gpt2_ranks() -> dict[bytes, int]:
    spec = find_spec("whisper")
    path = Path(spec.origin).parent / "assets" / "gpt2.tiktoken" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModelError("GPT-2's BPE ranks come with openai-whisper, which is not there", "pip install openai-whisper")
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge of each token: BPE with only the lower ranks always splits it into two parts."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def phi2_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that gives the same tokens as Phi-2's.

    Raises:
        ModelError: If openai-whisper, which contains the BPE ranks, is not installed.
    """
    ranks, names = _gpt2_ranks(), _byte_names()

    def name(token: bytes) -> str:
        return "".join(names[b] for b in token)

    vocabulary = {name(token): rank for token, rank in ranks.items()}
    merges = [(name(a), name(b)) for a, b in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in WHITESPACE])
    return _wrap(tokenizer)


def train_bpe(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; equal texts give equal tokenizers.

    Args:
        texts: Training texts.
        vocabulary: Vocabulary size, including the 256 bytes and the end-of-text token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
