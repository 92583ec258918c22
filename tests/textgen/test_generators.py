"""``mmphi generators``: generators alone, for readers elsewhere."""

import signal
import subprocess
import sys
import time

import pytest
from builders import byte_tokenizer, tiny_language

from mmphi.cli import main
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shard_reader import ShardReader


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    tiny_language(initializer_range=0.05).model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def command(writer, url, *more):
    small = ["--model", writer, "--generators", "1", "--batch", "4", "--max_tokens", "16", "--shard_documents", "4"]
    return ["generators", "--spool", url, *small, *more]


@pytest.mark.slow
def test_they_write_until_they_are_told_to_end_and_close_what_they_have_open(writer, tmp_path):
    url = str(tmp_path / "spool")
    process = subprocess.Popen([sys.executable, "-m", "mmphi", *command(writer, url)])
    spool = ShardQueue(url, say=lambda _: None)
    begun = time.monotonic()
    while not spool.held():
        assert time.monotonic() - begun < 120
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    (stream,) = {held.name.stream for held in spool.held()}
    host, number, start = stream.rsplit("-", 2)
    assert (number, start) == ("0", "1")
    assert "." in host  # Made up, because others may write there, too.
    shards = [documents for _, documents in ShardReader(spool, say=lambda _: None).everything()]
    assert all(len(documents) >= 4 for documents in shards[:-1])
    ids = [document.id for documents in shards for document in documents]
    assert len(set(ids)) == len(ids)


@pytest.mark.slow
def test_two_calls_never_have_one_stream(writer, tmp_path):
    url = str(tmp_path / "spool")
    for _ in range(2):
        assert main(command(writer, url, "--stop", "documents 4")) == 0
    assert len({held.name.stream for held in ShardQueue(url, say=lambda _: None).held()}) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "need a spool"), (["--spool", "x", "--generators", "0"], "writes nothing"), (["--spol", "x"], "spool")],
)
def test_what_makes_no_sense_is_refused(words, said, capsys):
    assert main(["generators", *words]) == 2
    assert said in capsys.readouterr().err


def test_help_names_the_readers(capsys):
    assert main(["generators", "--help"]) == 0
    assert "--source stream" in capsys.readouterr().out


@pytest.mark.slow
def test_signals_are_whose_they_were(writer, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    main(command(writer, str(tmp_path / "spool"), "--stop", "time 1s"))
    assert signal.getsignal(signal.SIGTERM) == before
