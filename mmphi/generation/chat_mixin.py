"""Chat methods of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mmphi.generation.engine import Engine
    from mmphi.models.multimodal import Multimodal


class ChatMixin:
    """Chat interface of :class:`~mmphi.models.multimodal.Multimodal`.

    Attributes:
        context: Longest conversation, prompt and answer, in tokens; 0 takes the default of
            :class:`~mmphi.generation.engine.Engine`. Set it before the first conversation, which creates the engine.
    """

    context = 0
    _engine: Engine | None = None

    def chat(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
        """Return the answer to the last message.

        The KV cache is kept between calls: a follow-up question that repeats the conversation so far prefills only the
        new tokens.

        Args:
            messages: Mappings with ``role`` and ``content``; see :func:`~mmphi.generation.messages.parse_messages`.
            **how: Fields of :class:`~mmphi.generation.sampling.SamplingParams`; decoding is greedy by default.

        Raises:
            MessageError: If a message is invalid.
            ModelError: If the newest question does not fit, or contains an input kind that this model does not accept.
        """
        return "".join(self.stream(messages, **how))

    def chat_batch(self, conversations: Sequence[Sequence[Mapping[str, Any]]], **how: Any) -> list[str]:
        """Return the answer of :meth:`chat` to each conversation, generated in batches."""
        from mmphi.generation.conversations import answer_conversations, read_conversations
        from mmphi.generation.sampling import SamplingParams

        answers = answer_conversations(self.engine(8), read_conversations(conversations), SamplingParams(**how))
        return [answer.text for answer in answers]

    def stream(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> Iterator[str]:
        """Yield the answer of :meth:`chat` in pieces while it is generated."""
        from mmphi.generation.conversations import start_answer

        return start_answer(self.engine(2), messages, **how)

    def engine(self, slots: int) -> Engine:
        """Return the engine, replaced by a new one if it has fewer than ``slots`` slots."""
        from mmphi.generation.engine import Engine

        if self._engine is None or self._engine.slots < slots:
            self._engine = Engine(cast("Multimodal", self), slots, self.context)
        return self._engine
