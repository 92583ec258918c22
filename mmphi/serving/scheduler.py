"""Scheduler of requests: they are prepared in separate threads, and answered together in the engine's thread."""

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

IDLE_S = 0.5  # Seconds after which an idle engine thread checks whether to stop.
STALLED_S = 60.0  # Seconds without a step after which the engine counts as stalled: a step takes seconds at most.
AUDIO_S = 600.0  # Longest total duration of the recordings of one request, in seconds.
STOP_S = 5.0  # Seconds that a stop waits for the threads; they are daemons and do not block the process's exit.


NOTHING = Conversation("", (("", None),), ((),), ((),))


class QueueFullError(MmphiError):
    """The queue is full."""


class RequestTimeoutError(MmphiError):
    """A request exceeded its time limit."""


class ServerStoppingError(MmphiError):
    """The server is stopping."""


class ClientDisconnectedError(MmphiError):
    """The client of a request has disconnected."""


@dataclass(eq=False)
class QueuedRequest:
    """A request and its progress.

    Attributes:
        conversation: The conversation; emptied when the request ends.
        sampling: Sampling parameters of the answer.
        tell: Called in a thread of the scheduler with each piece of the answer, and with ``None`` at its end.
        born: Time of arrival, on the clock of :func:`time.monotonic`.
        transcripts: Transcripts of all recordings of the conversation.
        prompt_tokens: Number of tokens of the prompt, features included.
        reused: Number of prompt tokens that were already in the KV cache.
        tokens: Number of tokens of the answer.
        reason: Why the answer ended: ``stop``, ``length`` or ``cancelled``; empty before.
        error: The error that ended the request; ``None`` if there is none.
        first_s: Seconds from arrival to the first token; 0 before.
        gone: Whether the request is to be cancelled, because its client has disconnected.
        ended: Whether the request has ended.
        recordings: Number of recordings of the newest question.
    """

    conversation: Conversation
    sampling: SamplingParams
    tell: Callable[[str | None], None]
    born: float = field(default_factory=time.monotonic)
    transcripts: list[str] = field(default_factory=list)
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
        self.recordings = len(self.conversation.audio[-1])


