"""The tokens that texts consist of, as classes of an alignment loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_vocabulary(language: Any, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The tokens that texts are made of, and each text as places among them, from 1 on.

    Args:
        language: Whose tokenizer.
        texts: What is said; each begins within a sentence, as it does after a question's own words.
    """
    encoded = [
        language.tokenizer(" " + text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in texts
    ]
    known = sorted({token for ids in encoded for token in ids})
    place = {token: number for number, token in enumerate(known, start=1)}
    return known, [[place[token] for token in ids] for ids in encoded]
