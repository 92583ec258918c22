"""Models of the page, loaded at their first question, and the open requests of all sessions."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mmphi.errors import MmphiError
from mmphi.generation.messages import parse_messages
from mmphi.generation.sampling import SamplingParams
from mmphi.serving.scheduler import QueuedRequest, Scheduler

MOST = 2  # Models kept in memory; more only while more of them have open requests.


@dataclass
class PageTurn:
    """A question and its answer.

    Attributes:
        text: Typed text.
        image: Path of the question's image; empty for none.
        audio: Path of the question's recording; empty for none.
        transcript: Transcript of the recording.
        answer: Text of the answer so far.
        problem: Error message; empty if there is none.
        done: Whether the answer has ended.
    """

    text: str
    image: str = ""
    audio: str = ""
    transcript: str = ""
    answer: str = ""
    problem: str = ""
    done: bool = False

    def messages(self) -> list[dict[str, Any]]:
        """Messages in OpenAI's format: the question and, once it has ended, the answer."""
        parts: list[dict[str, Any]] = []
        if self.image:
            parts.append({"type": "image", "image": self.image})
        if self.audio:
            parts.append({"type": "audio", "audio": self.audio})
        if self.text.strip():
            parts.append({"type": "text", "text": self.text.strip()})
        question = {"role": "user", "content": parts}
        return [question, {"role": "assistant", "content": self.answer}] if self.done else [question]

    def anew(self) -> PageTurn:
        """The same question without its answer."""
        return PageTurn(self.text, self.image, self.audio)


@dataclass
class PageConversation:
    """A conversation with one model.

    Attributes:
        model: Name of the model, as :meth:`ModelPool.worker` takes it.
        turns: Questions and answers.
        left: Whether it was cleared from the page; the rest of its answer is not shown.
    """

    model: str
    turns: list[PageTurn] = field(default_factory=list)
    left: bool = False

    @property
    def answering(self) -> bool:
        """Whether its last question is still being answered."""
        return bool(self.turns) and not (self.turns[-1].done or self.turns[-1].problem)

    def messages(self, system: str) -> list[dict[str, Any]]:
        """Messages of the conversation, without turns that failed."""
        messages = [message for turn in self.turns if not turn.problem for message in turn.messages()]
        return [{"role": "system", "content": system}, *messages] if system else messages


def _tell(news: queue.SimpleQueue[tuple[int, str | None]], number: int, piece: str | None) -> None:
    news.put((number, piece))


class ModelPool:
    """Models in memory and the open requests of each session.

    Args:
        load: Returns the scheduler of a model; the pool starts it.
        most: Models kept in memory; more only while more of them have open requests.
    """

    def __init__(self, load: Callable[[str], Scheduler], most: int = MOST) -> None:
        self._load, self._most = load, most
        self._workers: dict[str, Scheduler] = {}  # Least recently used first.
        self._loading: dict[str, Future[Scheduler]] = {}
        self._open_requests: dict[str, list[tuple[Scheduler, QueuedRequest]]] = {}
        self._lock = threading.Lock()  # Guards the dictionaries above; held only briefly.
        self._closed = False
        self._load_lock = threading.Lock()  # One model is loaded at a time.

    def worker(self, model: str) -> Scheduler:
        """Scheduler of a model, which is loaded if necessary; idle models are unloaded to make room.

        Raises:
            MmphiError: If the model cannot be loaded.
        """
        with self._lock:
            if (worker := self._workers.pop(model, None)) is not None:
                self._workers[model] = worker
                return worker
            others, loading = self._loading.get(model), Future[Scheduler]()
            if others is None:
                self._loading[model] = loading
        if others is not None:
            return others.result()
        try:
            with self._load_lock:
                self._make_room()
                worker = self._load(model)
                worker.start()
        except BaseException as error:
            with self._lock:
                del self._loading[model]
            loading.set_exception(error)
            raise
        with self._lock:
            self._workers[model] = worker
            del self._loading[model]
            closed = self._closed
        loading.set_result(worker)
        if closed:
            worker.stop()
        return worker

    def loaded(self, model: str) -> Scheduler | None:
        """Scheduler of a model that is in memory; ``None`` for any other."""
        with self._lock:
            return self._workers.get(model)

    def _make_room(self) -> None:
        """Unload the least recently used idle models, without leaving references, so that their memory is freed."""
        with self._lock:
            idle = [name for name, other in self._workers.items() if not other.open]
            gone = [self._workers.pop(name) for name in idle[: max(0, len(self._workers) - self._most + 1)]]
        while gone:
            gone.pop().stop()

    def ask(self, who: str, talks: Sequence[PageConversation], system: str, sampling: SamplingParams) -> Iterator[None]:
        """Answer the last question of each conversation, all at the same time; yields after every update.

        Args:
            who: Session of the questions, for :meth:`stop`.
            talks: Conversations, whose last turns are filled in.
            system: System message; empty for none.
            sampling: Sampling parameters of the answers.
        """
        turns = [talk.turns[-1] for talk in talks]
        news: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        mine: dict[int, tuple[Scheduler, QueuedRequest]] = {}
        try:
            for number, talk in enumerate(talks):
                try:
                    mine[number] = self._submit(who, talk, system, sampling, partial(_tell, news, number))
                except MmphiError as error:
                    turns[number].problem = str(error)
            yield
            waited_for = set(mine)
            while waited_for:
                number, piece = news.get()
                turn, queued = turns[number], mine[number][1]
                turn.transcript = " ".join(queued.transcripts[-queued.recordings :]) if queued.recordings else ""
                turn.answer += piece or ""
                if piece is None:
                    waited_for.remove(number)
                    turn.done, turn.problem = True, str(queued.error or "")
                yield
        finally:
            for turn in turns:  # Also if the generator is closed early.
                turn.done = turn.done or not turn.problem
            self._leave(who, list(mine.values()))

    def _submit(
        self,
        who: str,
        talk: PageConversation,
        system: str,
        sampling: SamplingParams,
        tell: Callable[[str | None], None],
    ) -> tuple[Scheduler, QueuedRequest]:
        queued = QueuedRequest(parse_messages(talk.messages(system)), sampling, tell)
        while True:
            worker = self.worker(talk.model)
            with self._lock:
                if self._workers.get(talk.model) is worker:  # Otherwise another thread has unloaded it.
                    worker.submit(queued)
                    self._open_requests.setdefault(who, []).append((worker, queued))
                    return worker, queued

    def stop(self, who: str) -> None:
        """Cancel the open answers of a session; their text so far is kept."""
        with self._lock:
            requests = list(self._open_requests.get(who, []))
        for worker, queued in requests:
            worker.leave(queued)

    def _leave(self, who: str, requests: list[tuple[Scheduler, QueuedRequest]]) -> None:
        for worker, queued in requests:
            worker.leave(queued)
        with self._lock:
            left = [each for each in self._open_requests.get(who, []) if each not in requests]
            if left:
                self._open_requests[who] = left
            else:
                self._open_requests.pop(who, None)

    def close(self) -> None:
        """Cancel all open answers and stop all schedulers."""
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
            self._workers.clear()
        for worker in workers:
            worker.stop()
