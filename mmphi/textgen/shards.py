"""What a generator wrote, and the shards that carry it: JSON lines, compressed by zstandard, as `datasets` reads.

A shard's name says which stream of a generator it is of and which number it has there; a stream's shards are numbered
without gaps, so that whoever reads them knows by one number per stream what it has had.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import zstandard

from mmphi.errors import DataError

SUFFIX = ".jsonl.zst"
LEVEL = 10
HOST = re.compile(r"[\w.]+")
NAME = re.compile(rf"(?P<stream>{HOST.pattern}-\d+-\d+)-(?P<number>\d{{6,}}){re.escape(SUFFIX)}$")


@dataclass(frozen=True)
class Document:
    """A text and where it comes from.

    Attributes:
        id: Stream and number, unlike any other's.
        text: What was written.
        prompt: What was asked for; empty where nothing was, and the text follows the begin of text alone.
        seed: Of the random numbers of the shard that it was drawn with.
        generator: Name of the model that wrote it.
        digest: Of that model.
        logprob: Of its tokens under the generator, given the prompt, in nats: the sum, at most 0. None where
            tokens were not drawn from the generator as it is (top-p, top-k, another temperature).
        tokens: The generator's, the one that ends it among them.
        ended: Whether it came to its end by itself, and not by its length.
    """

    id: str
    text: str
    prompt: str
    seed: int
    generator: str
    digest: str
    logprob: float | None
    tokens: int
    ended: bool


class ShardName(NamedTuple):
    """A shard's name.

    Attributes:
        stream: Host, generator and its start, ``host-3-1``.
        number: In the stream, from 0 on.
    """

    stream: str
    number: int

    def __str__(self) -> str:
        return f"{self.stream}-{self.number:06d}{SUFFIX}"

    @classmethod
    def parse(cls, name: str) -> ShardName | None:
        """Of a file's name; ``None`` where it is no shard."""
        found = NAME.match(name)
        return cls(found["stream"], int(found["number"])) if found else None


def encode_shard(documents: Iterable[Document]) -> bytes:
    """Documents as a shard's content; the same documents give the same bytes."""
    lines = "".join(json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents)
    content: bytes = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(lines.encode())
    return content


def decode_shard(content: bytes, name: str) -> list[Document]:
    """The documents of a shard.

    Raises:
        DataError: If it is cut off or changed.
    """
    try:
        lines = zstandard.ZstdDecompressor().decompressobj()
        text = lines.decompress(content)
        if not lines.eof:
            raise DataError(f"{name} is cut off")
        # Not by `splitlines`: it ends lines at characters that stand in a text as they are, such as U+2028.
        return [Document(**json.loads(line)) for line in text.decode().split("\n") if line]
    except (zstandard.ZstdError, ValueError, TypeError) as error:
        raise DataError(f"{name} is no whole shard: {error}") from error
