"""Word error rate of transcripts, after Whisper's text normalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class WordErrors:
    """Word-level errors of a transcript against its reference.

    Attributes:
        hits: Number of correct words.
        substitutions: Number of reference words replaced by another word.
        deletions: Number of reference words missing in the transcript.
        insertions: Number of transcript words that the reference does not have.
    """

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def reference_words(self) -> int:
        """Number of words in the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Word error rate; for a reference without words, the number of insertions."""
        return (self.substitutions + self.deletions + self.insertions) / max(1, self.reference_words)

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


@cache
def _normalizer(english: bool) -> Any:
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer() if english else BasicTextNormalizer()


def normalized(text: str, language: str = "en") -> str:
    """Normalize a text as Whisper's evaluation does: case, punctuation, numbers and spelling variants.

    Args:
        text: Text to normalize.
        language: Language code; empty is English. Numbers and spellings are normalized in English only.
    """
    return str(_normalizer(language in ("", "en"))(text)).strip()


def word_errors(reference: str, transcript: str, language: str = "en") -> WordErrors:
    """Count the word errors of one transcript, after normalization.

    Args:
        reference: Reference text.
        transcript: Transcript to compare with it.
        language: Language code.
    """
    import jiwer

    expected, found = normalized(reference, language), normalized(transcript, language)
    if not expected:  # jiwer rejects empty references.
        return WordErrors(insertions=len(found.split()))
    counted = jiwer.process_words(expected, found)
    return WordErrors(counted.hits, counted.substitutions, counted.deletions, counted.insertions)


def total_errors(each: Sequence[WordErrors]) -> WordErrors:
    """Sum the word errors of all recordings, which weights recordings by their length."""
    return sum(each, WordErrors())
