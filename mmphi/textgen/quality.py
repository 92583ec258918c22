"""Quality filters: datatrove's rules of Gopher and FineWeb, and a check for characters that are not text.

datatrove is the library that FineWeb was made with, and its authors maintain the filters. Each filter takes one
document, so that text can be filtered as it is generated.
"""

from __future__ import annotations

import unicodedata
from typing import Any

STRANGE = 0.01  # Maximum share of control, private-use, unassigned, surrogate and replacement characters.


class Quality:
    """Quality filter of single texts.

    Args:
        shortest: Minimum number of words.
        longest: Maximum number of words.
        language: ISO 639-3 code of the language, as in datatrove: ``eng``.
    """

    def __init__(self, shortest: int, longest: int, language: str = "eng") -> None:
        from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

        common: dict[str, Any] = {"language": language}
        self._filters: list[Any] = [
            GopherQualityFilter(min_doc_words=shortest, max_doc_words=longest, **common),
            GopherRepetitionFilter(**common),
            FineWebQualityFilter(**common),
        ]

    def __call__(self, text: str) -> str:
        """Returns why a text is rejected; empty if it is kept."""
        from datatrove.data import Document

        if not text.strip():
            return "empty"
        strange = sum(unicodedata.category(c) in ("Cc", "Co", "Cn", "Cs") and c not in "\n\r\t" for c in text)
        if strange + text.count("�") > STRANGE * len(text):
            return "not text"
        document = Document(text=text, id="")
        for each in self._filters:
            found = each.filter(document)
            kept, reason = found if isinstance(found, tuple) else (found, "")
            if not kept:
                return str(reason or each.name)
        return ""
