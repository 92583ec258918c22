"""Features of unequal number: whole or not at all, found by content, gone on with and taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmphi.data import ragged_features, store_writer
from mmphi.data.ragged_features import RaggedStore, RaggedWriter
from mmphi.errors import StoreError


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed + 97 * count)).half()


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    writer = RaggedWriter(tmp_path, 6, "w")
    writer.write({"a": rows(5), "b": rows(0), "c": rows(3)}, {"x": "not audio"})
    writer.write({"d": rows(1)}, {})
    writer.finish()
    store = RaggedStore(tmp_path)
    assert (store.width, store.model, store.unreadable) == (6, "w", {"x": "not audio"})
    for digest, count in {"a": 5, "b": 0, "c": 3, "d": 1}.items():
        assert store.length(digest) == count
        assert torch.equal(store.get(digest), rows(count))
    assert ("a" in store, "x" in store, store.knows("x"), store.knows("y")) == (True, False, True, False)
    assert writer.bytes == 9 * 6 * 2
    with pytest.raises(StoreError, match="no stored frames"):
        store.get("x")


def test_a_killed_writer_goes_on(tmp_path: Path) -> None:
    first = RaggedWriter(tmp_path, 6, "w")
    first.write({"a": rows(5)}, {})
    first.write({"b": rows(2)}, {})
    progress = tmp_path / store_writer.PROGRESS
    progress.write_bytes(progress.read_bytes()[:-9])  # Torn in the second line: its file counts for nothing.
    again = RaggedWriter(tmp_path, 6, "w")
    assert (again.knows("a"), again.knows("b")) == (True, False)
    again.write({"b": rows(2, seed=1)}, {})
    again.finish()
    store = RaggedStore(tmp_path)
    assert torch.equal(store.get("a"), rows(5))
    assert torch.equal(store.get("b"), rows(2, seed=1))
    assert len(list(tmp_path.glob("features-*.npy"))) == 2


def test_a_store_without_its_index_is_none(tmp_path: Path) -> None:
    RaggedWriter(tmp_path, 6, "w").write({"a": rows(5)}, {})
    with pytest.raises(StoreError, match="no features can be read"):
        RaggedStore(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_an_earlier_store_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    old = RaggedWriter(tmp_path / "old", 6, "w")
    old.write({"a": rows(5), "b": rows(2)}, {"x": "empty"})
    old.finish()
    if not links:

        def refuse(*_: Any) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(store_writer.os, "link", refuse)
    new = RaggedWriter(tmp_path / "new", 6, "w")
    new.write({"b": rows(2, seed=1)}, {})
    assert new.take_over(tmp_path / "old") == 2
    assert new.take_over(tmp_path / "old") == 0
    new.finish()
    store = RaggedStore(tmp_path / "new")
    assert torch.equal(store.get("a"), rows(5))
    assert torch.equal(store.get("b"), rows(2, seed=1))
    assert store.knows("x")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RaggedWriter(tmp_path, 6, "w")
    writer.write({"a": rows(5)}, {})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ragged_features.np, "save", full)
        with pytest.raises(StoreError, match="No space left on device") as caught:
            writer.write({"b": rows(2)}, {})
    assert "resumes after 1 recordings" in caught.value.hint
    again = RaggedWriter(tmp_path, 6, "w")
    again.write({"b": rows(2)}, {})
    again.finish()
    assert torch.equal(RaggedStore(tmp_path).get("b"), rows(2))
    assert not list(tmp_path.glob("*.part"))
    assert json.loads((tmp_path / store_writer.INDEX).read_text())["model"] == "w"
