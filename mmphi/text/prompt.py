"""Prompt format of conversations: context, supervised answers, and the places of images and recordings.

Three styles: ``plain`` (question and answer on separate lines, for base models and models trained here), ``phi``
(Phi-2's ``Instruct:`` and ``Output:``) and ``chat`` (the tokenizer's chat template). Every answer ends with the
end-of-sequence token, or with the chat template's end of turn, so that the model learns to stop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mmphi.errors import ModelError
from mmphi.text.chat_template import ANSWER, IMAGE, QUESTION, SYSTEM, ChatTemplate
from mmphi.text.pieces import PromptEncoder, PromptPart, PromptPiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["plain", "phi", "chat"]
MARK, AUDIO_MARK = "<image>", "<audio>"
# Internal marks of images and recordings in a question; they are removed from user texts.
SHOWN, AUDIO = "\x00shown\x00", "\x00audio\x00"


def places(questions: Sequence[str], count: int, mark: str = MARK) -> bool:
    """Return whether questions contain one mark for each image (or recording).

    Otherwise all images precede the first question, and marks are ordinary text.
    """
    return 0 < count == sum(question.count(mark) for question in questions)


def with_places(turns: Sequence[tuple[str, str | None]], images: int, audio: int) -> list[tuple[str, str | None]]:
    """Return turns with ``<image>`` and ``<audio>`` marks replaced by :data:`SHOWN` and :data:`AUDIO`.

    Recordings without marks are put before the first question, or in place of an empty one.
    """
    turns = [(question.replace(SHOWN, "").replace(AUDIO, ""), answer) for question, answer in turns]
    questions = [question for question, _ in turns]
    if places(questions, images):
        turns = [(question.replace(MARK, SHOWN), answer) for question, answer in turns]
    if places(questions, audio, AUDIO_MARK):
        return [(question.replace(AUDIO_MARK, AUDIO), answer) for question, answer in turns]
    (first, answer), *rest = turns
    return [(AUDIO * audio + ("\n" if audio and first else "") + first, answer), *rest]


class Prompt:
    """Formats and encodes conversations in one style, with one tokenizer.

    Args:
        tokenizer: A tokenizer with an end-of-sequence token.
        style: Prompt style; ``auto`` takes ``chat`` if the tokenizer has a chat template, ``phi`` for Phi-2's
            vocabulary, otherwise ``plain``.

    Attributes:
        end: Token ids that end an answer.
        template: The tokenizer's chat template in the style ``chat``, otherwise ``None``.

    Raises:
        ModelError: If the tokenizer has no end-of-sequence token, or no chat template for the style ``chat``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: Style | Literal["auto"] = "auto") -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token", "set eos_token in its tokenizer_config.json")
        if style == "auto":
            phi = tokenizer.convert_tokens_to_ids("<|endoftext|>") == 50256
            style = "chat" if tokenizer.chat_template else "phi" if phi else "plain"
        if style == "chat" and not tokenizer.chat_template:
            raise ModelError("language.prompt = chat, but the tokenizer brings no chat template", "use plain or phi")
        self.style: Style = style
        self.encoder = PromptEncoder(tokenizer)
        self.template = ChatTemplate(tokenizer) if style == "chat" else None
        self.end, self._end_text = self._end_of_turn()

    def _end_of_turn(self) -> tuple[tuple[int, ...], str]:
        """Ids and text after an answer: the chat template's up to its first special token, else end of sequence."""
        text = "" if self.template is None else self.template.after_answer(self._special_tokens)
        if not text:
            return (self.tokenizer.eos_token_id,), ""
        return self.encoder.after("x", text), text

    def _special_tokens(self, text: str) -> tuple[str, ...]:
        """Special tokens in a template's text, in order."""
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        ids = [number for part in self.encoder.parts([PromptPiece(text, template=True)]) for number in part.ids]
        return tuple(str(self.tokenizer.convert_ids_to_tokens(number)) for number in ids if number in special)

    @property
    def digest(self) -> str:
        """Digest of style and tokenizer: equal digests give equal tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        special = [self.tokenizer.special_tokens_map, self.tokenizer.chat_template, self.style]
        special += self.template.changes if self.template is not None else []
        special += ["joined"] if self.encoder.joins else []
        return hashlib.sha256((rules + json.dumps(special, sort_keys=True, default=str)).encode()).hexdigest()

    def parts(
        self,
        turns: Sequence[tuple[str, str | None]],
        *,
        images: int = 0,
        context: str = "",
        audio: Sequence[str | None] = (),
        system: str = "",
    ) -> list[PromptPart]:
        """Return the encoded prompt of a conversation.

        Args:
            turns: Questions and answers; ``None`` as the last answer is left for the model to generate.
            images: Number of images. Images are placed at the ``<image>`` marks of the questions, or before the first
                question if the number of marks differs.
            context: Text in place of images; used to train a model to read from context.
            audio: For each recording its transcript, if its words are part of the prompt, otherwise ``None``.
                Recordings are placed at the ``<audio>`` marks of the questions; if the number of marks differs, before
                the first question or in place of an empty one.
            system: System text, before everything else.

        Returns:
            Parts in order; supervised parts are an answer and its end-of-sequence token. The tokens of a transcript's
            words are those of the same words typed in their place.
        """
        turns = with_places(turns, images, len(audio))
        leading = 0 if any(SHOWN in question for question, _ in turns) else images
        return self.placed_parts(turns, leading=leading, context=context, audio=audio, system=system)

    def placed_parts(
        self,
        turns: Sequence[tuple[str, str | None]],
        *,
        leading: int = 0,
        context: str = "",
        audio: Sequence[str | None] = (),
        system: str = "",
    ) -> list[PromptPart]:
        """Return the encoded prompt of a conversation with internal marks.

        Args:
            turns: Questions and answers, as in :meth:`parts`. :data:`SHOWN` and :data:`AUDIO` in questions mark images
                and recordings; ``<image>`` and ``<audio>`` are ordinary text.
            leading: Number of images before the first question.
            context: As in :meth:`parts`.
            audio: As in :meth:`parts`, one for every :data:`AUDIO`.
            system: As in :meth:`parts`.
        """
        write = self._lines if self.template is None else self._chat
        return self.encoder.parts(list(write(turns, leading, context, iter(audio), system)))

    def _lines(
        self,
        turns: Sequence[tuple[str, str | None]],
        leading: int,
        context: str,
        audio: Iterator[str | None],
        system: str,
    ) -> Iterator[PromptPiece]:
        bos = self.tokenizer.bos_token_id
        yield PromptPiece(ids=() if bos is None else (bos,))
        yield PromptPiece(system)
        yield from [PromptPiece(span="image")] * leading
        yield PromptPiece(context)
        for number, (question, answer) in enumerate(turns):
            first = not number and not context and not system
            yield from self._question_pieces("" if first and not leading else "\n", question, audio)
            at_once = first and not question  # A caption directly follows its image.
            if self.style == "plain" and not at_once:
                yield PromptPiece("\n")
            if answer is not None:
                gap = "" if at_once or self.style == "plain" else " " if question else "\n"
                yield PromptPiece(gap + answer, (self.tokenizer.eos_token_id,), supervised=True)

    def _answer(self, answer: str) -> PromptPiece:
        """An answer with the chat template's end of turn."""
        if not self.encoder.joins:
            return PromptPiece(answer, self.end, supervised=True)
        token = str(self.tokenizer.convert_ids_to_tokens(self.end[-1]))
        return PromptPiece(answer + self._end_text.removesuffix(token), self.end[-1:], supervised=True)

    def _question_pieces(self, before: str, question: str, audio: Iterator[str | None]) -> list[PromptPiece]:
        """Pieces of a question on its line; none for an empty question."""
        if not question:
            return []
        line = f"Instruct: {question}\nOutput:" if self.style == "phi" else question
        return question_pieces(before + line, audio)

    def _chat(
        self,
        turns: Sequence[tuple[str, str | None]],
        leading: int,
        context: str,
        audio: Iterator[str | None],
        system: str,
    ) -> Iterator[PromptPiece]:
        """Render the template around markers, then replace each marker by its text.

        Texts are never rendered by the template, so their content cannot be parsed as control tokens. If the template
        has no system role, the system text is put before the first question.
        """
        template = self.template
        assert template is not None
        messages = [{"role": "system", "content": SYSTEM}] if system and template.has_system_role else []
        for i, (question, answer) in enumerate(turns):
            first = [SYSTEM] if not i and system and not messages else []
            first += [IMAGE] if i == 0 and (leading or context) else []
            first += [QUESTION.format(i)] if question else []
            messages.append({"role": "user", "content": "\n".join(first)})
            if answer is not None:
                messages.append({"role": "assistant", "content": ANSWER.format(i)})
        open_end = turns[-1][1] is None
        text = template.render(messages, asking=open_end)
        places: list[tuple[str, list[PromptPiece]]] = [(SYSTEM, [PromptPiece(system)])] if system else []
        if leading or context:
            places.append((IMAGE, [PromptPiece(span="image")] * leading or [PromptPiece(context)]))
        for i, (question, answer) in enumerate(turns):
            if question:
                places.append((QUESTION.format(i), question_pieces(question, audio)))
            if answer is not None:
                places.append((ANSWER.format(i), [self._answer(answer)]))
        for marker, inner in places:
            before, there, text = text.partition(marker)
            if not there:
                raise ModelError("the chat template rewrites messages, so that the image cannot be placed", "use plain")
            if inner[-1].supervised:
                before, gap = template.before_answer(before)
                inner = [replace(inner[-1], text=gap + inner[-1].text)]
                text = text.removeprefix(self._end_text)
            yield PromptPiece(before, template=True)
            yield from inner
        if open_end:
            yield PromptPiece(template.at_the_end(text), template=True)


def question_pieces(text: str, audio: Iterator[str | None]) -> list[PromptPiece]:
    """Split a question into pieces of text, images and recordings.

    Args:
        text: Question with :data:`SHOWN` and :data:`AUDIO` marks.
        audio: As in :meth:`Prompt.parts`.
    """
    pieces: list[PromptPiece] = []
    for number, section in enumerate(text.split(SHOWN)):
        pieces += [PromptPiece(span="image")] * bool(number)
        typed, words = "", list[tuple[int, int]]()
        for count, between in enumerate(section.split(AUDIO)):
            transcript = next(audio) if count else ""
            if transcript is None:
                pieces += [PromptPiece(typed, words=tuple(words)), PromptPiece(span="audio")]
                typed, words = "", []
            elif count:
                words.append((len(typed), len(typed) + len(transcript)))
            typed += (transcript or "") + between
        pieces.append(PromptPiece(typed, words=tuple(words)))
    return pieces
