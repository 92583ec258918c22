"""A tokenizer's chat template: what it writes before and after every text of a conversation.

Some templates write more before an answer of the history than they write to ask for one (Qwen3 adds an empty block of
thoughts to the last answer). Others write less (DeepSeek-R1's opens a block of thoughts to ask for an answer, and drops
it from the history). A model that is trained on the one and asked with the other is asked what it was not trained on.
Here an answer always follows what the template writes to ask for one, in training, in the history and at inference.
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
# What some templates write as today's date: a prompt must not change from day to day. Llama 3.2's template has it where
# no clock is given.
TODAY = datetime(2024, 7, 26)
CLOCK = "strftime_now"
DIRECTIVES = [f"%{letter}" for letter in "aAbBdHIjmMpSUwWyY"] + ["%-d", "%-m", "%-H", "%-I"]
# What turns thoughts off where a template knows it: Qwen3, SmolLM3 and others; DeepSeek-V3.1.
WITHOUT_THOUGHTS = ("enable_thinking", "thinking")


class ChatTemplate:
    """Renders conversations of markers.

    Args:
        tokenizer: With a chat template.

    Attributes:
        source: What is rendered: the tokenizer's template, with a fixed date where it writes today's.
        options: What the template is given besides messages.
        asking: What it writes after a question to ask for an answer.
        replaced: What it writes there in the history instead; empty where that is the same.

    Raises:
        ModelError: If it does not write a question and its answer.
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
        self.silent = self.asking  # What it writes by itself where an answer is asked for.
        if last.removeprefix(self.asking).strip() and not self._asks():
            self.asking = last.rstrip(" ")  # It does not know how to ask: what it writes before an answer asks.
        self.replaced = tuple(sorted({last, self._before_earlier_answers()} - {self.asking}, key=len, reverse=True))

    def render(self, messages: Sequence[Mapping[str, str]], *, asking: bool = False) -> str:
        """What the template writes.

        Args:
            messages: Their texts should be markers.
            asking: Whether an answer is asked for at the end.
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
        """What is not as the template has it by itself, for digests; empty for most templates."""
        changed = self.options or self.replaced or self.dated or self.asking != self.silent
        return [self.options, self.asking, self.replaced, self.dated and TODAY.isoformat()] if changed else []

    def at_the_end(self, text: str) -> str:
        """What stands after the last question, to ask for its answer.

        Args:
            text: As the template has it.
        """
        return text if self.asking == self.silent else text.removesuffix(self.silent) + self.asking

    def before_answer(self, text: str) -> tuple[str, str]:
        """What stands before an answer of the history.

        Args:
            text: As the template has it.

        Returns:
            What stands there in training and at inference, and white space that begins the answer.

        Raises:
            ModelError: If the template writes something else there than in a conversation of one question.
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
        """What it writes after an answer, up to the first special token; empty where it writes none.

        Args:
            special: The special tokens in a text, in order.
        """
        text = self.render([_user(0), _assistant(0)])
        after = text.partition(ANSWER.format(0))[2]
        tokens = special(after)
        return after[: after.index(tokens[0]) + len(tokens[0])] if tokens else ""

    @cached_property
    def has_system_role(self) -> bool:
        """Whether it writes a system message before everything else.

        Gemma's refuses it, others drop it, and Mistral's writes it into the newest question.
        """
        messages = [{"role": "system", "content": SYSTEM}, _user(0), _assistant(0), _user(1)]
        try:
            text = self.render(messages)
        except TemplateError:
            return False
        return SYSTEM in text.partition(QUESTION.format(0))[0]

    @property
    def fixed(self) -> str:
        """The template as it is used here, for whatever else renders it: its options, the same before all answers.

        Raises:
            ModelError: If it does not ask for answers.
        """
        if self.asking != self.silent:
            raise ModelError("the chat template does not ask for answers, so that it cannot be exported", "use plain")
        text = "".join(f"{{%- set {name} = {str(value).lower()} -%}}" for name, value in self.options.items())
        text += self.source
        # White space more is part of the answer, and written by the template anyway.
        others = [other for other in self.replaced if other.removeprefix(self.asking).strip()]
        if not others:
            return text
        longer = [other for other in others if self.asking not in other]  # Else it would be made longer twice.
        filters = "".join(f" | replace({json.dumps(self.asking)}, {json.dumps(other)})" for other in longer)
        filters += "".join(f" | replace({json.dumps(other)}, {json.dumps(self.asking)})" for other in others)
        return f"{{%- set written -%}}{text}{{%- endset -%}}{{{{- written{filters} -}}}}"

    def _before_answers(self) -> tuple[str, str]:
        """What stands between a question and its answer: to ask for it, and in the history."""
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
        """Whether it writes anything to ask for an answer."""
        return self.render([_user(0)], asking=True) != self.render([_user(0)])

    def _before_earlier_answers(self) -> str:
        """The same in the history, of an answer that another question follows."""
        try:
            text = self.render([_user(0), _assistant(0), _user(1)])
        except TemplateError:
            return self.asking
        between, found, _ = text.partition(QUESTION.format(0))[2].partition(ANSWER.format(0))
        return between if found else self.asking


def _clock() -> str:
    """Jinja of a clock that stands still."""
    filters = "".join(f" | replace({each!r}, {TODAY.strftime(each)!r})" for each in DIRECTIVES)
    return f"{{%- macro {CLOCK}(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro -%}}"


def _user(number: int) -> dict[str, str]:
    return {"role": "user", "content": QUESTION.format(number)}


def _assistant(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": ANSWER.format(number)}
