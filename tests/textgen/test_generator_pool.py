"""Generators of a small model: what they write is what they say it is, and one that is killed costs its open shard."""

import os
import signal
import time

import pytest
import torch
from builders import byte_tokenizer, tiny_language

from mmphi.config import LanguageSettings
from mmphi.config.textgen import TextgenSettings
from mmphi.errors import ModelError, SettingsError
from mmphi.models.language.language_model import load_language_model
from mmphi.textgen.generator import PromptStream
from mmphi.textgen.generator_pool import HOPELESS, GeneratorPool
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shard_reader import ShardReader

NEAR = 1e-3  # Nats per token.


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A model with random weights that comes to an end now and then."""
    folder = tmp_path_factory.mktemp("writer")
    model = tiny_language(initializer_range=0.05)
    model.model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def settings_of(writer, **changes):
    small = {"model": writer, "generators": 2, "batch": 4, "max_tokens": 24, "shard_documents": 6, "host": "here"}
    return TextgenSettings(**(small | changes))


def until(happened, seconds=120):
    begun = time.monotonic()
    while not happened():
        assert time.monotonic() - begun < seconds, "it never happened"
        time.sleep(0.1)


@pytest.mark.slow
def test_what_is_written_carries_its_own_loss_and_a_killed_one_costs_its_open_shard(writer, tmp_path):
    settings, told = settings_of(writer), []
    url = str(tmp_path / "spool")
    spool = ShardQueue(url, say=told.append)
    with GeneratorPool(settings, url, tmp_path / "fleet", say=told.append) as pool:
        until(lambda: {held.name.stream for held in spool.held()} >= {"here-0-1", "here-1-1"})
        killed = pool.members[0].running.process
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        before = {str(held.name) for held in spool.held()}
        pool.watch()
        until(lambda: any(held.name.stream == "here-0-2" for held in spool.held()))
        assert before <= {str(held.name) for held in spool.held()}
        rows = pool.rows()
    assert "generator 0 has died: exit status -9" in told[0]
    assert [row["starts"] for row in rows] == [2, 1]
    assert all(row["documents"] and row["tokens"] for row in rows)
    shards = list(ShardReader(spool, say=told.append).everything())
    documents = [document for _, found in shards for document in found]
    assert len({document.id for document in documents}) == len(documents) > 12
    assert {bool(document.prompt) for document in documents} == {True, False}
    assert {document.ended for document in documents} <= {True, False}
    assert all(document.generator == writer and document.digest.startswith("sha256:") for document in documents)
    language = load_language_model(LanguageSettings(model=writer), None, torch.device("cpu"))
    wants = PromptStream(settings, "any", language)
    for document in documents[:10]:
        known = language.prompt.parts([(document.prompt, None)])
        before_it = [i for part in known for i in part.ids] if document.prompt else [wants.begin]
        # Bytes that are no text are lost in it: only what is the same when it is read again can be scored again.
        own = language.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        ids = [*own, wants.begin] if document.ended else own
        if len(ids) != document.tokens:
            continue
        logits = language.model(torch.tensor([[*before_it, *ids]])).logits[0, len(before_it) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")
        assert abs(float(loss) + document.logprob) / len(ids) < NEAR


@pytest.mark.slow
def test_one_that_never_writes_is_not_started_for_ever(tmp_path):
    told = []
    pool = GeneratorPool(
        settings_of(str(tmp_path / "nothing"), generators=1), str(tmp_path), tmp_path / "fleet", say=told.append
    )
    with pytest.raises(ModelError, match=f"died {HOPELESS} times"), pool:
        until(lambda: pool.watch())
    assert len(told) == HOPELESS


@pytest.mark.slow
@pytest.mark.parametrize("host", ["a-b", "a b", "", "ä/b"])
def test_a_host_whose_shards_no_reader_would_find_is_refused(writer, tmp_path, host):
    settings = settings_of(writer, generators=1, host=host)
    if not host:
        assert GeneratorPool(settings, str(tmp_path / "s"), tmp_path / "fleet").host == "here"
        return
    with pytest.raises(SettingsError, match="other characters than letters"):
        GeneratorPool(settings, str(tmp_path / "s"), tmp_path / "fleet")


def test_a_stream_is_begun_once_whatever_folder_it_is_begun_from(tmp_path):
    """As of a machine whose temporary folder is gone, and of shards that were written before starts were noted."""
    spool = ShardQueue(str(tmp_path / "spool"), say=print)
    assert [spool.begin_stream("a-0") for _ in range(2)] == ["a-0-1", "a-0-2"]
    assert spool.begin_stream("a-1") == "a-1-1"
    (tmp_path / "spool" / "taken" / "a-0-7-000002.jsonl.zst").write_bytes(b"")
    assert ShardQueue(str(tmp_path / "spool"), say=print).begin_stream("a-0") == "a-0-8"
    assert spool.begin_stream("a-0", after=20) == "a-0-21"


@pytest.mark.slow
def test_streams_are_never_given_out_twice(writer, tmp_path):
    for expected in (1, 2):
        with GeneratorPool(
            settings_of(writer, generators=1), str(tmp_path / "s"), tmp_path / "fleet", say=print
        ) as pool:
            assert pool.members[0].stream == f"here-0-{expected}"
