"""Tokens as text, given out as soon as it is sure."""

from __future__ import annotations

from typing import Any

from mmphi.generation.sampling import find_stop, possible_stop_prefix

UNFINISHED = "�"  # What a tokenizer writes for half a letter.


class IncrementalDetokenizer:
    """The text of an answer while its tokens come.

    A letter may be several tokens, and a text to stop at several pieces: neither is given out by halves. Space around
    the answer is none of it.

    Args:
        tokenizer: Of the language model.
        stop: Texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._from = self._upto = 0
        self._raw, self._sure, self._given = "", 0, 0

    def add(self, token: int) -> bool:
        """Take the next token; whether the answer came to a text to stop at."""
        self._ids.append(token)
        # From a few tokens before on, because how a token is written may depend on the one before it.
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
        """No more tokens come: what was held back is given out."""
        rest = self._decode(self._ids[self._from :]) if self._ids else ""
        self._raw += rest[len(self._decode(self._ids[self._from : self._upto])) :]
        place = find_stop(self._raw, self._stop)
        self._raw = self._raw[:place].rstrip()
        self._sure, self._ids = len(self._raw), []

    def take(self) -> str:
        """What is sure and was not given out yet."""
        text = self.text
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece

    @property
    def text(self) -> str:
        """All that is sure."""
        return self._raw[: self._sure].strip()

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
