"""Pretraining on a stream of generated text: generators fill a shard queue (spool), and the training consumes it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mmphi.config.pretrain import PretrainSettings
from mmphi.config.textgen import StoreSettings, TextgenSettings
from mmphi.pipeline.stage import Context
from mmphi.stages.textgen import DATA, STORE, store_of, write_datasheet
from mmphi.textgen.generator_pool import GeneratorPool
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shard_reader import ShardReader
from mmphi.textgen.shards import Document
from mmphi.training.checkpoints import complete_checkpoints
from mmphi.training.replay_buffer import Ids, ReplayBuffer
from mmphi.training.streaming_dataset import StreamingDataset

STREAM = "stream.json"  # State of the stream, in each checkpoint folder.
HELD = "validation.json"
SPOOL, FLEET = "spool", "generators"
LOOK_S = 0.5
ENOUGH, FEW = 0.9, 1.5  # Target busy share of the training; upper limit for how often text is seen.


class GeneratedStream:
    """Text source of a training on a stream; a context manager that runs the generators while it is open.

    Args:
        ctx: Context of the stage.
        tokenizer: Tokenizer of the trained model.
        backend: Name of the generators' sampling backend.
    """

    def __init__(self, ctx: Context, tokenizer: Any, backend: str) -> None:
        self.folder, self.say, self.tracker = ctx.folder, ctx.tracker.say, ctx.tracker
        self.chosen, self.textgen = ctx.settings(PretrainSettings), ctx.settings(TextgenSettings)
        self.backend, self.end = tokenizer.backend_tokenizer, int(tokenizer.eos_token_id)
        url = self.textgen.spool or str(ctx.folder / SPOOL)
        self.reader = ShardReader(ShardQueue(url, say=self.say), say=self.say)
        self.pool = GeneratorPool(self.textgen, url, ctx.folder / FLEET, backend, self.say)
        self.store = None
        if self.chosen.keep:
            self.store = store_of(ctx.settings(StoreSettings), ctx.folder / STORE / DATA)
        self.ctx = ctx
        self.nats, self.scored = 0.0, 0
        self.begun = time.monotonic()
        self._steps: StreamingDataset | None = None

    @property
    def extra_state(self) -> GeneratedStream:
        """The extra checkpoint state: the position of the stream."""
        return self

    def __enter__(self) -> GeneratedStream:
        self.pool.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.pool.stop()
        if kind is None:  # After an error, the same command resumes from these files.
            self.reader.let_go_before(self.reader.position)
            for name in (SPOOL, FLEET, HELD):
                path = self.folder / name
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def encode(self, document: Document) -> Ids:
        """Token IDs of a document, without an end token if it was truncated at the length limit."""
        ids = self.backend.encode(document.text, add_special_tokens=False).ids
        return np.asarray([self.end, *ids, *[self.end] * document.ended], np.int64)

    def held(self) -> list[Ids]:
        """Token IDs of the held-out documents: the first of the stream; waits until there are enough of them."""
        path = self.folder / HELD
        if not path.exists():
            self.reader.go_on({})  # Restart at the beginning of every stream.
            documents = self._first()
            part = path.with_suffix(".part")
            part.write_text(json.dumps({"position": self.reader.position, "documents": [asdict(d) for d in documents]}))
            part.replace(path)
        kept = json.loads(path.read_text())
        if not complete_checkpoints(self.folder):  # A checkpoint restores its own position.
            self.reader.go_on(kept["position"])
        self.reader.let_go_before(kept["position"])
        documents = [Document(**document) for document in kept["documents"]]
        for document in documents:
            if document.logprob is not None:
                self.nats -= document.logprob
                self.scored += len(self.encode(document)) - 1
        return [self.encode(document) for document in documents]

    def _first(self) -> list[Document]:
        self.say(f"waiting for {self.chosen.validation_tokens:,} tokens, which are held out for validation")
        found: list[Document] = []
        tokens = 0
        while tokens < self.chosen.validation_tokens:
            self.pool.watch()
            for _, documents in self.reader.everything():
                found += documents
                tokens += sum(len(self.encode(document)) - 1 for document in documents)
                if tokens >= self.chosen.validation_tokens:
                    break
            else:
                time.sleep(LOOK_S)
        return found

    def steps(self, rows: int, passes: int, steps: int) -> StreamingDataset:
        """The batches of the training."""
        chosen = self.chosen
        window = ReplayBuffer(chosen.window_tokens, chosen.max_epochs, chosen.seed)
        self._steps = StreamingDataset(
            self.reader,
            self.encode,
            window,
            context=chosen.context,
            rows=rows,
            passes=passes,
            steps=steps,
            alive=self.pool.watch,
        )
        return self._steps

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the position of the stream into a checkpoint."""
        assert self._steps is not None
        (checkpoint / STREAM).write_text(json.dumps(self._steps.state(step)))

    def load(self, checkpoint: Path, step: int) -> None:
        """Restore the position of the stream from a checkpoint."""
        assert self._steps is not None
        self._steps.load(step, json.loads((checkpoint / STREAM).read_text()))

    def saved(self, checkpoint: Path) -> None:
        """Delete all shards that no checkpoint needs any longer."""
        kept = [json.loads(path.read_text()) for path in self.folder.glob(f"checkpoint-*/{STREAM}")]
        needed = {group["name"] for state in kept for group in state["window"]["groups"]}
        oldest = min(kept, key=lambda state: sum(state["position"].values()))["position"]
        self._keep(oldest)
        self.reader.let_go_before(oldest, needed)

    def _keep(self, until: Mapping[str, int]) -> None:
        """Offer the documents read before a position to the store, while their shards still exist."""
        if self.store is None or self.store.manifest.full:
            return
        for name, documents in self.reader.taken_between(self.store.manifest.position, until):
            self.store.offer(documents, name.stream, name.number + 1)
        self.store.commit()

    def figures(self, training_s: float) -> dict[str, float]:
        """Returns metrics: how often text was seen, waiting times, and the generators' loss on their own text.

        Args:
            training_s: Duration of the training in seconds.
        """
        steps, rows = self._steps, self.pool.rows()
        assert steps is not None
        times = steps.window.counted()
        seen = sum(count * tokens for count, tokens in times.items())
        fresh = sum(tokens for count, tokens in times.items() if count)
        found = {
            "stream/tokens": float(sum(times.values())),
            "stream/times_seen": seen / max(fresh, 1),
            "stream/waited_s": steps.waited_s,
            "stream/trainer_busy": 1 - steps.waited_s / max(training_s, 1e-9),
            "stream/generators_busy": sum(row["busy"] for row in rows) / max(len(rows), 1),
            "stream/generators_waited_s": sum(row["waited s"] for row in rows),
            "stream/broken_shards": float(self.reader.broken),
        }
        if self.scored:
            found["floor/loss"] = self.nats / self.scored
        return found

    def closing_figures(self, training_s: float) -> dict[str, float]:
        """Returns the metrics of the stream; also records tables and logs a recommendation.

        Args:
            training_s: Duration of the training in seconds.
        """
        found = self.figures(training_s)
        steps = self._steps
        assert steps is not None
        self._keep(self.reader.position)
        if self.store is not None and self.store.manifest.documents:
            found |= write_datasheet(self.ctx, self.store.manifest, time.monotonic() - self.begun)
        times = steps.window.counted()
        self.tracker.table("seen", [{"times": count, "tokens": tokens} for count, tokens in times.items()])
        self.tracker.table("generators", self.pool.rows())
        self.say(
            f"each token was seen {found['stream/times_seen']:.2f} times; the training waited {steps.waited_s:.0f} s"
            f" for text, the generators {found['stream/generators_waited_s']:.0f} s for queue space; "
            + advice(found["stream/trainer_busy"], found["stream/generators_waited_s"], found["stream/times_seen"])
        )
        return found


def advice(trainer_busy: float, generators_waited_s: float, times_seen: float) -> str:
    """Returns which setting to change to use the hardware better.

    Args:
        trainer_busy: Fraction of its time in which the training had text, at most 1.
        generators_waited_s: Seconds that all generators waited for space in the queue.
        times_seen: Average number of times that a token was trained on.
    """
    if trainer_busy < ENOUGH:
        return "more generators would keep it busy, or more passes over the same text (pretrain.max_epochs)"
    if generators_waited_s > 0:
        return "fewer generators would do, or a larger model"
    if times_seen > FEW:
        return "the training is kept busy by repeated text: more generators would supply fresh text"
    return "both are kept busy"
