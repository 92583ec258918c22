"""Pieces of a prompt, and their encoding as tokens.

With byte-level tokenizers, every piece is encoded separately. SentencePiece-style tokenizers (Llama 2, Mistral) put a
space marker before every text, so that separately encoded pieces would get markers that the whole text does not have.
For them, adjacent pieces are encoded together, and the result equals the tokenizer's own on the whole text.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmphi.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEMBERED, MOST_REMEMBERED = 200, 50_000  # Longest cached text in characters, and largest number of cached texts.
MARKER = "\u2581"  # SentencePiece's marker of a space.

# Encoding sets a fast tokenizer's `split_special_tokens`, an attribute that all threads share, so it needs exclusive
# access until the text is encoded.
_ENCODING = threading.Lock()
_BACKENDS: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class PromptPart:
    """A part of an encoded prompt.

    Attributes:
        ids: Token ids; empty for features without tokens.
        supervised: Whether these tokens are training targets.
        span: Kind of the features at this place (``image`` or ``audio``); empty for tokens.
        spelled: Whether the features replace the tokens ``ids`` one by one: words of a transcript.
    """

    ids: tuple[int, ...] = ()
    supervised: bool = False
    span: str = ""
    spelled: bool = False


@dataclass(frozen=True)
class PromptPiece:
    """A part of a prompt before encoding: a text and the token ids after it, or a place of features.

    Attributes:
        text: Text; names of special tokens in it are encoded as text, unless ``template``.
        ids: Token ids that follow the text.
        supervised: Whether the tokens are training targets.
        span: Kind of the features at this place; such a piece has neither text nor ids.
        template: Whether the text comes from a chat template: names of special tokens in it are special tokens.
        words: Character ranges (start, end) of the text that are words of a transcript.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    supervised: bool = False
    span: str = ""
    template: bool = False
    words: tuple[tuple[int, int], ...] = ()


