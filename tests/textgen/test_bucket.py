"""A spool in a bucket: an S3 server on this machine, which stops answering for a while."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_shard_queue import quiet, shard

from mmphi.errors import StoreError
from mmphi.textgen import shard_queue as spool_module
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shard_reader import ShardReader
from mmphi.textgen.shards import ShardName

pytestmark = pytest.mark.slow

pytest.importorskip("s3fs")
KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
SERVER = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


class Bucket:
    """A server and its bucket."""

    def __init__(self, port: int) -> None:
        self.address, self.url = f"http://127.0.0.1:{port}", "s3://bucket/spool"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        begun = time.monotonic()
        while not self.answers():
            assert time.monotonic() - begun < 60
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", int(self.address.rpartition(":")[2])), 1).close()
        except OSError:
            return False
        return True

    def spool(self, **more):
        quick = {"config_kwargs": {"read_timeout": 1, "connect_timeout": 1, "retries": {"max_attempts": 1}}}
        return ShardQueue(
            self.url, **({"say": quiet} | more), endpoint_url=self.address, skip_instance_cache=True, **quick
        )

    def silent(self, seconds: float) -> threading.Timer:
        """Take requests and say nothing to them, for a while."""
        self.process.send_signal(signal.SIGSTOP)
        timer = threading.Timer(seconds, self.process.send_signal, [signal.SIGCONT])
        timer.start()
        return timer


@pytest.fixture
def bucket(monkeypatch):
    import s3fs

    monkeypatch.setattr(spool_module, "ANSWER_S", 2.0)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # It hides short silences by itself.
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Bucket(port)
    s3fs.S3FileSystem(endpoint_url=made.address, skip_instance_cache=True).mkdir("bucket")
    yield made
    if made.process.poll() is None:
        os.kill(made.process.pid, signal.SIGCONT)
    made.process.kill()
    made.process.wait()


def test_shards_go_through_a_bucket_whole_in_order_and_once(bucket):
    spool = bucket.spool()
    reader = ShardReader(spool, say=quiet)
    assert spool.held() == []
    for stream in ("here-0-1", "here-1-1"):
        for number in range(2):
            assert spool.put(*shard(number, stream))
    seen = [(name.stream, name.number, len(documents)) for name, documents in reader.everything()]
    assert seen == [("here-0-1", 0, 3), ("here-1-1", 0, 3), ("here-0-1", 1, 3), ("here-1-1", 1, 3)]
    assert spool.held() == []
    assert len(spool.taken()) == 4
    reader.let_go_before({"here-0-1": 1, "here-1-1": 2})
    assert [held.name for held in spool.taken()] == [ShardName("here-0-1", 1)]
    again = ShardReader(bucket.spool(), {"here-0-1": 1}, say=quiet)  # As after a kill: what was not noted comes again.
    assert [(name.number, len(found)) for name, found in again.everything()] == [(1, 3)]


def test_a_bucket_that_is_silent_for_a_while_is_waited_for(bucket):
    told: list[str] = []
    spool = bucket.spool(say=told.append)
    assert spool.put(*shard(0))
    timer = bucket.silent(6)
    assert spool.put(*shard(1))  # Waits, and is written once it answers.
    timer.join()
    assert [line for line in told if "waits for an answer" in line]
    assert spool.waited_s > 0
    timer = bucket.silent(6)
    reader = ShardReader(spool, say=told.append)
    assert [name.number for name, _ in reader.everything()] == [0, 1]
    timer.join()
    assert reader.broken == 0
    assert spool.held() == []


def test_a_broken_shard_in_a_bucket_is_set_aside(bucket):
    spool, told = bucket.spool(), []
    spool.put(ShardName("here-0-1", 0), shard(0)[1][:-9])
    spool.put(*shard(1))
    reader = ShardReader(spool, say=told.append)
    assert [len(documents) for _, documents in reader.everything()] == [0, 3]
    assert reader.broken == 1
    assert [name.rsplit("/", 1)[-1] for name in spool.files.ls("bucket/spool/bad")] == ["here-0-1-000000.jsonl.zst"]


def test_one_that_never_answers_is_an_error_in_the_end(bucket):
    bucket.process.kill()
    bucket.process.wait()
    with pytest.raises(StoreError, match=r"s3://bucket/spool waited .* for an answer"):
        bucket.spool(patience_s=3).put(*shard(0))


def test_what_waiting_does_not_mend_is_an_error_at_once(bucket, monkeypatch):
    with pytest.raises(StoreError, match="there is no bucket"):
        ShardQueue("s3://elsewhere/spool", say=quiet, endpoint_url=bucket.address).put(*shard(0))
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    begun = time.monotonic()
    with pytest.raises(StoreError, match="credentials"):
        ShardQueue("s3://bucket/spool", say=quiet, endpoint_url=bucket.address, skip_instance_cache=True).put(*shard(0))
    assert time.monotonic() - begun < 60
