"""Texts as token ids in memory-mapped shards, tokenized in parallel and written once, shard by shard.

A document is ``end, t1, ..., tn, end``: its first token is input only, all others are predicted. It is stored in token
chunks (``stretches``) of at most :data:`CHUNK` predictions, each with the token before its first prediction, so that
every token is predicted once. Chunks are the unit of shuffling, and each is either for training or for validation. A
shard is two files: the ids (uint16 if the vocabulary allows) and the table of its chunks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmphi.data.content_hash import file_digest
from mmphi.data.text_sources import TextPiece

CHUNK = 16384  # Maximum predictions of a chunk, which shuffling keeps together; far more than a row has.
BLOCK = 512  # Predictions of a block, the unit of the validation split.
SHARD_TOKENS = 1 << 26
BATCH_CHARACTERS = 1 << 23  # Characters per call of the tokenizer, to occupy all cores.
INDEX, SHARDS = "tokens.json", "shards.jsonl"
Ids = npt.NDArray[np.uint16 | np.uint32]


class TokenChunk(NamedTuple):
    """Columns of a shard's table of chunks."""

    start: int  # Position of the first id, which is input only.
    predictions: int  # Number of ids after it, which are predicted.
    source: int
    validation: int


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        name: Base name of its files.
        pieces: Number of its first piece in the corpus, and of the first piece after it.
        tokens: Number of predictions.
        digest: Digest of both files.
        counts: Predictions for training and for validation, by source.
        bytes: Bytes of the texts in UTF-8, by source.
    """

    name: str
    pieces: tuple[int, int]
    tokens: int
    digest: str
    counts: Mapping[str, Sequence[int]]
    bytes: Mapping[str, int]


IsHeldOut = Callable[[int, int, int], bool]


def _digest(folder: Path, name: str) -> str:
    parts = [file_digest(folder / f"{name}.{kind}.npy") for kind in ("ids", "stretches")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def whole_shards(folder: Path, say: Callable[[str], None]) -> list[Shard]:
    """Returns the intact shards of a folder; modified ones are reported by ``say``, to be built again."""
    path, whole = folder / SHARDS, []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            shard = Shard(**{**entry, "pieces": tuple(entry["pieces"])})
        except (ValueError, TypeError, KeyError):
            continue  # Blank, or truncated by a kill.
        try:
            holds = _digest(folder, shard.name) == shard.digest
        except OSError:
            holds = False
        if holds:
            whole.append(shard)
        else:
            say(f"shard {shard.name} has changed since it was written: it is built again")
    return sorted({s.name: s for s in whole}.values(), key=lambda s: s.pieces)


class BatchTokenizer:
    """Tokenizes pieces of documents in batches.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        end: Id of the end-of-text token, before, between and after documents.
    """

    def __init__(self, tokenizer: Any, end: int) -> None:
        self.backend, self.end = tokenizer.backend_tokenizer, end
        self.dtype: Any = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32

    def __call__(self, pieces: Sequence[TextPiece]) -> Iterator[Ids]:
        """Yields the ids of each piece; a document's first piece begins with ``end``, and its last one ends with it."""
        encoded = self.backend.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        for piece, one in zip(pieces, encoded, strict=True):
            before, after = [self.end] * piece.first, [self.end] * piece.last
            yield np.asarray([*before, *one.ids, *after], self.dtype)