class PromptEncoder:
    """Encodes the pieces of prompts.

    Args:
        tokenizer: Tokenizer of the language model.

    Attributes:
        joins: Whether adjacent pieces are encoded together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Cache of frequent texts: questions, short answers and template texts; the flag is `PromptPiece.template`.
        self._known: dict[tuple[str, bool], tuple[int, ...]] = {}
        self._texts: Any = _texts_backend(tokenizer) if tokenizer.is_fast else None
        self.joins = tokenizer.is_fast and self._names("x")[0].startswith(MARKER)
        if self.joins:
            self._special = {
                token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special
            }
            self._splitting = re.compile(
                "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)"
            )
            self._first: Any = self._texts
            self._later: Any = self._texts
            if self._marks_first_alone():
                rules = json.loads(tokenizer.backend_tokenizer.to_str())
                _without_marker(rules)
                self._later = _backend(rules)

    def parts(self, pieces: Sequence[PromptPiece], *, begun: bool = False) -> list[PromptPart]:
        """Return the encoded parts of a prompt, without empty ones.

        Args:
            pieces: Pieces in order.
            begun: Whether other text precedes them.

        Raises:
            ModelError: If there are words of a transcript, and the tokenizer has no offset mapping.
        """
        found = self._joined(pieces, begun) if self.joins else (part for piece in pieces for part in self._alone(piece))
        return [part for part in found if part.ids or part.span]

    def after(self, text: str, template: str) -> tuple[int, ...]:
        """Return the token ids of a template's text that follows another text."""
        if not self.joins:
            return tuple(number for part in self.parts([PromptPiece(template, template=True)]) for number in part.ids)
        pieces = [PromptPiece(text), PromptPiece(template, template=True)]
        first = sum(len(part.ids) for part in self.parts(pieces[:1]))
        return tuple(number for part in self.parts(pieces) for number in part.ids)[first:]

    def _alone(self, piece: PromptPiece) -> list[PromptPart]:
        if piece.span:
            return [PromptPart(span=piece.span)]
        if piece.words:
            return self._with_words(piece)
        ids = self._encoded(piece.text, piece.template)
        return [PromptPart((*ids, *piece.ids), piece.supervised)]

    def _encoded(self, text: str, template: bool) -> tuple[int, ...]:
        if not text:
            return ()
        if (known := self._known.get((text, template))) is not None:
            return known
        ids = self._ids(text, template)
        if len(text) <= REMEMBERED and len(self._known) < MOST_REMEMBERED:
            self._known[text, template] = ids
        return ids

    def _ids(self, text: str, template: bool) -> tuple[int, ...]:
        """Token ids of a text; calling the backend directly avoids transformers' overhead, half of the time."""
        if self._texts is not None and not template:
            return tuple(self._texts.encode(text, add_special_tokens=False).ids)
        with _ENCODING:
            return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not template)["input_ids"])

    def _with_words(self, piece: PromptPiece) -> list[PromptPart]:
        """Parts of a text that is encoded as a whole, so that its tokens do not depend on the transcript ranges."""
        if self._texts is None:
            raise ModelError("this tokenizer has no offset mapping", "use a fast tokenizer")
        encoded = self._texts.encode(piece.text, add_special_tokens=False)
        ids, offsets = tuple(encoded.ids), encoded.offsets
        parts, done = [], 0
        for start, end in piece.words:
            inside = [i for i, (a, b) in enumerate(offsets) if i >= done and a < end and start < b]
            after = next((i for i, (a, _) in enumerate(offsets) if i >= done and a >= start), len(ids))
            first, last = (inside[0], inside[-1] + 1) if inside else (after, after)
            parts += [PromptPart(ids[done:first]), PromptPart(ids[first:last], span="audio", spelled=True)]
            done = last
        return [*parts, PromptPart((*ids[done:], *piece.ids))]

    def _joined(self, pieces: Sequence[PromptPiece], begun: bool) -> Iterator[PromptPart]:
        """Parts of pieces; texts between special tokens and features are encoded together."""
        run: list[PromptPiece] = []
        strips = False  # Whether the last special token strips the white space after it.
        for piece in pieces:
            if piece.span:
                yield from self._run(run, begun)
                yield PromptPart(span=piece.span)
                run, begun, strips = [], True, False
                continue
            for text, token in self._split(piece) if piece.template else [(piece.text, None)]:
                left = text.lstrip() if strips and not piece.words else text
                strips = strips and not left
                run.append(replace(piece, text=left, ids=() if piece.template else piece.ids))
                if token is not None:
                    yield from self._run(self._ended(run, token), begun)
                    yield PromptPart((token,), piece.supervised)
                    run, begun, strips = [], True, self._takes_space(token)
            if piece.ids:
                if piece.template:
                    run.append(PromptPiece(ids=piece.ids, supervised=piece.supervised))
                yield from self._run(self._ended(run, piece.ids[0]), begun)
                strips = self._takes_space(piece.ids[-1])
                # Text directly after the begin-of-sequence token is encoded as the first text; later text is not.
                run, begun = [], begun or bool(run[0].text) or piece.ids != (self.tokenizer.bos_token_id,)
        yield from self._run(run, begun)

    def _takes_space(self, number: int) -> bool:
        token = self.tokenizer.added_tokens_decoder.get(number)
        return token is not None and bool(token.rstrip)

    def _ended(self, run: list[PromptPiece], number: int) -> list[PromptPiece]:
        """Pieces before a special token, without the white space that the token strips."""
        token = self.tokenizer.added_tokens_decoder.get(number)
        if token is None or not token.lstrip:
            return run
        kept = list(run)
        for place in range(len(kept) - 1, -1, -1):
            kept[place] = replace(kept[place], text=kept[place].text.rstrip())
            if kept[place].text:
                break
        return kept

    def _split(self, piece: PromptPiece) -> Iterator[tuple[str, int | None]]:
        """Texts, each with the special token that follows it; ``None`` after the last one."""
        done = 0
        for found in self._splitting.finditer(piece.text):
            yield piece.text[done : found.start()], self._special[found.group()]
            done = found.end()
        yield piece.text[done:], None

    def _run(self, run: Sequence[PromptPiece], begun: bool) -> Iterator[PromptPart]:
        """Parts of pieces that are encoded together; a token belongs to the piece of its last character.

        A token that overlaps a word of a transcript belongs to that word.
        """
        text = "".join(piece.text for piece in run)
        encoded = (self._later if begun else self._first).encode(text, add_special_tokens=False) if text else None
        tokens = list(zip(encoded.ids, encoded.offsets, strict=True)) if encoded is not None else []
        start, done = 0, 0
        for piece in run:
            for first, last in piece.words:
                typed, done = _until(tokens, done, start + first, inside=False)
                yield PromptPart(typed, piece.supervised)
                ids, done = _until(tokens, done, start + last, inside=True)
                yield PromptPart(ids, span="audio", spelled=True)
            start += len(piece.text)
            rest, done = _until(tokens, done, start, inside=False)
            yield PromptPart((*rest, *piece.ids), piece.supervised)

    def _names(self, text: str) -> list[str]:
        with _ENCODING:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [str(name) for name in self.tokenizer.convert_ids_to_tokens(ids)] or [""]

    def _marks_first_alone(self) -> bool:
        """Whether a text after a special token gets no marker."""
        end = str(self.tokenizer.eos_token)
        return self._names(f"{end}x")[1:] != self._names("x")


def _until(
    tokens: Sequence[tuple[int, tuple[int, int]]], done: int, end: int, *, inside: bool
) -> tuple[tuple[int, ...], int]:
    """Tokens from ``done`` on that end at or before character ``end``; with ``inside``, that begin before it."""
    last = done
    while last < len(tokens) and (tokens[last][1][0] < end if inside else tokens[last][1][1] <= end):
        last += 1
    return tuple(number for number, _ in tokens[done:last]), last


def _texts_backend(tokenizer: Any) -> Any:
    """Backend that encodes special tokens as text; cached per tokenizer, because it takes some 0.3 s to create."""
    size, made = _BACKENDS.get(tokenizer, (0, None))
    if made is None or size != len(tokenizer):
        made = _backend(json.loads(tokenizer.backend_tokenizer.to_str()))
        _BACKENDS[tokenizer] = len(tokenizer), made
    return made


def _backend(rules: dict[str, Any]) -> Any:
    """New backend that encodes special tokens as text."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(json.dumps(rules))
    made.encode_special_tokens = True
    made.no_truncation()
    made.no_padding()
    return made


def _without_marker(rules: Any) -> None:
    """Change a tokenizer's rules in place, so that no space marker is put before a text."""
    if isinstance(rules, dict):
        if rules.get("type") == "Metaspace":
            rules["prepend_scheme"] = "never"
        for value in rules.values():
            _without_marker(value)
    elif isinstance(rules, list):
        for value in rules:
            _without_marker(value)
