"""Documents, and the shards that hold them: JSON lines compressed by zstandard, which `datasets` can read.

The name of a shard contains its stream and its number in the stream. Numbers have no gaps, so that one number per
stream is a reader's position.
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
    """A text and its origin.

    Attributes:
        id: Unique ID: stream and number.
        text: The text.
        prompt: The prompt; empty for a text that follows the begin-of-text token alone.
        seed: Seed of the random numbers of its stream; 0 for imported texts.
        generator: Name of the model that generated it, or of the source of an imported text.
        digest: Digest of that model; empty for imported texts.
        logprob: Sum of the tokens' log-probabilities under the generator, given the prompt, in nats; at most 0. None
            for imported texts, and if sampling was modified (top-p, top-k, another temperature).
        tokens: Number of generator tokens, including the end token; 0 for imported texts.
        ended: Whether it ended by an end token, and not by the length limit.
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
    """Name of a shard.

    Attributes:
        stream: Host, number of the generator and number of its start, such as ``host-3-1``.
        number: Number in the stream, from 0 on.
    """

    stream: str
    number: int

    def __str__(self) -> str:
        return f"{self.stream}-{self.number:06d}{SUFFIX}"

    @classmethod
    def parse(cls, name: str) -> ShardName | None:
        """Parse a file name; returns ``None`` if it is not a shard."""
        found = NAME.match(name)
        return cls(found["stream"], int(found["number"])) if found else None


def encode_shard(documents: Iterable[Document]) -> bytes:
    """Returns documents as the content of a shard; equal documents give equal bytes."""
    lines = "".join(json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents)
    content: bytes = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(lines.encode())
    return content


def decode_shard(content: bytes, name: str) -> list[Document]:
    """Returns the documents of a shard.

    Raises:
        DataError: If the content is truncated or damaged.
    """
    try:
        lines = zstandard.ZstdDecompressor().decompressobj()
        text = lines.decompress(content)
        if not lines.eof:
            raise DataError(f"{name} is truncated")
        # Not by `splitlines`: it splits at characters that are not escaped in JSON, such as U+2028.
        return [Document(**json.loads(line)) for line in text.decode().split("\n") if line]
    except (zstandard.ZstdError, ValueError, TypeError) as error:
        raise DataError(f"{name} is not a valid shard: {error}") from error
