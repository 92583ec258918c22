"""Corpus store: documents that pass the filters, without duplicates, up to a size.

Results are on disk before their sources are deleted from the shard queue: a ledger, replaced atomically, records the
store's shards, the position in every source, and what was dropped. A killed process resumes from the ledger.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmphi.errors import StoreError
from mmphi.textgen.dedup import Deduplicator
from mmphi.textgen.quality import Quality
from mmphi.textgen.shards import SUFFIX, Document, decode_shard, encode_shard

LEDGER = "store.json"
SHARD_BYTES = 4_000_000  # Characters of a shard, before compression.
COMMIT_S = 60.0
EXAMPLES = 3
SHOWN = 200  # Characters of an example.


@dataclass
class CorpusManifest:
    """Contents of a store, and counts of what was dropped.

    Attributes:
        shards: Name, compressed bytes, documents and SHA-256 digest of each shard.
        position: Number of documents or shards read, by source.
        documents: Number of documents kept.
        characters: Characters in them.
        tokens: Generator tokens in them.
        nats: Sum of their log-probabilities (negative), by kind: ``prompted`` or ``free``.
        scored: Tokens of the documents with a log-probability, by kind.
        generators: Number of documents by generator and model digest.
        dropped: Number of documents dropped, by reason.
        unread: Records of each source that are not documents, by reason; included in ``dropped``.
        examples: Examples of dropped documents by reason: ID, beginning of the text, and ID of the original of a copy.
        content: Digest of all kept documents, in order.
        full: Whether the size limit is reached.
    """

    shards: list[dict[str, Any]] = field(default_factory=list)
    position: dict[str, int] = field(default_factory=dict)
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    nats: dict[str, float] = field(default_factory=dict)
    scored: dict[str, int] = field(default_factory=dict)
    generators: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    unread: dict[str, dict[str, int]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    content: str = ""
    full: bool = False

    @property
    def bytes(self) -> int:
        """Compressed size of all shards."""
        return sum(int(shard["bytes"]) for shard in self.shards)

    @property
    def digest(self) -> str:
        """Digest of all kept documents, in order; independent of shard boundaries."""
        return self.content


class CorpusStore:
    """Keeps documents that pass the quality filters and are not duplicates.

    Args:
        folder: Folder of the store; existing results are kept.
        limit: Maximum size of the compressed shards, in bytes.
        quality: Quality filters.
        language: ISO 639-3 code of the language.

    Raises:
        StoreError: If an existing shard is missing or changed.
    """

    def __init__(self, folder: Path, limit: int, quality: Quality, language: str = "eng") -> None:
        self.folder, self.limit, self.quality = folder, limit, quality
        folder.mkdir(parents=True, exist_ok=True)
        self.manifest = CorpusManifest()
        if (folder / LEDGER).exists():
            self.manifest = CorpusManifest(**json.loads((folder / LEDGER).read_text()))
        self.copies = Deduplicator(language)
        for document in stored(folder):
            self.copies.keep(document.text, document.id)
        self._open: list[Document] = []
        self._open_bytes, self._committed = 0, time.monotonic()

    def offer(self, documents: Sequence[Document], source: str, position: int) -> None:
        """Filter documents and keep the good ones; ``position`` is the position in ``source`` after them."""
        for document in documents:
            if self.manifest.full:
                break
            if (why := self._judge(document)) is None:
                self.copies.keep(document.text, document.id)
                self._open.append(document)
                self._open_bytes += len(document.text)
            else:
                self._drop(document, *why)
        self.manifest.position[source] = position
        if self._open_bytes >= SHARD_BYTES or time.monotonic() - self._committed > COMMIT_S:
            self.commit()

    def unread(self, source: str, skipped: Mapping[str, int]) -> None:
        """Record counts of records that are not documents, since the beginning of a source; replaces earlier counts."""
        before = self.manifest.unread.get(source, {})
        for reason, count in skipped.items():
            if new := count - before.get(reason, 0):
                self.manifest.dropped[reason] = self.manifest.dropped.get(reason, 0) + new
        self.manifest.unread[source] = dict(skipped)

    def commit(self) -> None:
        """Write open documents and the ledger; sources may then delete what was read."""
        if self._open and not self.manifest.full:
            content = encode_shard(self._open)
            if self.manifest.bytes + len(content) > self.limit:
                self._open, content = self._fitting()
                self.manifest.full = True
            if self._open:
                self._write(content)
        self._open, self._open_bytes, self._committed = [], 0, time.monotonic()
        part = self.folder / f".{LEDGER}"
        part.write_text(json.dumps(asdict(self.manifest), indent=1))
        part.replace(self.folder / LEDGER)

    @property
    def committed(self) -> dict[str, int]:
        """Position in each source, according to the ledger on disk."""
        if not (self.folder / LEDGER).exists():
            return {}
        return dict(json.loads((self.folder / LEDGER).read_text())["position"])

    def _judge(self, document: Document) -> tuple[str, str] | None:
        if why := self.quality(document.text):
            return why, ""
        how, of = self.copies.of(document.text)
        return (how, of) if how else None

    def _drop(self, document: Document, why: str, of: str) -> None:
        self.manifest.dropped[why] = self.manifest.dropped.get(why, 0) + 1
        shown = self.manifest.examples.setdefault(why, [])
        if len(shown) < EXAMPLES:
            begin = document.text[:SHOWN].encode(errors="replace").decode()
            shown.append({"id": document.id, "begin": begin} | ({"copy of": of} if of else {}))

    def _fitting(self) -> tuple[list[Document], bytes]:
        """As many of the open documents as fit, and their shard."""
        low, high = 0, len(self._open)
        while low < high:
            middle = (low + high + 1) // 2
            if self.manifest.bytes + len(encode_shard(self._open[:middle])) <= self.limit:
                low = middle
            else:
                high = middle - 1
        return self._open[:low], encode_shard(self._open[:low])

    def _write(self, content: bytes) -> None:
        manifest, name = self.manifest, f"{len(self.manifest.shards):06d}{SUFFIX}"
        part = self.folder / f".{name}"
        part.write_bytes(content)
        part.replace(self.folder / name)
        sha = hashlib.sha256(content).hexdigest()
        manifest.shards.append({"name": name, "bytes": len(content), "documents": len(self._open), "sha256": sha})
        for document in self._open:
            one = json.dumps(asdict(document), sort_keys=True)
            manifest.content = hashlib.sha256(f"{manifest.content}{one}".encode()).hexdigest()
            manifest.documents += 1
            manifest.characters += len(document.text)
            manifest.tokens += document.tokens
            who = f"{document.generator} ({document.digest})" if document.digest else document.generator
            manifest.generators[who] = manifest.generators.get(who, 0) + 1
            if document.logprob is not None and document.tokens:
                kind = "prompted" if document.prompt else "free"
                manifest.nats[kind] = manifest.nats.get(kind, 0.0) + document.logprob
                manifest.scored[kind] = manifest.scored.get(kind, 0) + document.tokens


def stored(folder: Path) -> list[Document]:
    """Returns all documents of a store, in order.

    Raises:
        StoreError: If a shard is missing or changed.
    """
    path = folder / LEDGER
    if not path.exists():
        return []
    found: list[Document] = []
    for shard in json.loads(path.read_text())["shards"]:
        try:
            content = (folder / shard["name"]).read_bytes()
        except OSError as error:
            raise StoreError(f"{folder / shard['name']} is missing", "make the store again") from error
        if hashlib.sha256(content).hexdigest() != shard["sha256"]:
            raise StoreError(f"{folder / shard['name']} was changed after it was written", "make the store again")
        found += decode_shard(content, shard["name"])
    return found


def floors(manifest: CorpusManifest) -> Mapping[str, float]:
    """Returns the generator's loss on its own text in nats per token, by kind; students cannot be expected below."""
    return {kind: -manifest.nats[kind] / tokens for kind, tokens in manifest.scored.items() if tokens}
