"""How a conversation is written for a language model: what is given, what is to be learned, where images stand.

Three styles: ``plain`` (question and answer on lines of their own, for base models and models trained here), ``phi``
(Phi-2's ``Instruct:`` and ``Output:``) and ``chat`` (the chat template the tokenizer brings). Every answer ends with
the end-of-sequence token, or with the end of turn of the chat template, so that the model learns to stop.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from mmphi.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["plain", "phi", "chat"]
REMEMBERED, MOST_REMEMBERED = 200, 50_000  # Letters of a text whose tokens are remembered, and how many texts.
MARK, AUDIO_MARK = "<image>", "<audio>"
SYSTEM, IMAGE, QUESTION, ANSWER = "\x00system\x00", "\x00image\x00", "\x00question {}\x00", "\x00answer {}\x00"
# In a question, where an image and a recording stand; both are taken out of texts from outside.
SHOWN, AUDIO = "\x00shown\x00", "\x00audio\x00"

# A fast tokenizer's `split_special_tokens` is a setting of the object that all threads share: who encodes sets it, and
# must be alone until the text is encoded.
_ENCODING = threading.Lock()


@dataclass(frozen=True)
class Part:
    """A stretch of a prompt.

    Attributes:
        ids: Token ids; empty where features stand.
        supervised: Whether these tokens are what the model learns to say.
        span: Kind of the features that stand here (``image`` or ``audio``), empty for tokens.
        spelled: Whether the features stand for the tokens ``ids``, one for each: words that were heard.
    """

    ids: tuple[int, ...] = ()
    supervised: bool = False
    span: str = ""
    spelled: bool = False


def places(questions: Sequence[str], count: int, mark: str = MARK) -> bool:
    """Whether questions say where images (or recordings) stand: they hold the mark as often as there are any.

    Otherwise all of them stand before the first question, and the mark is text like any other.
    """
    return 0 < count == sum(question.count(mark) for question in questions)


def with_places(turns: Sequence[tuple[str, str | None]], images: int, audio: int) -> list[tuple[str, str | None]]:
    """Turns in which :data:`SHOWN` and :data:`AUDIO` stand for what ``<image>`` and ``<audio>`` stand for.

    Recordings that have no place stand before the first question, or as the first one.
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
    """Writes conversations in one style, with one tokenizer.

    Args:
        tokenizer: A tokenizer with an end-of-sequence token.
        style: ``auto`` takes ``chat`` where the tokenizer brings a template, ``phi`` for Phi-2's vocabulary, else
            ``plain``.

    Attributes:
        end: Token ids that end an answer.

    Raises:
        ModelError: If the tokenizer has no end-of-sequence token, or no chat template where ``chat`` is asked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: Style | Literal["auto"] = "auto") -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}  # Questions and short answers come again and again.
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token", "set eos_token in its tokenizer_config.json")
        if style == "auto":
            phi = tokenizer.convert_tokens_to_ids("<|endoftext|>") == 50256
            style = "chat" if tokenizer.chat_template else "phi" if phi else "plain"
        if style == "chat" and not tokenizer.chat_template:
            raise ModelError("language.prompt = chat, but the tokenizer brings no chat template", "use plain or phi")
        self.style: Style = style
        plain: tuple[tuple[int, ...], str] = (tokenizer.eos_token_id,), ""
        self.end, self._end_text = self._end_of_turn() if style == "chat" else plain

    def _end_of_turn(self) -> tuple[tuple[int, ...], str]:
        """What the chat template writes after an answer, up to its first control token: ids and text.

        Where it writes none, the tokenizer's end of sequence.
        """
        messages = [{"role": "user", "content": QUESTION.format(0)}, {"role": "assistant", "content": ANSWER.format(0)}]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        after = text.partition(ANSWER.format(0))[2]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        ids = self._encode_template(after)
        place = next((i for i, token in enumerate(ids) if token in special), None)
        if place is None:
            return (self.tokenizer.eos_token_id,), ""
        token = str(self.tokenizer.convert_ids_to_tokens(ids[place]))
        return ids[: place + 1], after[: after.index(token) + len(token)]

    @cached_property
    def _has_system_role(self) -> bool:
        """Whether the chat template writes a system message before everything else.

        Gemma's refuses it, others drop it, and Mistral's writes it into the newest question.
        """
        messages = [{"role": "system", "content": SYSTEM}]
        for number in range(2):
            messages.append({"role": "user", "content": QUESTION.format(number)})
            messages.append({"role": "assistant", "content": ANSWER.format(number)})
        try:
            text = str(self.tokenizer.apply_chat_template(messages[:-1], tokenize=False))
        except TemplateError:
            return False
        return SYSTEM in text.partition(QUESTION.format(0))[0]

    @property
    def digest(self) -> str:
        """Of style and tokenizer: equal digests write equal tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        special = [self.tokenizer.special_tokens_map, self.tokenizer.chat_template, self.style]
        return hashlib.sha256((rules + json.dumps(special, sort_keys=True, default=str)).encode()).hexdigest()

    def parts(
        self,
        turns: Sequence[tuple[str, str | None]],
        *,
        images: int = 0,
        context: str = "",
        audio: Sequence[str | None] = (),
        system: str = "",
    ) -> list[Part]:
        """The prompt of a conversation.

        Args:
            turns: Questions and answers; an answer of ``None`` (the last one only) is left for the model to give.
            images: How many images the conversation is about. They stand where the questions say ``<image>``, or after
                the first token where the questions do not say it as often as there are images.
            context: Text that stands where images would; used to teach a model to read from context.
            audio: For each recording what is said in it, where its words stand in the prompt, else ``None``. They stand
                where the questions say ``<audio>``, before the first question where those do not say it as often, or
                in place of a first question that is empty.
            system: What the model shall be, before everything else.

        Returns:
            Parts in order; supervised parts are an answer and its end-of-sequence token. The tokens of words that were
            heard are those of the same words typed in their place.
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
    ) -> list[Part]:
        """The prompt of a conversation that says where everything stands.

        Args:
            turns: Questions and answers, as of :meth:`parts`. In questions :data:`SHOWN` and :data:`AUDIO` stand for
                images and recordings; ``<image>`` and ``<audio>`` are text like any other.
            leading: Images that stand before everything else.
            context: As of :meth:`parts`.
            audio: As of :meth:`parts`, one for every :data:`AUDIO`.
            system: As of :meth:`parts`.
        """
        write = self._chat if self.style == "chat" else self._lines
        return write(turns, leading, context, iter(audio), system)

    def _lines(
        self,
        turns: Sequence[tuple[str, str | None]],
        leading: int,
        context: str,
        audio: Iterator[str | None],
        system: str,
    ) -> list[Part]:
        bos = self.tokenizer.bos_token_id
        parts = [Part(() if bos is None else (bos,)), *[Part(self._encode(system))] * bool(system)]
        parts += [Part(span="image")] * leading
        if context:
            parts.append(Part(self._encode(context)))
        for number, (question, answer) in enumerate(turns):
            first = not number and not context and not system
            parts += self._asked("" if first and not leading else "\n", question, audio)
            at_once = first and not question  # A caption follows its image, with nothing between them.
            if self.style == "plain" and not at_once:
                parts.append(Part(self._encode("\n")))
            if answer is not None:
                gap = "" if at_once or self.style == "plain" else " " if question else "\n"
                parts.append(Part((*self._encode(gap + answer), self.tokenizer.eos_token_id), supervised=True))
        return parts

    def _asked(self, before: str, question: str, audio: Iterator[str | None]) -> list[Part]:
        """A question on its line; nothing where there is none."""
        if not question:
            return []
        line = f"Instruct: {question}\nOutput:" if self.style == "phi" else question
        return self._question(before + line, audio)

    def _chat(
        self,
        turns: Sequence[tuple[str, str | None]],
        leading: int,
        context: str,
        audio: Iterator[str | None],
        system: str,
    ) -> list[Part]:
        """Render the template around markers, then put each text in its marker's place.

        Texts are never rendered by the template themselves, so what they say cannot be taken for its control tokens.
        Where the template has no system role, the system text begins the first question.
        """
        messages = [{"role": "system", "content": SYSTEM}] if system and self._has_system_role else []
        for i, (question, answer) in enumerate(turns):
            first = [SYSTEM] if not i and system and not messages else []
            first += [IMAGE] if i == 0 and (leading or context) else []
            first += [QUESTION.format(i)] if question else []
            messages.append({"role": "user", "content": "\n".join(first)})
            if answer is not None:
                messages.append({"role": "assistant", "content": ANSWER.format(i)})
        open_end = turns[-1][1] is None
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_end))
        places: list[tuple[str, list[Part]]] = [(SYSTEM, [Part(self._encode(system))])] if system else []
        if leading or context:
            places.append((IMAGE, [Part(span="image")] * leading or [Part(self._encode(context))]))
        for i, (question, answer) in enumerate(turns):
            if question:
                places.append((QUESTION.format(i), self._question(question, audio)))
            if answer is not None:
                ids = (*self._encode(answer), *self.end)
                places.append((ANSWER.format(i), [Part(ids, supervised=True)]))
        parts = []
        for marker, inner in places:
            before, there, text = text.partition(marker)
            if not there:
                raise ModelError("the chat template rewrites messages, so that the image cannot be placed", "use plain")
            parts += [Part(self._encode_template(before)), *inner]
            if inner[-1].supervised:
                text = text.removeprefix(self._end_text)
        if open_end:
            parts.append(Part(self._encode_template(text)))
        return [part for part in parts if part.ids or part.span]

    def _question(self, text: str, audio: Iterator[str | None]) -> list[Part]:
        """A question as parts, its images and recordings between its texts where it says where they stand."""
        parts: list[Part] = []
        for number, piece in enumerate(text.split(SHOWN)):
            parts += [Part(span="image")] * bool(number)
            typed, words = "", list[tuple[int, int]]()
            for count, between in enumerate(piece.split(AUDIO)):
                said = next(audio) if count else ""
                if said is None:
                    parts += [*self._typed(typed, words), Part(span="audio")]
                    typed, words = "", []
                elif count:
                    words.append((len(typed), len(typed) + len(said)))
                typed += (said or "") + between
            parts += self._typed(typed, words)
        return parts

    def _typed(self, text: str, words: Sequence[tuple[int, int]]) -> list[Part]:
        """A text as parts, of which those that hold words (from, to) that were heard are spans.

        The text is encoded as a whole, so that its tokens do not depend on what of it was heard.
        """
        if not words:
            return [Part(self._encode(text))] * bool(text)
        if not self.tokenizer.is_fast:
            raise ModelError("this tokenizer does not say which letters a token is of", "use one that is fast")
        with _ENCODING:
            encoded = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
        ids, letters = tuple(encoded["input_ids"]), encoded["offset_mapping"]
        parts, done = [], 0
        for start, end in words:
            inside = [i for i, (a, b) in enumerate(letters) if i >= done and a < end and start < b]
            after = next((i for i, (a, _) in enumerate(letters) if i >= done and a >= start), len(ids))
            first, last = (inside[0], inside[-1] + 1) if inside else (after, after)
            parts += [Part(ids[done:first]), Part(ids[first:last], span="audio", spelled=True)]
            done = last
        return [part for part in [*parts, Part(ids[done:])] if part.ids or part.span]

    def _encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text from outside: special tokens spelled in it stay plain text."""
        if (known := self._known.get(text)) is not None:
            return known
        with _ENCODING:
            ids = tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        if len(text) <= REMEMBERED and len(self._known) < MOST_REMEMBERED:
            self._known[text] = ids
        return ids

    def _encode_template(self, text: str) -> tuple[int, ...]:
        with _ENCODING:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
