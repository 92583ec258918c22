"""The stage ends at the shard with which it has enough, however many wait."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import context

from mmphi.config.textgen import TextgenSettings
from mmphi.stages import Settings, textgen
from mmphi.textgen import generator_pool
from mmphi.textgen.corpus_store import CorpusManifest
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shards import Document, ShardName, encode_shard

OF_A_SHARD = 3


class Kept:
    """A store that keeps everything."""

    def __init__(self) -> None:
        self.manifest, self.committed = CorpusManifest(), dict[str, int]()

    def offer(self, documents: list[Document], stream: str, number: int) -> None:
        self.manifest.documents += len(documents)

    def commit(self) -> None:
        pass


@pytest.fixture
def nobody_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fleet of generators that have filled the spool already."""

    class Fleet:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> Any:
            return SimpleNamespace(watch=lambda: None, rows=list)

        def __exit__(self, *_: object) -> None:
            pass

        def rows(self) -> list[Any]:
            return []

    monkeypatch.setattr(generator_pool, "GeneratorPool", Fleet)
    monkeypatch.setattr(generator_pool, "backend_of", lambda *_: "slots")


@pytest.mark.parametrize(("stop", "kept"), [("documents 7", 9), ("documents 100", 60), ("time 0.01s", 60)])
@pytest.mark.usefixtures("nobody_writes")
def test_it_ends_with_the_shard_that_is_enough(tmp_path: Path, stop: str, kept: int) -> None:
    spool = ShardQueue(str(tmp_path / "spool"), say=print)
    for number in range(20):
        documents = [
            Document(f"here-0-1/{number}/{i}", "some words", "", 7, "writer", "sha256:1", None, 5, True)
            for i in range(OF_A_SHARD)
        ]
        assert spool.put(ShardName("here-0-1", number), encode_shard(documents))
    chosen = {"model": "x", "spool": str(tmp_path / "spool"), "stop": f"{stop}, time 3s"}
    settings = Settings(textgen=TextgenSettings(**chosen))
    store: Any = Kept()
    textgen._from_generators(context(textgen.STAGE, tmp_path / "run", settings), store)
    assert store.manifest.documents == kept
    assert len(spool.held()) == 20 - kept // OF_A_SHARD
