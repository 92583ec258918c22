"""Detection of duplicate and near-duplicate texts.

Near-duplicates are found as in FineWeb, by datatrove's MinHash signatures of word 5-grams in 14 bands of 8 (Penedo et
al. 2024): of pairs with a Jaccard similarity s of their 5-grams, 1 - (1 - s^8)^14 are found: 65 % at 0.72, 92 % at
0.80. datatrove compares bands in four passes over the files of all texts; here the bands of kept texts are in memory,
so that a text is checked when it arrives.
"""

from __future__ import annotations

import hashlib
from typing import Any


class Deduplicator:
    """Index of texts that recognises copies of them.

    Args:
        language: ISO 639-3 code of the language, for splitting words.
    """

    def __init__(self, language: str = "eng") -> None:
        from datatrove.pipeline.dedup import MinhashDedupSignature
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.utils.hashing import HashConfig

        # Not datatrove's default: xxhash rejects strings from version 4 on.
        hashes = MinhashConfig(hash_config=HashConfig(precision=64, hash_fc="sha1"))
        self._signatures: Any = MinhashDedupSignature("/nowhere", hashes, language)
        self._exact: dict[bytes, str] = {}
        self._bands: dict[bytes, str] = {}

    def of(self, text: str) -> tuple[str, str]:
        """Returns the kind of copy (``the same text``, ``nearly the same text``) and the name of the original.

        Both are empty if the text is not a copy. The text is not added to the index: see :meth:`keep`.
        """
        if (found := self._exact.get(_digest(text))) is not None:
            return "the same text", found
        for band in self._banded(text):
            if (found := self._bands.get(band)) is not None:
                return "nearly the same text", found
        return "", ""

    def keep(self, text: str, name: str) -> None:
        """Add a text to the index, under a name."""
        self._exact.setdefault(_digest(text), name)
        for band in self._banded(text):
            self._bands.setdefault(band, name)

    def _banded(self, text: str) -> list[bytes]:
        shingles = self._signatures.get_shingles(text)
        if not shingles.size:
            return []
        bands = self._signatures.get_signature(shingles)
        return [
            hashlib.blake2b(repr((number, band)).encode(), digest_size=12).digest() for number, band in enumerate(bands)
        ]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
