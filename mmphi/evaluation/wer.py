"""Word error rate: how far a transcript is from what was said, by Whisper's own rules of what is the same word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class WordErrors:
    """What became of the words of a reference.

    Attributes:
        hits: Said and heard.
        substitutions: Heard as another word.
        deletions: Not heard.
        insertions: Heard, and never said.
    """

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def said(self) -> int:
        """Words of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Word error rate; of a reference without words 0 where nothing was heard, else the words that were."""
        return (self.substitutions + self.deletions + self.insertions) / max(1, self.said)

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
    """A text as Whisper's own evaluation compares it: no case or punctuation, numbers and spellings made one.

    Args:
        text: As it was written.
        language: Its code; all but English are only cleaned.
    """
    return str(_normalizer(language in ("", "en"))(text)).strip()


def word_errors(reference: str, heard: str, language: str = "en") -> WordErrors:
    """What became of the words of one reference.

    Args:
        reference: What was said.
        heard: The transcript.
        language: Code of the language.
    """
    import jiwer

    said, found = normalized(reference, language), normalized(heard, language)
    if not said:  # jiwer takes no empty reference.
        return WordErrors(insertions=len(found.split()))
    counted = jiwer.process_words(said, found)
    return WordErrors(counted.hits, counted.substitutions, counted.deletions, counted.insertions)


def total_errors(each: Sequence[WordErrors]) -> WordErrors:
    """Of all recordings together: a long one counts more than a short one."""
    return sum(each, WordErrors())
