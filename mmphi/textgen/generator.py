"""Generator process: samples documents from a model and writes them to a shard queue."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mmphi.allocator import keep_freed_memory
from mmphi.config.textgen import TextgenSettings
from mmphi.textgen.backends import Generation, SamplingConfig, SamplingRequest
from mmphi.textgen.prompts import Prompts
from mmphi.textgen.shards import Document, ShardName, encode_shard

BEGINNING = "<|endoftext|>"  # Separator of the training documents of GPT-2 and its successors.
STOP = "stop"  # A file that requests all generators to stop.
TELL_S = 5.0
SHARD_S = 60.0  # Maximum age of an open shard, so that readers do not wait for a full one.
HALF = "�"


@dataclass(frozen=True)
class GeneratorConfig:
    """Configuration of a generator.

    Attributes:
        settings: Text generation settings.
        stream: Name of the stream that it writes; unique for each start.
        backend: Sampling backend.
        threads: CPU threads; 0 keeps torch's default.
    """

    settings: dict[str, Any]
    stream: str
    backend: str
    threads: int = 0


@dataclass(frozen=True)
class GeneratorStatus:
    """Progress of a generator.

    Attributes:
        documents: Documents written to the queue.
        tokens: Tokens in them.
        drawn: Tokens of all completed texts, including those in an open shard and dropped ones.
        shards: Shards written.
        dropped: Texts that are not documents, by reason.
        ready_s: Seconds until generation began.
        busy_s: Seconds of generation.
        waited_s: Seconds of waiting for the queue.
    """

    documents: int = 0
    tokens: int = 0
    drawn: int = 0
    shards: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    ready_s: float = 0.0
    busy_s: float = 0.0
    waited_s: float = 0.0

    def __add__(self, other: GeneratorStatus) -> GeneratorStatus:
        dropped = Counter(self.dropped)
        dropped.update(other.dropped)
        return GeneratorStatus(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.drawn + other.drawn,
            self.shards + other.shards,
            dict(dropped),
            self.ready_s + other.ready_s,
            self.busy_s + other.busy_s,
            self.waited_s + other.waited_s,
        )


class ShardSink(Protocol):
    """Destination for generated shards, and the stop signal."""

    @property
    def waited_s(self) -> float:
        """Seconds of waiting for room."""

    def put(self, name: ShardName, content: bytes) -> bool:
        """Write a shard as soon as there is room; returns False if stopped before."""

    def tell(self, status: GeneratorStatus) -> None:
        """Report the generator's progress."""

    def stopping(self) -> bool:
        """Whether the generator should stop."""


class FolderSink:
    """Sink of a local process: a shard queue, and a folder for its status and the stop signal.

    Args:
        spool: URL of the shard queue.
        limit: Maximum number of bytes that wait in the queue.
        status: File for the status; a file ``stop`` in the same folder requests the generator to stop.
        parent: ID of the parent process; the generator stops when its parent is another one.
    """

    def __init__(self, spool: str, limit: int, status: Path, parent: int) -> None:
        from mmphi.textgen.shard_queue import ShardQueue

        self.status, self.parent = status, parent
        self.spool = ShardQueue(spool, limit, stopping=self.stopping)

    def put(self, name: ShardName, content: bytes) -> bool:
        """See :class:`ShardSink`."""
        return self.spool.put(name, content)

    @property
    def waited_s(self) -> float:
        """See :class:`ShardSink`."""
        return self.spool.waited_s

    def tell(self, status: GeneratorStatus) -> None:
        """See :class:`ShardSink`; the file is replaced atomically."""
        part = self.status.with_suffix(".part")
        part.write_text(json.dumps(asdict(status)))
        part.replace(self.status)

    def stopping(self) -> bool:
        """See :class:`ShardSink`."""
        return (self.status.parent / STOP).exists() or os.getppid() != self.parent


