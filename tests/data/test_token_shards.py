from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import zstandard
from builders import byte_tokenizer

from mmphi.data import text_sources, token_shards
from mmphi.data.compressed_io import open_compressed
from mmphi.data.text_sources import TextPiece, TextReport, read_texts
from mmphi.data.token_shards import ShardTokenizer, TokenShards, whole_shards
from mmphi.errors import DataError
from mmphi.text.tokenizer import phi2_tokenizer

RNG = random.Random(0)
WORDS = ["the", "quick", "", "fox\njumps\n\nover", "\n", "lazy\tdogs,", "isn't", "it?", "1234", "naïve", "東京", "🙂"]


def text(words: int) -> str:
    return " ".join(RNG.choice(WORDS) for _ in range(words))


def read(path: Path | str, **options) -> tuple[list[str], TextReport]:
    """Whole documents of a source."""
    report, documents = TextReport(), []
    for piece in read_texts(str(path), report, **options):
        if piece.first:
            documents.append("")
        documents[-1] += piece.text
    return documents, report


def test_files_folders_rows_and_datasets(tmp_path):
    (tmp_path / "a.txt").write_text("first\n---\nsecond\n---\n\n---\nthird")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "row one"}\n\n{"text": "row two"}\nnot json\n{"other": 1}\n{"text": 5}\n{"text": " "}\n')
    documents, report = read(tmp_path, separator="\n---\n")
    assert documents == ["first", "second", "third", "row one", "row two"]
    assert report.documents == 5
    assert dict(report.skipped) == {
        "a row that is no JSON": 1,
        "a row without 'text' (it has other)": 1,
        "a int in place of a text": 1,
        "empty": 1,
    }
    assert "line 4" in report.examples["a row that is no JSON"]
    datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]}).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved")[0] == ["one", "two"]
    with pytest.raises(DataError, match="no column 'body'"):
        read(tmp_path / "saved", column="body")


def test_lists_tables_and_wide_rows_are_read(tmp_path):
    rows = [{"text": "row \u010d one"}, {"text": "row two"}]
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    for encoding in ("utf-16", "utf-32"):
        (tmp_path / "wide.jsonl").write_text(
            "\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding=encoding
        )
        assert read(tmp_path / "wide.jsonl")[0] == ["row \u010d one", "row two"]
    for content in (json.dumps(rows), json.dumps(rows, indent=1), json.dumps([r["text"] for r in rows]), lines):
        (tmp_path / "list.json").write_text(content)
        assert read(tmp_path / "list.json")[0] == ["row \u010d one", "row two"]
    (tmp_path / "list.json").write_text('[{"text": 1')
    assert list(read(tmp_path / "list.json")[1].skipped) == ["a file that is no JSON"]
    (tmp_path / "list.json").write_text('[{"text": [{"role": "user"}]}, {"id": 1, "content": "x"}]')
    skipped = read(tmp_path / "list.json")[1].skipped
    assert dict(skipped) == {"a list in place of a text": 1, "a row without 'text' (it has id, content)": 1}
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "table.parquet"))
    assert read(tmp_path / "table.parquet")[0] == ["row \u010d one", "row two"]
    with pytest.raises(DataError, match="no column 'body'"):
        read(tmp_path / "table.parquet", column="body")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_marked_encodings_are_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("naïve 東京".encode(encoding))
    assert read(tmp_path)[0] == ["naïve 東京"]


