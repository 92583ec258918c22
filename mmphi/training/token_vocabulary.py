"""Vocabulary of the tokens in a set of texts, used as classes of an alignment loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_vocabulary(language: Any, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Returns the token IDs that texts contain, and each text as indices into them, from 1 on.

    Args:
        language: Language model whose tokenizer is used.
        texts: Texts; each is tokenized after a space, as in the middle of a prompt.
    """
    encoded = [
        language.tokenizer(" " + text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in texts
    ]
    known = sorted({token for ids in encoded for token in ids})
    place = {token: number for number, token in enumerate(known, start=1)}
    return known, [[place[token] for token in ids] for ids in encoded]