class PromptStream:
    """Endless stream of sampling requests, prompted and free by their shares; no prompt repeats until all were used.

    Args:
        settings: Text generation settings.
        stream: Name of the stream, which seeds the order.
        language: Language model whose prompt format and tokenizer are used.
    """

    def __init__(self, settings: TextgenSettings, stream: str, language: Any) -> None:
        self.settings, self.stream, self.language = settings, stream, language
        self.prompts = Prompts(f"{settings.seed}/{stream}")
        self.open_prompts: dict[str, str] = {}  # Prompts of open requests, by ID.
        tokenizer = language.tokenizer
        place = tokenizer.get_vocab().get(BEGINNING, tokenizer.bos_token_id)
        self.begin: int = tokenizer.eos_token_id if place is None else place
        self.ends = tuple(dict.fromkeys([*language.ends, self.begin]))

    def __iter__(self) -> Iterator[SamplingRequest]:
        draw = random.Random(f"{self.settings.seed}/{self.stream}/kinds")
        number = prompted = 0
        while True:
            name = f"{self.stream}/{number}"
            prompt, ids = "", (self.begin,)
            if draw.random() < self.settings.prompted:
                prompt = self.prompts[prompted]
                prompted += 1
                ids = tuple(i for part in self.language.prompt.parts([(prompt, None)]) for i in part.ids)
            self.open_prompts[name] = prompt
            yield SamplingRequest(name, ids, self.ends, self.settings.max_tokens)
            number += 1


def document_of(written: Generation, wants: PromptStream, seed: int, unmodified: bool) -> Document | str:
    """Returns a generated text as a document, or the reason why it is not one."""
    prompt = wants.open_prompts.pop(written.id)
    ended = written.ids[-1] in wants.ends
    language = wants.language
    text = language.tokenizer.decode(written.ids[: len(written.ids) - ended], skip_special_tokens=True)
    text = text.rstrip(HALF).strip()  # A truncated text may end within a multi-byte character.
    if not text:
        return "nothing written"
    if not math.isfinite(written.logprob):
        return "no finite log-probability"
    logprob = written.logprob if unmodified else None
    name, digest = language.name, language.digest
    return Document(written.id, text, prompt, seed, name, digest, logprob, len(written.ids), ended)


def write_shards(order: GeneratorConfig, pool: ShardSink) -> None:
    """Generate documents and write shards until stopped.

    Args:
        order: Configuration of the generator.
        pool: Destination of shards and status.
    """
    import torch

    from mmphi.config.shared import LanguageSettings
    from mmphi.models.device import this_device
    from mmphi.models.language.language_model import load_language_model
    from mmphi.textgen.backends import make_sampler

    if order.threads:
        torch.set_num_threads(order.threads)
    begun = time.monotonic()
    settings = TextgenSettings(**order.settings)
    chosen = LanguageSettings(
        model=settings.model, revision=settings.revision, tokenizer=settings.tokenizer, precision=settings.precision
    )
    language = load_language_model(chosen, None, this_device())
    seed = random.Random(f"{settings.seed}/{order.stream}").getrandbits(31)
    torch.manual_seed(seed)
    draw = SamplingConfig(settings.temperature, settings.top_p, settings.top_k, seed)
    wants = PromptStream(settings, order.stream, language)
    longest = settings.max_tokens + max(len(wanted.ids) for wanted, _ in zip(wants, range(256), strict=False)) + 64
    wants = PromptStream(settings, order.stream, language)
    model = settings.model if order.backend == "vllm" else language.model
    write = make_sampler(order.backend, model, draw, settings.batch, longest)
    status = GeneratorStatus(ready_s=time.monotonic() - begun)
    pool.tell(status)
    shard: list[Document] = []
    dropped: Counter[str] = Counter()
    drawn = 0
    opened = since = time.monotonic()
    for written in write(iter(wants)):
        drawn += len(written.ids)
        made = document_of(written, wants, seed, draw.unmodified)
        if isinstance(made, str):
            dropped[made] += 1
        else:
            shard.append(made)
        now, ending = time.monotonic(), pool.stopping()
        closing = bool(shard) and (ending or len(shard) == settings.shard_documents or now - opened > SHARD_S)
        if closing and not pool.put(ShardName(order.stream, status.shards), encode_shard(shard)):
            return
        if closing or now - since > TELL_S:
            closed = shard if closing else []
            status = replace(
                status,
                shards=status.shards + closing,
                documents=status.documents + len(closed),
                tokens=status.tokens + sum(document.tokens for document in closed),
                drawn=drawn,
                dropped=dict(dropped),
                busy_s=status.busy_s + now - since,
                waited_s=pool.waited_s,
            )
            pool.tell(status)
            since = time.monotonic()
        if ending:
            return
        if closing:
            shard, opened = [], time.monotonic()


def main(written: Path) -> None:
    """Run a generator with the configuration in a file."""
    keep_freed_memory()
    order, spool, status, parent = json.loads(written.read_text())
    limit = int(TextgenSettings(**order["settings"]).spool_mb * 1e6)
    write_shards(GeneratorConfig(**order), FolderSink(spool, limit, Path(status), parent))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
