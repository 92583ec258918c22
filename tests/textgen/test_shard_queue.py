"""Shards, and the bounded place that they wait in: whole or not at all, in order, and never too many."""

import errno
import threading
import time

import pytest

from mmphi.errors import DataError, StoreError
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shard_reader import ShardReader
from mmphi.textgen.shards import Document, ShardName, decode_shard, encode_shard


def document(number, stream="here-0-1", text="some words", logprob=-12.5):
    return Document(f"{stream}/{number}", f"{text} {number}", "", 7, "writer", "sha256:1", logprob, 5, True)


def shard(number, stream="here-0-1", documents=3):
    first = number * documents
    return ShardName(stream, number), encode_shard([document(first + i, stream) for i in range(documents)])


def quiet(_):
    pass


@pytest.fixture
def spool(tmp_path):
    return ShardQueue(str(tmp_path / "spool"), say=quiet, patience_s=2)


def test_a_shard_gives_back_what_was_packed():
    ends = "".join(map(chr, (10, 11, 12, 13, 28, 29, 30, 133, 0x2028, 0x2029)))  # What Python ends a line at.
    documents = [document(0, text=f"zwölf Boxkämpfer\n  jagen {ends}"), document(1, logprob=None)]
    assert decode_shard(encode_shard(documents), "it") == documents
    assert encode_shard(documents) == encode_shard(documents)


