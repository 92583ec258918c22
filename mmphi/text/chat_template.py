"""A tokenizer's chat template: the text that it adds before and after each message.

Some templates write more before an answer of the history than in their generation prompt (Qwen3 adds an empty thinking
block to the last answer). Others write less (DeepSeek-R1's generation prompt opens a thinking block, which the history
drops). Training on the one and inference with the other would differ. Here every answer follows the generation prompt:
in training, in the history and at inference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from mmphi.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, IMAGE, QUESTION, ANSWER = "\x00system\x00", "\x00image\x00", "\x00question {}\x00", "\x00answer {}\x00"
# Fixed date for templates that write the current date: a prompt must not change from day to day. Llama 3.2's template
# uses this date if it is given no clock.
TODAY = datetime(2024, 7, 26)
CLOCK = "strftime_now"
DIRECTIVES = [f"%{letter}" for letter in "aAbBdHIjmMpSUwWyY"] + ["%-d", "%-m", "%-H", "%-I"]
# Template options that disable thinking: of Qwen3, SmolLM3 and others; of DeepSeek-V3.1.
WITHOUT_THOUGHTS = ("enable_thinking", "thinking")


class ChatTemplate:
    """Renders conversations of markers with a tokenizer's chat template.

    Args:
        tokenizer: Tokenizer with a chat template.

    Attributes:
        source: Rendered template: the tokenizer's, with a fixed date if it writes the current date.
        options: Variables given to the template in addition to the messages.
        asking: Generation prompt: text between a question and its answer.
        replaced: Other texts that the template writes there in the history, longest first; empty if there are none.

    Raises:
        ModelError: If the template does not write a question and its answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        own = str(tokenizer.get_chat_template())
        self.dated = CLOCK in own
        self.source = _clock() + own if self.dated else own
        self.options: dict[str, bool] = {}
        self.asking, last = self._before_answers()
        if last != self.asking:
            for name in WITHOUT_THOUGHTS:
                if re.search(rf"\b{name}\b", own):
                    self.options = {name: False}
                    self.asking, last = self._before_answers()
                    break
        self.silent = self.asking  # The template's own generation prompt.
        if last.removeprefix(self.asking).strip() and not self._asks():
            self.asking = last.rstrip(" ")  # No generation prompt: the text before an answer replaces it.
        self.replaced = tuple(sorted({last, self._before_earlier_answers()} - {self.asking}, key=len, reverse=True))

    def render(self, messages: Sequence[Mapping[str, str]], *, asking: bool = False) -> str:
        """Render messages with the template.

        Args:
            messages: Messages whose texts should be markers.
            asking: Whether the generation prompt is added at the end.
        """
        return str(
            self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=asking,
                **self.options,
            )
        )

    @property
    def changes(self) -> list[object]:
        """Deviations from the tokenizer's template, for digests; empty for most templates."""
        changed = self.options or self.replaced or self.dated or self.asking != self.silent
        return [self.options, self.asking, self.replaced, self.dated and TODAY.isoformat()] if changed else []

    def at_the_end(self, text: str) -> str:
        """Return the text after the last question, with the generation prompt.

        Args:
            text: Text that the template writes there.
        """
        return text if self.asking == self.silent else text.removesuffix(self.silent) + self.asking

    def before_answer(self, text: str) -> tuple[str, str]:
        """Return the text before an answer of the history.

        Args:
            text: Text that the template writes there.

        Returns:
            The text used in training and at inference, and white space that belongs to the answer's beginning.

        Raises:
            ModelError: If the template writes a text there that it does not write in short conversations.
        """
        for other in self.replaced:
            if text.endswith(other):
                more = other.removeprefix(self.asking)
                gap = more if other.startswith(self.asking) and more.isspace() else ""
                return text.removesuffix(other) + self.asking, gap
        if self.replaced and not text.endswith(self.asking):
            raise ModelError(
                f"before an answer the chat template writes {text[-80:]!r}, and {self.asking!r} to ask for one",
                "set language.prompt to plain or phi",
            )
        return text, ""

    def after_answer(self, special: Callable[[str], tuple[str, ...]]) -> str:
        """Return the text after an answer, up to and including the first special token; empty if there is none.

        Args:
            special: Function that returns the special tokens in a text, in order.
        """
        text = self.render([_user(0), _assistant(0)])
        after = text.partition(ANSWER.format(0))[2]
        tokens = special(after)
        return after[: after.index(tokens[0]) + len(tokens[0])] if tokens else ""

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template writes a system message before the first question.

        Gemma's template refuses system messages, others drop them, and Mistral's writes them into the newest question.
        """
        messages = [{"role": "system", "content": SYSTEM}, _user(0), _assistant(0), _user(1)]
        try:
            text = self.render(messages)
        except TemplateError:
            return False
        return SYSTEM in text.partition(QUESTION.format(0))[0]

    @property
    def fixed(self) -> str:
        """Template for export, with the options and the text before answers that this class uses.

        Raises:
            ModelError: If the template has no generation prompt.
        """
        if self.asking != self.silent:
            raise ModelError("the chat template does not ask for answers, so that it cannot be exported", "use plain")
        text = "".join(f"{{%- set {name} = {str(value).lower()} -%}}" for name, value in self.options.items())
        text += self.source
        # Additional white space is part of the answer, and the template writes it anyway.
        others = [other for other in self.replaced if other.removeprefix(self.asking).strip()]
        if not others:
            return text
        longer = [other for other in others if self.asking not in other]  # Otherwise it would be lengthened twice.
        filters = "".join(f" | replace({json.dumps(self.asking)}, {json.dumps(other)})" for other in longer)
        filters += "".join(f" | replace({json.dumps(other)}, {json.dumps(self.asking)})" for other in others)
        return f"{{%- set written -%}}{text}{{%- endset -%}}{{{{- written{filters} -}}}}"

    def _before_answers(self) -> tuple[str, str]:
        """Text between a question and its answer: in the generation prompt, and in the history."""
        question, answer = QUESTION.format(0), ANSWER.format(0)
        asking = self.render([_user(0)], asking=True).partition(question)
        history = self.render([_user(0), _assistant(0)]).partition(question)
        between, found, _ = history[2].partition(answer)
        if not asking[1] or not found:
            raise ModelError(
                "the chat template does not write a question and its answer", "set language.prompt to plain"
            )
        return asking[2], between

    def _asks(self) -> bool:
        """Whether the template has a generation prompt."""
        return self.render([_user(0)], asking=True) != self.render([_user(0)])

    def _before_earlier_answers(self) -> str:
        """Text between a question and its answer in the history, if another question follows."""
        try:
            text = self.render([_user(0), _assistant(0), _user(1)])
        except TemplateError:
            return self.asking
        between, found, _ = text.partition(QUESTION.format(0))[2].partition(ANSWER.format(0))
        return between if found else self.asking


def _clock() -> str:
    """Jinja macro of a clock that always returns :data:`TODAY`."""
    filters = "".join(f" | replace({each!r}, {TODAY.strftime(each)!r})" for each in DIRECTIVES)
    return f"{{%- macro {CLOCK}(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro -%}}"


def _user(number: int) -> dict[str, str]:
    return {"role": "user", "content": QUESTION.format(number)}


def _assistant(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": ANSWER.format(number)}
