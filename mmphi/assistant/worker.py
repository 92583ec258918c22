"""The engine in a thread of its own, with a queue that is never longer than it may be."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mmphi.errors import MmphiError
from mmphi.models.chat.engine import Answering, Engine, Reason
from mmphi.models.chat.messages import Conversation
from mmphi.models.chat.prompts import check_shown, open_prompt
from mmphi.models.chat.sampling import Sampling

IDLE_S = 0.5  # How long an idle thread waits before it looks whether it shall stop.
STALLED_S = 60.0  # Without a step for longer, the engine counts as stalled: a step takes seconds at most.
STOP_S = 5.0  # How long a stop waits for the threads; they are daemons, and do not hold up the end of the process.


class Full(MmphiError):  # noqa: N818  # As HTTP has it: Too Many Requests.
    """So many are waiting that nobody else is taken."""


class TooSlow(MmphiError):  # noqa: N818  # Likewise.
    """An answer took longer than it may."""


@dataclass(eq=False)
class Ticket:
    """One question on its way.

    Attributes:
        asked: The conversation.
        sampling: How the answer is chosen.
        tell: Called in the engine's thread with each piece of the answer, and with ``None`` at its end.
        born: When it came, on the clock of :func:`time.monotonic`.
        heard: What was understood of its recordings.
        prompt_tokens: Tokens of the prompt, features included.
        reused: How many of them were remembered.
        tokens: Tokens of the answer.
        reason: Why the answer ended.
        error: What went wrong.
        first_s: Seconds until its first token.
        gone: Whether nobody waits for it any longer.
    """

    asked: Conversation
    sampling: Sampling
    tell: Callable[[str | None], None]
    born: float = field(default_factory=time.monotonic)
    heard: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    reused: int = 0
    tokens: int = 0
    reason: Reason = ""
    error: Exception | None = None
    first_s: float = 0.0
    gone: bool = False
    _answering: Answering | None = None


class Worker:
    """Answers tickets, as many at once as the engine has slots.

    Images are opened and recordings heard in a second thread: those who are being answered need not wait for it.

    Args:
        engine: Used by nobody else from now on.
        waiting: Tickets that may wait beside those that are answered.
        limit_s: Longest time from a ticket's coming to its last token; 0 for none.
        ended: Called with every ticket at its end.
    """

    def __init__(
        self, engine: Engine, waiting: int = 64, limit_s: float = 0.0, ended: Callable[[Ticket], None] = lambda _: None
    ) -> None:
        self.engine, self.limit_s, self.ended = engine, limit_s, ended
        self.most = engine.slots.slots + waiting
        self._unread: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self._open: set[Ticket] = set()
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._stepped = time.monotonic()
        self._threads = [
            threading.Thread(target=run, daemon=True, name=name)
            for name, run in (("preparation", self._prepare), ("generation", self._answer))
        ]

    def start(self) -> None:
        """Begin to answer."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Break off what is being answered, and end."""
        self._stopping.set()
        self._unread.put(None)
        end = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    @property
    def problem(self) -> str:
        """Why no answers can be expected: a thread has ended, or the engine makes no steps; empty otherwise."""
        ended = [thread.name for thread in self._threads if not thread.is_alive()]
        if ended:
            return f"{', '.join(ended)} ended"
        age = time.monotonic() - self._stepped
        return f"the last step was {age:.0f} s ago" if age > STALLED_S else ""

    @property
    def full(self) -> bool:
        """Whether no more tickets are taken at present."""
        return len(self._open) >= self.most

    @property
    def open(self) -> int:
        """Tickets that wait or are answered."""
        return len(self._open)

    def submit(self, ticket: Ticket) -> None:
        """Take a ticket.

        Raises:
            Full: If too many wait.
        """
        with self._lock:
            if len(self._open) >= self.most:
                raise Full(f"{len(self._open)} questions wait for an answer, and no more are taken", "try again soon")
            self._open.add(ticket)
        self._unread.put(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Nobody waits for this answer any longer: it costs nothing from now on."""
        ticket.gone = True

    def _prepare(self) -> None:
        """Open images and hear recordings, one ticket after the other."""
        model = self.engine.model
        while (ticket := self._unread.get()) is not None:
            try:
                if not ticket.gone:
                    check_shown(model, ticket.asked)
                    own = [audio for turn in ticket.asked.audio for audio in turn]
                    ticket.heard = [each.said or "" for each in model.inputs(own)]
            except Exception as error:  # Whatever is wrong with this one, the others are answered.
                ticket.error = error
                self._end(ticket)
            else:
                self._ready.put(ticket)

    def _answer(self) -> None:
        """Step the engine as long as there is something to say; no error of a request ends this thread."""
        active: list[Ticket] = []
        while not self._stopping.is_set():
            self._stepped = time.monotonic()
            try:
                self._take(active)
                self._cancel(active)
                self.engine.step()
            except Exception as error:  # None of a single answer: the engine gives those to the answer itself.
                for ticket in active:
                    self._break_off(ticket, error)
            active = [ticket for ticket in active if self._told(ticket)]
        for ticket in list(self._open):
            ticket.error = ticket.error or MmphiError("the server stops")
            self._end(ticket)

    def _cancel(self, active: list[Ticket]) -> None:
        """Cancel answers whose client has disconnected, or that exceed the time limit."""
        for ticket in active:
            answering = ticket._answering
            assert answering is not None
            if ticket.gone:
                self.engine.cancel(answering)
            elif self.limit_s and time.monotonic() - ticket.born > self.limit_s:
                self.engine.cancel(answering)
                ticket.error = TooSlow(f"the answer took more than {self.limit_s:g} s", "ask for fewer tokens")

    def _break_off(self, ticket: Ticket, error: Exception) -> None:
        answering = ticket._answering
        assert answering is not None
        ticket.error = ticket.error or error
        self.engine.cancel(answering)

    def _take(self, active: list[Ticket]) -> None:
        """Take what is ready; wait for it where nothing else is to be done."""
        while True:
            try:
                ticket = self._ready.get_nowait() if active else self._ready.get(timeout=IDLE_S)
            except queue.Empty:
                return
            try:
                self._begin(ticket)
            except Exception as error:
                ticket.error = error
                self._end(ticket)
            else:
                active.append(ticket)

    def _begin(self, ticket: Ticket) -> None:
        # Written here and not in the other thread: a tokenizer may not be used by two at once.
        prompt, _ = open_prompt(self.engine.model, ticket.asked, self.engine.room(ticket.sampling), checked=True)
        ticket.prompt_tokens = len(prompt)
        ticket._answering = self.engine.submit(prompt, ticket.sampling)

    def _told(self, ticket: Ticket) -> bool:
        """Tell what is new of an answer; whether there is more to come."""
        answering = ticket._answering
        assert answering is not None
        ticket.tokens, ticket.reused = answering.tokens, answering.reused
        if answering.tokens and not ticket.first_s:
            ticket.first_s = time.monotonic() - ticket.born
        if (piece := answering.take()) and not ticket.gone:
            try:
                ticket.tell(piece)
            except RuntimeError:  # Likewise.
                ticket.gone = True
        if not answering.reason:
            return True
        ticket.reason, ticket.error = answering.reason, ticket.error or answering.error
        self._end(ticket)
        return False

    def _end(self, ticket: Ticket) -> None:
        with self._lock:
            self._open.discard(ticket)
        self.ended(ticket)
        with contextlib.suppress(RuntimeError):  # The event loop of the one who asked is closed.
            ticket.tell(None)