class ShardWriter:
    """Collects the chunks of one shard, and writes it as a whole.

    Args:
        folder: Output folder.
        dtype: Data type of ids.
        is_held_out: Function of source, piece and block in the piece: whether the block of ``BLOCK`` predictions is for
            validation.
        sources: Number of sources.
    """

    def __init__(self, folder: Path, dtype: Any, is_held_out: IsHeldOut, sources: int) -> None:
        self.folder, self.dtype, self.is_held_out = folder, dtype, is_held_out
        self.bytes = [0] * sources
        self.ids: list[Ids] = []
        self.chunks: list[TokenChunk] = []
        self.size = self.tokens = 0

    def add(self, ids: Ids, source: int, piece: int, context: int, size: int) -> None:
        """Add the ids of a piece of ``size`` bytes; ``context`` is the id before it, -1 at the start of a document."""
        if context >= 0:
            ids = np.concatenate([np.asarray([context], ids.dtype), ids])
        self.bytes[source] += size
        blocks = range(-(-(len(ids) - 1) // BLOCK))
        for apart, same in itertools.groupby(blocks, lambda block: self.is_held_out(source, piece, block)):
            places = list(same)
            begin, end = places[0] * BLOCK, min((places[-1] + 1) * BLOCK, len(ids) - 1)
            for first in range(begin, end, CHUNK):
                part = ids[first : min(first + CHUNK, end) + 1]
                self.chunks.append(TokenChunk(self.size, len(part) - 1, source, int(apart)))
                self.ids.append(part)
                self.size += len(part)
                self.tokens += len(part) - 1

    def write(self, name: str, pieces: tuple[int, int], sources: Sequence[str]) -> Shard:
        """Write the shard atomically, and append it to the list of shards."""
        ids = np.concatenate(self.ids) if self.ids else np.zeros(0, self.dtype)
        chunks = np.asarray(self.chunks, np.int64).reshape(-1, len(TokenChunk._fields))
        for kind, array in (("ids", ids), ("stretches", chunks)):
            part = self.folder / f".{name}.{kind}.npy"
            with part.open("wb") as file:
                np.save(file, array)
            part.replace(self.folder / f"{name}.{kind}.npy")
        counts = {}
        for number, source in enumerate(sources):
            own = chunks[chunks[:, 2] == number]
            counts[source] = [int(own[own[:, 3] == apart, 1].sum()) for apart in (0, 1)]
        sizes = dict(zip(sources, self.bytes, strict=True))
        shard = Shard(name, pieces, self.tokens, _digest(self.folder, name), counts, sizes)
        with (self.folder / SHARDS).open("a") as file:
            file.write("\n" + json.dumps(asdict(shard)) + "\n")  # A kill may have truncated the line before.
        return shard


class ShardTokenizer:
    """Tokenizes texts into shards; intact shards of an earlier call are kept.

    Args:
        folder: Output folder.
        sources: Functions that read the pieces of each source, by name; they yield the same at every call.
        tokenizer: A fast Hugging Face tokenizer.
        is_held_out: Function of source, piece and block in the piece: whether the block of ``BLOCK`` predictions is for
            validation.
        say: Called with a message about each modified shard.
        progress: Called with the number of new predictions.
        shard_tokens: Number of predictions at which a shard is closed.
    """

    def __init__(
        self,
        folder: Path,
        sources: Mapping[str, Callable[[], Iterable[TextPiece]]],
        tokenizer: Any,
        *,
        is_held_out: IsHeldOut,
        say: Callable[[str], None] = print,
        progress: Callable[[int], object] = lambda _: None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder, self.sources, self.progress, self.shard_tokens = folder, sources, progress, shard_tokens
        self.encoder, self.is_held_out = BatchTokenizer(tokenizer, tokenizer.eos_token_id), is_held_out
        self.done = {shard.pieces[0]: shard for shard in whole_shards(folder, say)}
        self.shards: list[Shard] = []
        self.context = -1  # The last id before the next piece, used if that piece continues a document.
        self._begin(0)

    def _begin(self, piece: int) -> None:
        self.begun, self.waiting = piece, list[tuple[int, int, TextPiece]]()
        self.writer = ShardWriter(self.folder, self.encoder.dtype, self.is_held_out, len(self.sources))

    def __call__(self) -> list[Shard]:
        """Read all texts, write the missing shards, and return all shards."""
        until = number = 0
        for source, read in enumerate(self.sources.values()):
            for piece in read():
                if number in self.done:
                    self._close(number)
                    until = self._take(self.done[number])
                if number >= until:
                    self.waiting.append((number, source, piece))
                    if sum(len(p.text) for _, _, p in self.waiting) >= BATCH_CHARACTERS:
                        self._encode()
                        if self.writer.tokens >= self.shard_tokens:
                            self._close(number + 1)
                number += 1
        self._close(number)
        return self.shards

    def _take(self, shard: Shard) -> int:
        """Continue after an existing shard."""
        self.shards.append(shard)
        self.progress(shard.tokens)
        self.context = int(np.load(self.folder / f"{shard.name}.ids.npy", mmap_mode="r")[-1])
        self._begin(shard.pieces[1])
        return shard.pieces[1]

    def _encode(self) -> None:
        for (number, source, piece), ids in zip(
            self.waiting, self.encoder([piece for _, _, piece in self.waiting]), strict=True
        ):
            before = self.writer.tokens
            self.writer.add(ids, source, number, -1 if piece.first else self.context, len(piece.text.encode()))
            self.context = int(ids[-1]) if len(ids) else self.context
            self.progress(self.writer.tokens - before)
        self.waiting = []

    def _close(self, until: int) -> None:
        self._encode()
        if until > self.begun and self.writer.tokens:
            self.shards.append(self.writer.write(f"{self.begun:08d}", (self.begun, until), list(self.sources)))
        self._begin(until)


class TokenShards:
    """The token chunks of a corpus, memory-mapped.

    Args:
        folder: Folder of the shards.
        shards: Names of the shards.

    Attributes:
        chunks: Chunks of all shards, int64 (N, 5): shard, start, predictions, source, validation.
    """

    def __init__(self, folder: Path, shards: Sequence[str]) -> None:
        self._ids: list[Any] = [np.load(folder / f"{name}.ids.npy", mmap_mode="r") for name in shards]
        tables = [np.load(folder / f"{name}.stretches.npy") for name in shards]
        columns = [np.column_stack([np.full(len(table), i), table]) for i, table in enumerate(tables)]
        self.chunks = np.concatenate(columns) if columns else np.zeros((0, 5), np.int64)

    def of(self, source: int, *, validation: bool = False) -> npt.NDArray[np.int64]:
        """Returns the indices of a source's chunks for training or validation."""
        table = self.chunks
        return np.flatnonzero((table[:, 3] == source) & (table[:, 4] == int(validation)))

    def lengths(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the number of predictions of each chosen chunk."""
        lengths: npt.NDArray[np.int64] = self.chunks[chosen, 2]
        return lengths

    def ids(self, chunk: int, first: int = 0, predictions: int | None = None) -> Ids:
        """Returns the ids of a part of a chunk, one more than the number of predictions."""
        shard, start, count = self.chunks[chunk, :3]
        upto = count if predictions is None else first + predictions
        part: Ids = self._ids[shard][start + first : start + upto + 1]
        return part
