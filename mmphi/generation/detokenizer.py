"""Incremental detokenization: text is emitted as soon as later tokens cannot change it."""

from __future__ import annotations

from typing import Any

from mmphi.generation.sampling import find_stop, possible_stop_prefix

UNFINISHED = "�"  # Decoded form of an incomplete UTF-8 sequence.


class IncrementalDetokenizer:
    """Text of an answer while its tokens are generated.

    Incomplete characters and possible beginnings of a stop string are held back. White space around the answer is
    stripped.

    Args:
        tokenizer: Tokenizer of the language model.
        stop: Stop strings; the answer ends before the first one that occurs.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._from = self._upto = 0
        self._raw, self._sure, self._given = "", 0, 0

    def add(self, token: int) -> bool:
        """Append the next token; returns whether the answer has reached a stop string."""
        self._ids.append(token)
        # Decodes from a few tokens earlier, because the text of a token may depend on the token before it.
        before = self._decode(self._ids[self._from : self._upto])
        now = self._decode(self._ids[self._from :])
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            self._raw += now[len(before) :]
            self._from, self._upto = self._upto, len(self._ids)
        place = find_stop(self._raw, self._stop)
        if place is not None:
            self._raw = self._raw[:place]
            self._ids = []
            return True
        self._sure = len(self._raw) - possible_stop_prefix(self._raw, self._stop)
        return False

    def finish(self) -> None:
        """Mark the answer as complete: text that was held back becomes available."""
        rest = self._decode(self._ids[self._from :]) if self._ids else ""
        self._raw += rest[len(self._decode(self._ids[self._from : self._upto])) :]
        place = find_stop(self._raw, self._stop)
        self._raw = self._raw[:place].rstrip()
        self._sure, self._ids = len(self._raw), []

    def take(self) -> str:
        """Return the final text since the last call."""
        text = self.text
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece

    @property
    def text(self) -> str:
        """All final text so far."""
        return self._raw[: self._sure].strip()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