def test_what_cannot_be_read_is_counted(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "broken.txt").write_bytes(b"fine " * 20000 + b"\xff\xfe bad")
    documents, report = read(tmp_path)
    assert "good" in documents
    assert report.skipped["empty"] == 1
    assert report.skipped["binary, not text"] == 1
    assert sum(n for reason, n in report.skipped.items() if "unknown encoding" in reason) == 1
    assert sum(n for reason, n in report.skipped.items() if "the rest of a file" in reason) == 1
    assert read(tmp_path / "latin.txt", encoding="latin-1")[0] == ["déjà vu"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_before_an_undecodable_byte_is_read(tmp_path, encoding):
    before = "fine ä " * 40_000
    bad = b"\xff bad" if encoding.startswith("utf-8") else b"\x00\xdc\x00\x00"
    (tmp_path / "broken.txt").write_bytes(before.encode(encoding) + bad)
    documents, report = read(tmp_path / "broken.txt")
    assert "".join(documents) == before
    assert sum(n for reason, n in report.skipped.items() if "the rest of a file" in reason) == 1


@pytest.mark.parametrize("damage", ["cut short", "no archive"])
@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_a_broken_archive_is_counted(tmp_path, damage, suffix, compress):
    (tmp_path / "a.txt").write_text("good")
    whole = compress(b"".join(b"line %d of some that differ\n" % (i * 7919) for i in range(10_000)))
    (tmp_path / f"b.txt.{suffix}").write_bytes(whole[:-20] if damage == "cut short" else b"one line" * 20)
    documents, report = read(tmp_path)
    assert documents[0] == "good"
    assert report.skipped[f"a damaged or truncated .{suffix} file, or the rest of it"] == 1
    assert f"b.txt.{suffix}" in report.examples[f"a damaged or truncated .{suffix} file, or the rest of it"]


def test_zstandard_is_read_over_all_its_frames(tmp_path):
    (tmp_path / "b.jsonl.zst").write_bytes(
        zstandard.compress(b'{"text": "row one"}\n') + zstandard.compress(b'{"text": "row two"}\n')
    )
    assert read(tmp_path)[0] == ["row one", "row two"]


def test_missing_sources(tmp_path):
    with pytest.raises(DataError, match="no texts"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"there is no .*gone\.txt"):
        text_sources.check_sources([str(tmp_path / "gone.txt")])


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_cut_into_pieces_the_tokens_are_the_same(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(text_sources, "PIECE", 300)
    monkeypatch.setattr(text_sources, "BLOCK", 1000)
    tokenizer, whole = phi2_tokenizer(), text(4000)
    (tmp_path / f"a.{suffix}").write_text(whole if suffix == "txt" else json.dumps({"text": whole}))
    report = TextReport()
    pieces = list(read_texts(str(tmp_path), report))
    assert len(pieces) > 50
    assert [p.first for p in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert [p.last for p in pieces] == [*[False] * (len(pieces) - 1), True]
    assert "".join(p.text for p in pieces) == whole
    assert report.cut == 0
    ids = [i for p in pieces for i in tokenizer(p.text)["input_ids"]]
    assert ids == tokenizer(whole)["input_ids"]


def test_one_endless_word_is_cut_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "PIECE", 300)
    (tmp_path / "a.txt").write_text("x" * 1000)
    documents, report = read(tmp_path)
    assert documents == ["x" * 1000]
    assert report.cut == 3
    assert "cut inside a word" in "; ".join(report.lines())


def writing(folder: Path, documents: list[str], say=lambda _: None, shard_tokens: int = 400) -> ShardTokenizer:
    def pieces():
        for document in documents:
            half = len(document) // 2
            yield TextPiece(document[:half], True, False)
            yield TextPiece(document[half:], False, True)

    folder.mkdir(exist_ok=True)
    options = {"is_held_out": lambda source, piece, place: piece % 7 == 0, "say": say, "shard_tokens": shard_tokens}
    return ShardTokenizer(folder, {"mine": pieces}, byte_tokenizer(), **options)


@pytest.fixture
def documents(monkeypatch) -> list[str]:
    monkeypatch.setattr(token_shards, "BATCH_CHARACTERS", 100)
    return [f"{i} " * (5 + i % 13) for i in range(60)]


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.npy")}


def test_documents_come_back(tmp_path, documents):
    shards = writing(tmp_path, documents)()
    assert len(shards) > 3
    read = TokenShards(tmp_path, [s.name for s in shards])
    predicted = sum(len(byte_tokenizer()(d)["input_ids"]) + 1 for d in documents)
    assert sum(s.tokens for s in shards) == predicted == int(read.chunks[:, 2].sum())
    assert sum(s.bytes["mine"] for s in shards) == sum(len(d.encode()) for d in documents)
    first, second = read.ids(0), read.ids(1)
    assert byte_tokenizer().decode(first[1:]) + byte_tokenizer().decode(second[1:-1]) == documents[0]
    assert second[0] == first[-1]  # What stands before a stretch is given to it.


def test_long_pieces_become_stretches(tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "CHUNK", 16)
    monkeypatch.setattr(token_shards, "BLOCK", 8)
    shards = writing(tmp_path, ["abcdefghij" * 10])()
    read = TokenShards(tmp_path, [s.name for s in shards])
    pairs = [p for i in range(len(read.chunks)) for p in zip(read.ids(i)[:-1], read.ids(i)[1:], strict=True)]
    ids = [256, *byte_tokenizer()("abcdefghij" * 10)["input_ids"], 256]
    assert [tuple(map(int, p)) for p in pairs] == list(itertools.pairwise(ids))
    assert max(read.chunks[:, 2]) == 16


@pytest.mark.parametrize("damage", ["cut short", "other bytes", "gone", "not listed"])
def test_a_damaged_shard_is_named_and_built_again(tmp_path, documents, damage):
    shards = writing(tmp_path, documents)()
    before, told = content(tmp_path), []
    victim = tmp_path / f"{shards[1].name}.ids.npy"
    if damage == "cut short":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif damage == "other bytes":
        victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    elif damage == "gone":
        victim.unlink()
    else:
        lines = (tmp_path / token_shards.SHARDS).read_text().splitlines()
        (tmp_path / token_shards.SHARDS).write_text("\n".join([lines[0], *lines[2:-1], lines[-1][:40]]))
    done = []
    again = writing(tmp_path, documents, told.append)
    again.progress = done.append
    assert [s.name for s in again()] == [s.name for s in shards]
    assert content(tmp_path) == before
    assert len(whole_shards(tmp_path, told.append)) == len(shards)
    assert bool(told) == (damage != "not listed")
    if told:
        assert shards[1].name in told[0]
    assert sum(done) == sum(s.tokens for s in shards)


def test_killed_while_it_writes(tmp_path, documents, monkeypatch):
    whole = writing(tmp_path / "whole", documents)()
    part = writing(tmp_path / "part", documents)
    real, count = token_shards.np.save, [0]

    def dying(*args):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(token_shards.np, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            part()
    assert [s.name for s in writing(tmp_path / "part", documents)()] == [s.name for s in whole]
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def test_ids_that_need_more_than_two_bytes(tmp_path):
    class Backend:
        def encode_batch_fast(self, batch, add_special_tokens):
            return [type("E", (), {"ids": [70000, 5]}) for _ in batch]

    class Large:
        backend_tokenizer, eos_token_id = Backend(), 3

        def __len__(self):
            return 80000

    shards = ShardTokenizer(
        tmp_path, {"a": lambda: [TextPiece("x", True, True)]}, Large(), is_held_out=lambda *_: False
    )()
    assert TokenShards(tmp_path, [s.name for s in shards]).ids(0).tolist() == [3, 70000, 5, 3]
    assert np.load(tmp_path / f"{shards[0].name}.ids.npy").dtype == np.uint32


@pytest.mark.skipif("MMPHI_REAL" not in os.environ, reason="needs the real texts")
@pytest.mark.real
def test_real_texts_in_pieces_have_the_tokens_of_the_whole():
    tokenizer = phi2_tokenizer()
    for path in sorted((Path(os.environ["MMPHI_REAL"]) / "text").glob("*.txt")):
        pieces = list(read_texts(str(path), TextReport()))
        ids = [i for p in pieces for i in tokenizer(p.text)["input_ids"]]
        assert ids == tokenizer(path.read_bytes().decode())["input_ids"], path.name


def test_a_reading_that_is_abandoned_closes_its_file(tmp_path, monkeypatch):
    streams = []

    @contextlib.contextmanager
    def opened(path):
        with open_compressed(path) as stream:
            streams.append(stream)
            yield stream

    monkeypatch.setattr(text_sources, "open_compressed", opened)
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    reading = read_texts(str(tmp_path / "a.txt"), TextReport(), separator="\n\n")
    assert next(reading).text == "one"
    reading.close()
    assert [stream.closed for stream in streams] == [True]
