"""An engine and those who ask it: requests are prepared in threads of their own, and answered together in one."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from mmphi.data.decoder import Decoder, wav_seconds
from mmphi.errors import AudioError, MmphiError
from mmphi.generation.engine import Engine, GenerationRequest, Reason
from mmphi.generation.messages import Conversation
from mmphi.generation.prompt_builder import check_images, open_prompt
from mmphi.generation.sampling import SamplingParams

IDLE_S = 0.5  # How long an idle thread waits before it looks whether it shall stop.
STALLED_S = 60.0  # Without a step for longer, the engine counts as stalled: a step takes seconds at most.
AUDIO_S = 600.0  # Longest recordings of one request, all together, in seconds.
STOP_S = 5.0  # How long a stop waits for the threads; they are daemons, and do not hold up the end of the process.


NOTHING = Conversation("", (("", None),), ((),), ((),))


class QueueFullError(MmphiError):  # As HTTP has it: Too Many Requests.
    """So many are waiting that nobody else is taken."""


class RequestTimeoutError(MmphiError):  # Likewise.
    """An answer took longer than it may."""


class ServerStoppingError(MmphiError):  # Likewise.
    """The server ends."""


class ClientDisconnectedError(MmphiError):  # Likewise.
    """Nobody waits for the answer any longer."""


@dataclass(eq=False)
class QueuedRequest:
    """One question on its way.

    Attributes:
        asked: The conversation; nothing is left of it at the end.
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
        ended: Whether nothing more is told.
        recordings: How many the newest question has.
    """

    asked: Conversation
    sampling: SamplingParams
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
    ended: bool = False
    recordings: int = field(init=False)
    _answering: GenerationRequest | None = None

    def __post_init__(self) -> None:
        self.recordings = len(self.asked.audio[-1])


class Scheduler:
    """Answers tickets, as many at once as the engine has slots.

    A ticket is prepared before it is answered: its images are decoded and embedded, its recordings decoded and
    transcribed, its prompt is written. Tickets of text alone, of images and of recordings are prepared in a thread of
    each kind, so that no text waits for a recording.

    Args:
        engine: Used by nobody else from now on.
        waiting: Tickets that may wait beside those that are answered.
        limit_s: Longest time from a ticket's coming to its last token; 0 for none.
        ended: Called with every ticket at its end.
        audio_s: Longest recordings of one ticket, all together, in seconds.
    """

    def __init__(
        self,
        engine: Engine,
        waiting: int = 64,
        limit_s: float = 0.0,
        ended: Callable[[QueuedRequest], None] = lambda _: None,
        audio_s: float = AUDIO_S,
    ) -> None:
        self.engine, self.limit_s, self.ended, self.audio_s = engine, limit_s, ended, audio_s
        self.most = engine.slots + waiting
        self._lanes: dict[str, queue.SimpleQueue[QueuedRequest | None]] = {
            kind: queue.SimpleQueue() for kind in ("text", "images", "recordings")
        }
        self._ready: queue.SimpleQueue[QueuedRequest] = queue.SimpleQueue()
        self._open: set[QueuedRequest] = set()
        self._reading = 0
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._stepped = time.monotonic()
        self._decoder = Decoder()
        self._threads = [
            threading.Thread(target=self._prepare, args=(lane,), daemon=True, name=f"preparation of {kind}")
            for kind, lane in self._lanes.items()
        ]
        self._threads.append(threading.Thread(target=self._answer, daemon=True, name="generation"))

    def start(self) -> None:
        """Begin to answer."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Break off what is being answered, and end."""
        self._stopping.set()
        for lane in self._lanes.values():
            lane.put(None)
        end = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._decoder.close()

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
        return self.open >= self.most

    @property
    def open(self) -> int:
        """Tickets that wait or are answered, and requests that are read."""
        return len(self._open) + self._reading

    def check_room(self) -> None:
        """That a ticket would be taken at present.

        Raises:
            Full: If too many wait.
        """
        if self.full:
            raise QueueFullError(f"{self.open} questions wait for an answer, and no more are taken", "try again soon")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count a request that is read, whose images may be fetched meanwhile, as one that waits.

        Raises:
            Full: If too many wait.
        """
        with self._lock:
            self.check_room()
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1

    def submit(self, queued: QueuedRequest) -> None:
        """Take a ticket.

        Raises:
            Full: If too many wait.
        """
        with self._lock:
            self.check_room()
            self._open.add(queued)
        asked = queued.asked
        kind = "recordings" if any(asked.audio) else "images" if any(asked.images) else "text"
        self._lanes[kind].put(queued)

    def leave(self, queued: QueuedRequest) -> None:
        """Nobody waits for this answer any longer: it costs nothing from now on."""
        queued.gone = True

    def _check(self, queued: QueuedRequest) -> None:
        """That a ticket's answer is still wanted, and may still come.

        Raises:
            Left: If nobody waits for it.
            TooSlow: If its time is over.
            Stopping: If no answers are given any longer.
        """
        if self._stopping.is_set():
            raise ServerStoppingError("the server ends", "ask again when it is back")
        if queued.gone or queued.ended:
            raise ClientDisconnectedError("the client is gone")
        if self.limit_s and time.monotonic() - queued.born > self.limit_s:
            raise RequestTimeoutError(f"the answer took more than {self.limit_s:g} s", "ask for fewer tokens")

    def _prepare(self, lane: queue.SimpleQueue[QueuedRequest | None]) -> None:
        """Prepare the tickets of one kind, one after the other."""
        while self._prepare_next(lane):
            pass

    def _prepare_next(self, lane: queue.SimpleQueue[QueuedRequest | None]) -> bool:
        # A function of its own, so that nothing holds the last ticket while the next one is waited for.
        queued = lane.get()
        if queued is None:
            return False
        try:
            self._write_prompt(queued)
        except ClientDisconnectedError:
            self._end(queued)
        except Exception as error:  # Whatever is wrong with this one, the others are answered.
            self._end(queued, error)
        else:
            self._ready.put(queued)
        return True

    def _write_prompt(self, queued: QueuedRequest) -> None:
        model, check = self.engine.model, partial(self._check, queued)
        check()
        given = queued.asked  # It is let go of when the ticket ends, which may be meanwhile.
        check_images(model, given, check)
        asked = decode_recordings(given, self._decoder, self.audio_s, check)
        own = [audio for turn in asked.audio for audio in turn]
        queued.heard = [each.said or "" for each in model.inputs(own, check)]
        prompt, _ = open_prompt(model, asked, self.engine.room(queued.sampling), checked=True, check=check)
        queued.prompt_tokens = len(prompt)
        queued._answering = self.engine.answering(prompt, queued.sampling)

    def _answer(self) -> None:
        """Step the engine as long as there is something to say; no error of a request ends this thread."""
        active: list[QueuedRequest] = []
        while not self._stopping.is_set():
            self._stepped = time.monotonic()
            try:
                self._take(active)
                self._cancel(active)
                self.engine.step()
            except Exception as error:  # None of a single answer: the engine gives those to the answer itself.
                for queued in active:
                    self._break_off(queued, error)
            active = [queued for queued in active if self._told(queued)]
        for queued in list(self._open):
            self._end(queued, ServerStoppingError("the server ends", "ask again when it is back"))

    def _cancel(self, active: list[QueuedRequest]) -> None:
        """Cancel requests whose client has disconnected, or that exceed the time limit, wherever they are."""
        for queued in list(self._open):
            try:
                self._check(queued)
            except (ClientDisconnectedError, RequestTimeoutError, ServerStoppingError) as error:
                why = None if isinstance(error, ClientDisconnectedError) else error
                if queued in active:
                    self._break_off(queued, why)
                else:
                    self._end(queued, why)

    def _break_off(self, queued: QueuedRequest, error: Exception | None) -> None:
        assert queued._answering is not None
        queued.error = queued.error or error
        self.engine.cancel(queued._answering)

    def _take(self, active: list[QueuedRequest]) -> None:
        """Take what is ready; wait for it where nothing else is to be done."""
        while True:
            try:
                queued = self._ready.get_nowait() if active else self._ready.get(timeout=IDLE_S)
            except queue.Empty:
                return
            if not queued.ended:
                assert queued._answering is not None
                self.engine.enqueue(queued._answering)
                active.append(queued)

    def _told(self, queued: QueuedRequest) -> bool:
        """Tell what is new of an answer; whether there is more to come."""
        try:
            return self._tell(queued)
        except Exception as error:  # Of this answer alone, as one that its text cannot be made of.
            self._break_off(queued, error)
            self._end(queued)
            return False

    def _tell(self, queued: QueuedRequest) -> bool:
        answering = queued._answering
        assert answering is not None
        queued.tokens, queued.reused = answering.tokens, answering.reused
        if answering.tokens and not queued.first_s:
            queued.first_s = time.monotonic() - queued.born
        if (piece := answering.take()) and not queued.gone:
            try:
                queued.tell(piece)
            except RuntimeError:  # The event loop of the one who asked is closed.
                queued.gone = True
        if not answering.reason:
            return True
        queued.reason = answering.reason
        self._end(queued, answering.error)
        return False

    def _end(self, queued: QueuedRequest, error: Exception | None = None) -> None:
        """End a ticket, unless another thread has done so already."""
        with self._lock:
            if queued.ended:
                return
            queued.ended = True
            queued.error = queued.error or error
            self._open.discard(queued)
        try:
            self.ended(queued)
        finally:
            queued.asked = NOTHING  # It may wait in a lane for long yet, and would hold all its images there.
            with contextlib.suppress(RuntimeError):  # The event loop of the one who asked is closed.
                queued.tell(None)


def decode_recordings(
    asked: Conversation, decoder: Decoder, longest_s: float, check: Callable[[], None] = lambda: None
) -> Conversation:
    """A conversation whose recordings are decoded, in another process.

    Args:
        asked: The conversation.
        decoder: Of recordings.
        longest_s: Longest recordings, all together, in seconds.
        check: Called now and then; what it raises ends this.

    Raises:
        AudioError: If one cannot be decoded, or all together are too long.
    """
    left, turns = longest_s, []
    for turn in asked.audio:
        own = []
        for audio in turn:
            check()
            if left <= 0:
                raise AudioError("too long", f"the recordings are longer than {longest_s:g} s", "cut them")
            content = decoder.decode(audio.source, left, check)
            left -= wav_seconds(content)
            own.append(replace(audio, source=content))
        turns.append(tuple(own))
    return replace(asked, audio=tuple(turns))
