"""Texts that were there before: the same, or nearly so.

Near copies are found as FineWeb's were, by datatrove's MinHash signatures of word 5-grams in 14 bands of 8 (Penedo et
al. 2024): two texts that share 72 % of their 5-grams are found as copies in half of all cases, those that share 80 %
in nine of ten. datatrove looks for equal bands in four passes over files when all texts are there; here the bands of
what is kept are remembered, so that a text is judged when it comes.
"""

from __future__ import annotations

import hashlib
from typing import Any


class Deduplicator:
    """Remembers texts, and recognises copies of them.

    Args:
        language: Of the words, ISO 639-3 code.
    """

    def __init__(self, language: str = "eng") -> None:
        from datatrove.pipeline.dedup import MinhashDedupSignature
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.utils.hashing import HashConfig

        # Not its default: xxhash refuses texts from version 4 on.
        hashes = MinhashConfig(hash_config=HashConfig(precision=64, hash_fc="sha1"))
        self._signatures: Any = MinhashDedupSignature("/nowhere", hashes, language)
        self._exact: dict[bytes, str] = {}
        self._bands: dict[bytes, str] = {}

    def of(self, text: str) -> tuple[str, str]:
        """How a text is a copy (``the same text``, ``nearly the same text``) and of what; both empty where it is none.

        A text that is none is not remembered by this: see :meth:`keep`.
        """
        if (found := self._exact.get(_digest(text))) is not None:
            return "the same text", found
        for band in self._banded(text):
            if (found := self._bands.get(band)) is not None:
                return "nearly the same text", found
        return "", ""

    def keep(self, text: str, name: str) -> None:
        """Remember a text under a name."""
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
