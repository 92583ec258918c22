"""One process that writes: a model, what it is asked for, and the spool that its shards go to."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmphi.settings.textgen import TextgenSettings
from mmphi.textgen.documents import Document, ShardName, packed
from mmphi.textgen.prompts import Prompts
from mmphi.textgen.sampling import Draw, Wanted, Written

BEGINNING = "<|endoftext|>"  # What stands between the documents that GPT-2's and its successors' models were shown.
SHARD_S = 60.0  # A shard is closed after so long, however few documents it has: readers wait for it.
HALF = "�"


@dataclass(frozen=True)
class Order:
    """What a generator is told.

    Attributes:
        settings: Of the writing.
        spool: Its URL.
        stream: Name of what this start of it writes.
        status: File that it tells its state in.
        backend: What draws the tokens.
        threads: Of the processor; 0 leaves it.
        parent: Process without which it ends.
        options: Of the spool's file system.
    """

    settings: dict[str, Any]
    spool: str
    stream: str
    status: str
    backend: str
    threads: int = 0
    parent: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Status:
    """How far a generator is.

    Attributes:
        documents: Written to the spool.
        tokens: In them.
        shards: Written.
        dropped: Texts that were no document, by reason.
        ready_s: Seconds until it began to write.
        busy_s: Seconds in which it wrote.
        waited_s: Seconds in which the spool had no room.
    """

    documents: int = 0
    tokens: int = 0
    shards: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    ready_s: float = 0.0
    busy_s: float = 0.0
    waited_s: float = 0.0

    def write(self, path: Path) -> None:
        """Write it so that it is never seen by halves."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)))
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Status:
        """What a generator told last; nothing yet where there is no file."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError):
            return cls()


class Wants:
    """What is asked for, text after text: prompted and free ones by their shares, no prompt twice in a row of all.

    Args:
        settings: Of the writing.
        stream: Name, on which the order hangs.
        language: Whose tokens are written.
    """

    def __init__(self, settings: TextgenSettings, stream: str, language: Any) -> None:
        self.settings, self.stream, self.language = settings, stream, language
        self.prompts = Prompts(f"{settings.seed}/{stream}")
        self.asked: dict[str, str] = {}  # The prompts of those that are being written.
        tokenizer = language.tokenizer
        place = tokenizer.get_vocab().get(BEGINNING, tokenizer.bos_token_id)
        self.begin: int = tokenizer.eos_token_id if place is None else place
        self.ends = tuple(dict.fromkeys([*language.ends, self.begin]))

    def __iter__(self) -> Iterator[Wanted]:
        draw = random.Random(f"{self.settings.seed}/{self.stream}/kinds")
        number = prompted = 0
        while True:
            name = f"{self.stream}/{number}"
            prompt, ids = "", (self.begin,)
            if draw.random() < self.settings.prompted:
                prompt = self.prompts[prompted]
                prompted += 1
                ids = tuple(i for part in self.language.prompt.parts([(prompt, None)]) for i in part.ids)
            self.asked[name] = prompt
            yield Wanted(name, ids, self.ends, self.settings.max_tokens)
            number += 1


def document_of(written: Written, wants: Wants, seed: int, as_it_is: bool) -> Document | str:
    """A text as a document; or why it is none."""
    prompt = wants.asked.pop(written.id)
    ended = written.ids[-1] in wants.ends
    language = wants.language
    text = language.tokenizer.decode(written.ids[: len(written.ids) - ended], skip_special_tokens=True)
    text = text.rstrip(HALF).strip()  # A letter may be cut in two where a text is cut off.
    if not text:
        return "nothing written"
    if not math.isfinite(written.logprob):
        return "no finite log-probability"
    logprob = written.logprob if as_it_is else None
    name, digest = language.name, language.digest
    return Document(written.id, text, prompt, seed, name, digest, logprob, len(written.ids), ended)


def generate(order: Order) -> None:
    """Write until told to end: by the file ``stop`` beside the status, or because nobody is there any longer."""
    import torch

    from mmphi.models.device import this_device
    from mmphi.models.language import load_language
    from mmphi.settings.shared import LanguageSettings
    from mmphi.textgen.sampling import sampler
    from mmphi.textgen.spool import Spool

    if order.threads:
        torch.set_num_threads(order.threads)
    begun = time.monotonic()
    settings = TextgenSettings(**order.settings)
    status, path = Status(), Path(order.status)

    def stopping() -> bool:
        return (path.parent / "stop").exists() or (bool(order.parent) and os.getppid() != order.parent)

    spool = Spool(order.spool, int(settings.spool_mb * 1e6), stopping=stopping, **order.options)
    chosen = LanguageSettings(
        model=settings.model, revision=settings.revision, tokenizer=settings.tokenizer, precision=settings.precision
    )
    language = load_language(chosen, None, this_device())
    seed = random.Random(f"{settings.seed}/{order.stream}").getrandbits(31)
    torch.manual_seed(seed)
    draw = Draw(settings.temperature, settings.top_p, settings.top_k, seed)
    wants = Wants(settings, order.stream, language)
    longest = settings.max_tokens + max(len(wanted.ids) for wanted, _ in zip(wants, range(256), strict=False)) + 64
    wants = Wants(settings, order.stream, language)
    model = settings.model if order.backend == "vllm" else language.model
    write = sampler(order.backend, model, draw, settings.batch, longest)
    status.ready_s = time.monotonic() - begun
    status.write(path)
    shard: list[Document] = []
    opened, since = time.monotonic(), time.monotonic()
    for written in write(iter(wants)):
        made = document_of(written, wants, seed, draw.as_it_is)
        if isinstance(made, str):
            status.dropped[made] = status.dropped.get(made, 0) + 1
            continue
        shard.append(made)
        ending = stopping()
        if not ending and len(shard) < settings.shard_documents and time.monotonic() - opened < SHARD_S:
            continue
        now = time.monotonic()
        if not spool.put(ShardName(order.stream, status.shards), packed(shard)):
            return
        status.shards += 1
        status.documents += len(shard)
        status.tokens += sum(document.tokens for document in shard)
        status.busy_s += now - since
        status.waited_s = spool.waited_s
        status.write(path)
        if ending:
            return
        shard, opened, since = [], time.monotonic(), time.monotonic()


if __name__ == "__main__":
    generate(Order(**json.loads(Path(sys.argv[1]).read_text())))
