"""Which texts are worth keeping: the rules of Gopher and FineWeb as datatrove has them, and what is no text at all.

datatrove is what FineWeb was made with, and its filters are kept and tested by those who did. Each looks at one
document, so that they can be asked while text is still being written.
"""

from __future__ import annotations

import unicodedata
from typing import Any

STRANGE = 0.01  # Share of characters that no text has: control characters, halves of letters, private ones.


class Quality:
    """Says why a text is not kept.

    Args:
        shortest: Words.
        longest: Words.
        language: ISO 639-3 code, as datatrove has it: ``eng``.
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
        """Why a text is not kept; empty where it is."""
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