class Scheduler:
    """Answers requests, as many at once as the engine has slots.

    A request is prepared before it is answered: its images are decoded and encoded, its recordings decoded and
    transcribed, and its prompt is built. There is one preparation thread each for text only, images and recordings, so
    that no text waits for a recording.

    Args:
        engine: The engine; the scheduler must be its only user.
        waiting: Number of requests that may wait in addition to those that are answered.
        limit_s: Longest time from a request's arrival to its last token, in seconds; 0 for no limit.
        ended: Called with every request at its end.
        audio_s: Longest total duration of the recordings of one request, in seconds.
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
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Cancel all requests and stop the threads."""
        self._stopping.set()
        for lane in self._lanes.values():
            lane.put(None)
        end = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._decoder.close()

    @property
    def problem(self) -> str:
        """Why no answers can be expected: a thread has ended, or the engine has stalled; empty otherwise."""
        ended = [thread.name for thread in self._threads if not thread.is_alive()]
        if ended:
            return f"{', '.join(ended)} ended"
        age = time.monotonic() - self._stepped
        return f"the last step was {age:.0f} s ago" if age > STALLED_S else ""

    @property
    def full(self) -> bool:
        """Whether no more requests are accepted at present."""
        return self.open >= self.most

    @property
    def open(self) -> int:
        """Number of requests that are being read, wait or are answered."""
        return len(self._open) + self._reading

    def check_room(self) -> None:
        """Check that a request would be accepted at present.

        Raises:
            QueueFullError: If the queue is full.
        """
        if self.full:
            raise QueueFullError(f"the queue is full: {self.open} requests are open", "try again soon")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count a request as open while it is read, which includes fetching its images.

        Raises:
            QueueFullError: If the queue is full.
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
        """Queue a request.

        Raises:
            QueueFullError: If the queue is full.
        """
        with self._lock:
            self.check_room()
            self._open.add(queued)
        conversation = queued.conversation
        kind = "recordings" if any(conversation.audio) else "images" if any(conversation.images) else "text"
        self._lanes[kind].put(queued)

    def leave(self, queued: QueuedRequest) -> None:
        """Mark a request for cancellation, because its client has disconnected."""
        queued.gone = True

    def _check(self, queued: QueuedRequest) -> None:
        """Raise if a request should not be processed further.

        Raises:
            ClientDisconnectedError: If its client has disconnected, or it has ended.
            RequestTimeoutError: If its time limit is exceeded.
            ServerStoppingError: If the scheduler is stopping.
        """
        if self._stopping.is_set():
            raise ServerStoppingError("the server ends", "ask again when it is back")
        if queued.gone or queued.ended:
            raise ClientDisconnectedError("the client is gone")
        if self.limit_s and time.monotonic() - queued.born > self.limit_s:
            raise RequestTimeoutError(f"the answer took more than {self.limit_s:g} s", "ask for fewer tokens")

    def _prepare(self, lane: queue.SimpleQueue[QueuedRequest | None]) -> None:
        """Prepare the requests of one kind, one after the other."""
        while self._prepare_next(lane):
            pass

    def _prepare_next(self, lane: queue.SimpleQueue[QueuedRequest | None]) -> bool:
        # A separate function, so that no local variable keeps the last request in memory while the thread waits.
        queued = lane.get()
        if queued is None:
            return False
        try:
            self._write_prompt(queued)
        except ClientDisconnectedError:
            self._end(queued)
        except Exception as error:  # An error of this request must not affect others.
            self._end(queued, error)
        else:
            self._ready.put(queued)
        return True

    def _write_prompt(self, queued: QueuedRequest) -> None:
        model, check = self.engine.model, partial(self._check, queued)
        check()
        given = queued.conversation  # The attribute is emptied if the request ends meanwhile.
        check_images(model, given, check)
        conversation = decode_recordings(given, self._decoder, self.audio_s, check)
        own = [audio for turn in conversation.audio for audio in turn]
        queued.transcripts = [each.transcript or "" for each in model.inputs(own, check)]
        prompt, _ = open_prompt(model, conversation, self.engine.room(queued.sampling), checked=True, check=check)
        queued.prompt_tokens = len(prompt)
        queued._answering = self.engine.answering(prompt, queued.sampling)

    def _answer(self) -> None:
        """Step the engine until the scheduler stops; an error of a request does not end this thread."""
        active: list[QueuedRequest] = []
        while not self._stopping.is_set():
            self._stepped = time.monotonic()
            try:
                self._take(active)
                self._cancel(active)
                self.engine.step()
            except Exception as error:  # Not of a single answer: the engine stores those in the answer itself.
                for queued in active:
                    self._break_off(queued, error)
            active = [queued for queued in active if self._emit(queued)]
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
        """Pass prepared requests to the engine; wait for one if none is active."""
        while True:
            try:
                queued = self._ready.get_nowait() if active else self._ready.get(timeout=IDLE_S)
            except queue.Empty:
                return
            if not queued.ended:
                assert queued._answering is not None
                self.engine.enqueue(queued._answering)
                active.append(queued)

    def _emit(self, queued: QueuedRequest) -> bool:
        """Emit new text of an answer; returns whether more may follow."""
        try:
            return self._tell(queued)
        except Exception as error:  # Of this answer alone, such as a detokenizer error.
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
            except RuntimeError:  # The client's event loop is closed.
                queued.gone = True
        if not answering.reason:
            return True
        queued.reason = answering.reason
        self._end(queued, answering.error)
        return False

    def _end(self, queued: QueuedRequest, error: Exception | None = None) -> None:
        """End a request, unless another thread has already ended it."""
        with self._lock:
            if queued.ended:
                return
            queued.ended = True
            queued.error = queued.error or error
            self._open.discard(queued)
        try:
            self.ended(queued)
        finally:
            queued.conversation = NOTHING  # The request may stay in a lane and would keep its images in memory.
            with contextlib.suppress(RuntimeError):  # The client's event loop is closed.
                queued.tell(None)


def decode_recordings(
    conversation: Conversation, decoder: Decoder, longest_s: float, check: Callable[[], None] = lambda: None
) -> Conversation:
    """Returns a conversation with its recordings decoded to WAV, in another process.

    Args:
        conversation: The conversation.
        decoder: Decoder of the recordings.
        longest_s: Longest total duration of the recordings, in seconds.
        check: Called repeatedly; its exceptions end the decoding.

    Raises:
        AudioError: If a recording cannot be decoded, or the total duration is too long.
    """
    left, turns = longest_s, []
    for turn in conversation.audio:
        own = []
        for audio in turn:
            check()
            if left <= 0:
                raise AudioError("too long", f"the recordings are longer than {longest_s:g} s", "cut them")
            content = decoder.decode(audio.source, left, check)
            left -= wav_seconds(content)
            own.append(replace(audio, source=content))
        turns.append(tuple(own))
    return replace(conversation, audio=tuple(turns))
