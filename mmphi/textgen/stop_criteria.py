"""Stop criteria of text generation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mmphi.errors import SettingsError
from mmphi.textgen.corpus_store import CorpusManifest

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
HINT = "write store, documents 1k, tokens 2M or time 20m; or several, separated by commas"


@dataclass(frozen=True)
class CorpusStopCriteria:
    """Conditions, of which the first to hold ends generation; a full store always does.

    Attributes:
        documents: Number of documents kept.
        tokens: Tokens in the kept documents.
        seconds: Seconds of generation.
    """

    documents: float = math.inf
    tokens: float = math.inf
    seconds: float = math.inf

    def reached(self, manifest: CorpusManifest, seconds: float) -> bool:
        """Whether a condition holds, or the store is full."""
        few = manifest.documents < self.documents and manifest.tokens < self.tokens and seconds < self.seconds
        return manifest.full or not few


def parse_corpus_stop(text: str) -> CorpusStopCriteria:
    """Parse conditions.

    >>> parse_corpus_stop("documents 1k, time 20m")
    CorpusStopCriteria(documents=1000.0, tokens=inf, seconds=1200.0)

    Raises:
        SettingsError: If a condition cannot be parsed.
    """
    found: dict[str, float] = {}
    parts = [part.strip().lower() for part in text.split(",") if part.strip()]
    if not parts:
        raise SettingsError("textgen.stop is empty", HINT)
    for part in parts:
        number = r"(\d+(?:\.\d+)?)"
        if part == "store":
            continue
        if match := re.fullmatch(rf"(documents|tokens)\s*{number}\s*([kmb]?)", part):
            found[match[1]] = float(match[2]) * UNITS[match[3]]
        elif match := re.fullmatch(rf"(?:time\s*)?{number}\s*(s|m|min|h)", part):
            found["seconds"] = float(match[1]) * SECONDS[match[2]]
        else:
            raise SettingsError(f"textgen.stop: {part!r} is not a valid condition", HINT)
    if any(value <= 0 for value in found.values()):
        raise SettingsError(f"textgen.stop = {text!r} has a number that is not above zero", HINT)
    return CorpusStopCriteria(**found)
