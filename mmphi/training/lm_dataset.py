"""Batches of pretraining on a tokenized corpus.

A row is ``context`` predictions of one source's stream: its token chunks end to end in a seeded order, shuffled again
in every epoch. Rows are cut at a fixed length, so that there is no padding and every token is predicted once per epoch;
attention is limited to the part of each document in the row. Rows are assigned to sources by their weights, so that at
any step every source has received its share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmphi.data.token_shards import TokenShards
from mmphi.errors import DataError

Indices = npt.NDArray[np.int64]


class TokenStream:
    """Endless stream of the predictions of one source; position p is in epoch ``p // tokens``.

    Args:
        tokens: Token shards of the corpus.
        source: Index of the source.
        seed: Seed of the order.
    """

    def __init__(self, tokens: TokenShards, source: int, seed: int) -> None:
        self.data, self.source, self.seed = tokens, source, seed
        self.chunks = tokens.of(source)
        self.tokens = int(tokens.lengths(self.chunks).sum())
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> tuple[Indices, Indices]:
        """Chunks in the order of an epoch, and the cumulative number of predictions after each."""
        order = self.chunks[np.random.default_rng([self.seed, self.source, epoch]).permutation(len(self.chunks))]
        return order, np.cumsum(self.data.lengths(order))

    def parts(self, position: int, count: int) -> list[npt.NDArray[np.int64]]:
        """Returns token IDs of document parts: ``count`` predictions, and one more ID per part than predictions."""
        found = []
        while count:
            epoch, offset = divmod(position, self.tokens)
            order, ends = self._order(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            first = offset - (int(ends[place - 1]) if place else 0)
            taken = min(count, int(ends[place]) - offset)
            found.append(self.data.ids(int(order[place]), first, taken).astype(np.int64))
            position, count = position + taken, count - taken
        return found


class SourceScheduler:
    """Assigns each row to the source that is furthest behind its share.

    Args:
        weights: Relative share of each source.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = np.asarray(weights, np.float64) / sum(weights)
        self._source: list[int] = []
        self._before: list[int] = []  # Earlier rows of the same source, by row.
        self._had = np.zeros(len(self.shares), np.int64)

    def __getitem__(self, row: int) -> tuple[int, int]:
        """Returns the source of a row, and the number of earlier rows of that source."""
        while len(self._source) <= row:
            behind = self.shares * (len(self._source) + 1) - self._had
            source = int(np.argmax(behind))
            self._source.append(source)
            self._before.append(int(self._had[source]))
            self._had[source] += 1
        return self._source[row], self._before[row]


def pack_row(parts: Sequence[npt.NDArray[np.int64]]) -> dict[str, npt.NDArray[np.int64]]:
    """Returns document parts end to end in one row."""
    lengths = [len(part) - 1 for part in parts]
    return {
        "input_ids": np.concatenate([part[:-1] for part in parts]),
        "targets": np.concatenate([part[1:] for part in parts]),
        "position_ids": np.concatenate([np.arange(n) for n in lengths]),
        "segments": np.repeat(np.arange(len(parts)), lengths),
        "lengths": np.asarray(lengths),
    }


def stack_rows(rows: Sequence[Mapping[str, npt.NDArray[np.int64]]], step_tokens: int) -> dict[str, Tensor]:
    """Stack rows of equal length into a batch.

    Returns:
        ``input_ids``, ``targets``, ``position_ids`` and ``segments``, each int64 (R, T); ``borders`` int32, the
        start of each document in the flattened rows and the end of the last one; ``step_tokens``.
    """
    names = ("input_ids", "targets", "position_ids", "segments")
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in names}
    lengths = np.concatenate([row["lengths"] for row in rows])
    batch["borders"] = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    batch["step_tokens"] = torch.tensor(float(step_tokens))
    return batch


class LMDataset(Dataset[dict[str, Tensor]]):
    """Batches of every optimiser step, by index, as a pure function of corpus, seed and step.

    Batch ``i`` belongs to step ``i // passes``. A step has the same rows for any number of passes.

    Args:
        tokens: Token shards of the corpus.
        weights: Relative share of each source; if all are 0, the sources' sizes are used.
        context: Predictions per row.
        rows: Rows per step.
        passes: Forward passes per step, over all processes; must divide ``rows``.
        steps: Maximum number of steps.
        seed: Seed of the order.

    Raises:
        DataError: If a source has no training tokens.
    """

    def __init__(
        self,
        tokens: TokenShards,
        weights: Sequence[float],
        *,
        context: int,
        rows: int,
        passes: int,
        steps: int,
        seed: int,
    ) -> None:
        if rows % passes:
            raise ValueError(f"{rows} rows cannot be spread evenly over {passes} forward passes")
        self.streams = [TokenStream(tokens, source, seed) for source in range(len(weights))]
        if not all(stream.tokens for stream in self.streams):
            raise DataError(
                "a source of the corpus has no training tokens", "add text to it, or remove it from the sources"
            )
        self.tokens = sum(stream.tokens for stream in self.streams)
        self.turns = SourceScheduler(weights if any(weights) else [stream.tokens for stream in self.streams])
        self.context, self.rows, self.passes, self.steps = context, rows, passes, steps

    def __len__(self) -> int:
        return self.steps * self.passes

    def row(self, number: int) -> dict[str, npt.NDArray[np.int64]]:
        """Returns a row by its number since the beginning of the training."""
        source, before = self.turns[number]
        return pack_row(self.streams[source].parts(before * self.context, self.context))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        each = self.rows // self.passes
        first = index * each
        return stack_rows([self.row(number) for number in range(first, first + each)], self.rows * self.context)
