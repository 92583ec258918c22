"""How a model is talked to from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mmphi.generation.engine import Engine
    from mmphi.models.multimodal import Multimodal


class ChatMixin:
    """What :class:`~mmphi.models.multimodal.Multimodal` says to messages.

    Attributes:
        context: Longest conversation, prompt and answer, in tokens; as of :class:`~mmphi.generation.engine.Engine`
            where 0. It is of effect before the first conversation.
    """

    context = 0
    _engine: Engine | None = None  # Made at the first conversation.

    def chat(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
        """Answer the last of some messages.

        What was read for the question before is remembered: a second one about the same picture, asked with the first
        and its answer before it, reads only what is new.

        Args:
            messages: Each with a ``role`` and a ``content``, as :func:`~mmphi.generation.messages.parse_messages` says.
            **how: Of :class:`~mmphi.generation.sampling.SamplingParams`: greedy where ``temperature`` is left out.

        Raises:
            MessageError: If a message cannot be read.
            ModelError: If the newest question does not fit, or is about what this model does not see or hear.
        """
        return "".join(self.stream(messages, **how))

    def chat_batch(self, conversations: Sequence[Sequence[Mapping[str, Any]]], **how: Any) -> list[str]:
        """What :meth:`chat` says to each of several conversations, read and answered together."""
        from mmphi.generation.conversations import answer_conversations, read_conversations
        from mmphi.generation.sampling import SamplingParams

        answers = answer_conversations(self.engine(8), read_conversations(conversations), SamplingParams(**how))
        return [answer.text for answer in answers]

    def stream(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> Iterator[str]:
        """The answer that :meth:`chat` gives, in pieces as it is said."""
        from mmphi.generation.conversations import start_answer

        return start_answer(self.engine(2), messages, **how)

    def engine(self, slots: int) -> Engine:
        """Who answers conversations, with at least so many slots; the same one as long as it has them."""
        from mmphi.generation.engine import Engine

        if self._engine is None or self._engine.slots < slots:
            self._engine = Engine(cast("Multimodal", self), slots, self.context)
        return self._engine