@pytest.mark.parametrize(
    "hurt", [lambda c: c[: len(c) // 2], lambda c: c[:-6] + b"\0" * 6, lambda _: b"", lambda _: b"abc"]
)
def test_a_shard_that_was_cut_or_changed_is_refused(hurt):
    with pytest.raises(DataError, match="it is"):
        decode_shard(hurt(encode_shard([document(i) for i in range(50)])), "it")


@pytest.mark.parametrize("name", ["x.jsonl.zst", "here-0-000001.jsonl.zst", "here-0-1-000001.jsonl.zst.part", ".tmp"])
def test_what_is_no_shard_has_no_name(name):
    assert ShardName.parse(name) is None


def test_a_name_says_its_stream_and_number():
    assert ShardName.parse(str(ShardName("here-0-12", 34))) == ShardName("here-0-12", 34)


def test_what_was_put_is_read_in_order_and_let_go(spool):
    for number in (1, 0, 2):
        assert spool.put(*shard(number))
    assert [held.name.number for held in spool.held()] == [0, 1, 2]
    assert [d.id for d in spool.read(ShardName("here-0-1", 1))] == ["here-0-1/3", "here-0-1/4", "here-0-1/5"]
    spool.let_go(ShardName("here-0-1", 1))
    spool.let_go(ShardName("here-0-1", 1))  # As after a kill.
    assert [held.name.number for held in spool.held()] == [0, 2]
    assert spool.size() == sum(len(shard(number)[1]) for number in (0, 2))


def test_half_a_shard_is_never_seen(spool, tmp_path):
    name, content = shard(0)
    (tmp_path / "spool/shards" / f"{name}.part").write_bytes(content[:20])
    assert spool.held() == []


def test_a_full_spool_holds_its_writers_back_until_something_is_let_go(tmp_path):
    size = len(shard(0)[1])
    told = []
    spool = ShardQueue(str(tmp_path), limit=int(2.5 * size), say=told.append)
    assert spool.put(*shard(0))
    assert spool.put(*shard(1))
    done = []
    waiting = threading.Thread(target=lambda: done.append(spool.put(*shard(2))))
    waiting.start()
    while not any("free space" in line for line in told):  # Reported when the wait begins.
        time.sleep(0.01)
    assert not done
    assert len(spool.held()) == 2
    spool.let_go(ShardName("here-0-1", 0))
    waiting.join(20)
    assert done == [True]
    assert spool.waited_s > 0
    assert len([line for line in told if "free space" in line]) == 1


def test_waiting_ends_when_it_shall(tmp_path):
    spool = ShardQueue(str(tmp_path), limit=1, say=quiet, stopping=lambda: True)
    assert spool.put(*shard(0))  # Larger than the spool, and alone in it.
    assert not spool.put(*shard(1))


def test_a_full_disk_is_waited_for_and_leaves_nothing_behind(spool, monkeypatch, tmp_path):
    real, fails = spool.files.pipe_file, iter([True, True, False])

    def full(path, content):
        if next(fails):
            real(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(spool.files, "pipe_file", full)
    told = []
    spool.say = told.append
    assert spool.put(*shard(0))
    assert spool.read(ShardName("here-0-1", 0))
    assert "free disk space" in told[0]
    assert not list(tmp_path.rglob("*.part"))


def test_a_disk_that_stays_full_is_an_error(spool, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool.files, "pipe_file", full)
    spool.patience_s = 0.2
    with pytest.raises(StoreError, match="free disk space"):
        spool.put(*shard(0))


def test_a_place_that_fsspec_does_not_know_is_named():
    with pytest.raises(StoreError, match="nowhere://x cannot be used as a spool"):
        ShardQueue("nowhere://x")


def test_a_reader_takes_every_shard_once_and_goes_on_where_it_was(spool):
    for stream in ("here-0-1", "here-1-1"):
        for number in range(2):
            spool.put(*shard(number, stream))
    reader = ShardReader(spool, say=quiet)
    seen = [(name.stream, name.number) for name, _ in reader.everything()]
    assert seen == [("here-0-1", 0), ("here-1-1", 0), ("here-0-1", 1), ("here-1-1", 1)]
    assert list(reader.everything()) == []
    spool.put(*shard(2))
    again = ShardReader(spool, reader.position, say=quiet)
    assert [name.number for name, _ in again.everything()] == [2]
    assert spool.held() == []
    again.let_go_before(reader.position, but=[str(ShardName("here-1-1", 1))])
    assert [(held.name.stream, held.name.number) for held in spool.taken()] == [("here-0-1", 2), ("here-1-1", 1)]
    # Killed before it noted what it took last: that waits again.
    third = ShardReader(spool, reader.position, say=quiet)
    assert [held.name.number for held in third.waiting()] == [2]


def test_a_position_means_the_same_wherever_a_reader_was_before(spool):
    """Gone back to an earlier position and on to a later one: what lies between counts as taken again."""
    for number in range(4):
        spool.put(*shard(number))
    reader = ShardReader(spool, say=quiet)
    list(reader.everything())
    again = ShardReader(spool, say=quiet)  # Without a position it changes nothing.
    assert spool.held() == []
    again.go_on({"here-0-1": 1})
    assert [held.name.number for held in spool.held()] == [1, 2, 3]
    again.go_on({"here-0-1": 3})
    assert [held.name.number for held in spool.held()] == [3]
    between = again.taken_between({"here-0-1": 1}, {"here-0-1": 3})
    assert [name.number for name, documents in between if documents] == [1, 2]


def test_what_was_taken_makes_room_for_others(tmp_path):
    spool = ShardQueue(str(tmp_path), limit=int(1.5 * len(shard(0)[1])), say=quiet, stopping=lambda: True)
    reader = ShardReader(spool, say=quiet)
    for number in range(4):
        assert spool.put(*shard(number))
        assert not spool.put(*shard(number + 1))
        assert reader.take(ShardName("here-0-1", number))
    assert [held.name.number for held in spool.taken()] == [0, 1, 2, 3]
    assert spool.read(ShardName("here-0-1", 2)) == decode_shard(shard(2)[1], "it")


def test_a_broken_shard_is_set_aside_named_and_counted(spool, tmp_path):
    spool.put(*shard(0))
    spool.put(ShardName("here-0-1", 1), shard(1)[1][:-9])
    spool.put(*shard(2))
    told = []
    reader = ShardReader(spool, say=told.append)
    assert [len(documents) for _, documents in reader.everything()] == [3, 0, 3]
    assert reader.broken == 1
    assert "here-0-1-000001" in told[0]
    assert "moved to" in told[0]
    assert (tmp_path / "spool/bad/here-0-1-000001.jsonl.zst").exists()
    assert [held.name.number for held in spool.taken()] == [0, 2]


def test_a_shard_that_is_gone_is_counted(spool):
    for number in (0, 2):
        spool.put(*shard(number))
    told = []
    reader = ShardReader(spool, say=told.append)
    assert [name.number for name, _ in reader.everything()] == [0, 2]
    assert reader.broken == 1
    assert "missing" in told[0]
