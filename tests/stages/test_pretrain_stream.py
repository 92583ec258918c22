"""Pretraining on text that is being written: seen as the window says, and after a kill as if nothing had been."""

import random
import threading
import time
from dataclasses import replace

import pytest
from builders import Recorder, context

from mmphi.errors import SettingsError
from mmphi.stages import load_settings
from mmphi.stages.pretrain import STAGE
from mmphi.stages.pretrain_stream import GeneratedStream, advice
from mmphi.textgen.corpus_store import stored
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shards import Document, ShardName, encode_shard
from mmphi.training import streaming_dataset

SMALL = {
    "pretrain.source": "stream",
    "pretrain.layers": "1",
    "pretrain.width": "16",
    "pretrain.heads": "2",
    "pretrain.context": "32",
    "pretrain.batch_tokens": "64",
    "pretrain.stop": "steps 12",
    "pretrain.validation_tokens": "512",
    "pretrain.max_epochs": "2",
    "pretrain.window_tokens": "1024",
    "pretrain.eval_every": "6",
    "pretrain.save_every": "4",
    "pretrain.log_every": "1",
    "pretrain.prompts": "[]",
}


class Nobody:
    """A fleet of none: what is in the spool was written before."""

    def __init__(self, *_):
        self.watched = 0

    def start(self):
        pass

    def stop(self):
        pass

    def watch(self):
        self.watched += 1

    def rows(self):
        return []


def document(number):
    text = " ".join(f"word{(number * 7 + i) % 50} and" for i in range(12))
    return Document(f"here-0-1/{number}", text, "", 0, "writer", "d", -50.0, 40, number % 3 > 0)


@pytest.fixture
def spool(tmp_path, monkeypatch):
    """A spool of forty shards, and nobody who writes more."""
    monkeypatch.setattr("mmphi.stages.pretrain_stream.GeneratorPool", Nobody)
    made = ShardQueue(str(tmp_path / "spool"), say=lambda _: None)
    for number in range(40):
        made.put(ShardName("here-0-1", number), encode_shard([document(4 * number + i) for i in range(4)]))
    return made


def trained(tmp_path, name, spool, tracker=None, **changes):
    settings = load_settings("tiny", SMALL | {"textgen.spool": spool.url} | changes)
    ctx = context(STAGE, tmp_path / name, settings, tracker=tracker or Recorder())
    figures = STAGE.run(ctx)
    return ctx, figures


def losses(tracker):
    return {step: row["train/loss"] for step, row in tracker.metric_rows if "train/loss" in row}


def copied(spool, tmp_path, name):
    """A spool that holds the same."""
    other = ShardQueue(str(tmp_path / name), say=lambda _: None)
    for held in spool.held():
        other.put(held.name, (tmp_path / "spool/shards" / str(held.name)).read_bytes())
    return other


def test_every_token_is_seen_once_or_twice_and_what_left_the_window_leaves_the_disk(spool, tmp_path):
    ctx, figures = trained(tmp_path, "run", spool)
    assert figures["pretrain/tokens"] == 12 * 64
    assert 1 <= figures["stream/times_seen"] <= 2
    assert figures["floor/loss"] > 0
    times = {row["times"]: row["tokens"] for row in ctx.tracker.tables["seen"]}
    assert max(times) <= 2
    held = {held.name.number for held in spool.held()}
    assert held == set(range(min(held), 40))  # What it did not come to still waits for others.
    assert 2 < min(held) < 40
    assert spool.taken() == []
    assert any("each token was seen" in line for line in ctx.tracker.said)
    assert (tmp_path / "run/language/config.json").exists()


@pytest.mark.slow
def test_killed_between_checkpoints_it_goes_on_to_the_same_losses(spool, tmp_path, monkeypatch):
    other = copied(spool, tmp_path, "other")
    straight, expected = trained(tmp_path, "straight", spool)

    class Kill(Recorder):
        def metrics(self, values, step=0):
            super().metrics(values, step)
            if step == 6 and "train/loss" in values:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "killed", other, Kill())
    assert (tmp_path / "killed/checkpoint-4/stream.json").exists()
    resumed, figures = trained(tmp_path, "killed", other)
    assert any("resuming from step 4" in line for line in resumed.tracker.said)
    one, two = losses(straight.tracker), losses(resumed.tracker)
    assert {step: two[step] for step in range(5, 13)} == pytest.approx({step: one[step] for step in range(5, 13)})
    assert figures["stream/times_seen"] == expected["stream/times_seen"]
    assert figures["val/loss"] == pytest.approx(expected["val/loss"])


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before a checkpoint is noted", "two checkpoints kept"])
def test_what_leaves_the_disk_is_kept_where_it_is_clean_and_once(tmp_path, monkeypatch, moment):
    """Killed in the middle, too; what is held out for validation is not in the store."""
    monkeypatch.setattr("mmphi.stages.pretrain_stream.GeneratorPool", Nobody)
    draw = random.Random(3)  # Words of letters: near copies are looked for with all numbers alike.
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(900)]
    texts = [" ".join(["the", *(draw.choice(words) for _ in range(20)), "and of it."]) for _ in range(160)]
    texts[70] = texts[65]
    spool = ShardQueue(str(tmp_path / "spool"), say=lambda _: None)
    for shard in range(40):
        some = [document(4 * shard + i) for i in range(4)]
        some = [replace(each, text=texts[4 * shard + i]) for i, each in enumerate(some)]
        spool.put(ShardName("here-0-1", shard), encode_shard(some))
    monkeypatch.setattr("mmphi.textgen.quality.Quality.__call__", lambda *_: "")

    class Kill(Recorder):
        def metrics(self, values, step=0):
            super().metrics(values, step)
            if step == 30 and "train/loss" in values:
                raise KeyboardInterrupt

    def killed(self, checkpoint):
        if checkpoint.name == "checkpoint-28":
            raise KeyboardInterrupt
        noted(self, checkpoint)

    noted = GeneratedStream.saved
    long = {"pretrain.stop": "steps 110", "store.megabytes": "1"}
    if moment == "two checkpoints kept":
        long["pretrain.keep_checkpoints"] = "2"
    if moment == "before a checkpoint is noted":
        monkeypatch.setattr(GeneratedStream, "saved", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "run", spool, Kill(), **long)
    monkeypatch.setattr(GeneratedStream, "saved", noted)
    assert 0 < len(stored(tmp_path / "run/store/data")) < 100
    ctx, figures = trained(tmp_path, "run", spool, **long)
    kept = [each.text for each in stored(tmp_path / "run/store/data")]
    seen = texts[: 160 - 4 * len(spool.held())]
    assert len(seen) > 80
    first = texts.index(kept[0])
    assert 0 < first < 30  # Those before are held out.
    assert kept == [text for number, text in enumerate(seen) if number >= first and number != 70]
    assert figures["textgen/documents"] == len(kept)
    assert ctx.tracker.tables["dropped"][0]["reason"] == "the same text"
    assert "Datasheet" in (tmp_path / "run/store/README.md").read_text()


@pytest.mark.slow
def test_nothing_is_kept_where_that_is_not_wanted(spool, tmp_path):
    _, figures = trained(tmp_path, "run", spool, **{"pretrain.keep": "false"})
    assert not (tmp_path / "run/store").exists()
    assert "textgen/documents" not in figures


@pytest.mark.slow
def test_it_waits_for_text_and_says_how_long(spool, tmp_path, monkeypatch):
    """The rest of the text comes when it waits for the third time."""
    few = ShardQueue(str(tmp_path / "few"), say=lambda _: None)
    names = [held.name for held in spool.held()]

    def put(some):
        for name in some:
            few.put(name, (tmp_path / "spool/shards" / str(name)).read_bytes())

    put(names[:4])
    sleep, waits = time.sleep, []

    def waiting(seconds):
        if threading.current_thread() is threading.main_thread():
            waits.append(seconds)
            if len(waits) == 3:
                put(names[4:])
        sleep(seconds)

    monkeypatch.setattr(streaming_dataset.time, "sleep", waiting)
    _, figures = trained(tmp_path, "run", few)
    assert figures["stream/waited_s"] >= sum(waits[:3])
    assert figures["stream/trainer_busy"] < 1


def test_documents_that_were_cut_off_have_no_end(tmp_path, spool):
    settings = load_settings("tiny", SMALL | {"textgen.spool": spool.url})
    from mmphi.text.tokenizer import phi2_tokenizer

    tokenizer = phi2_tokenizer()
    stream = GeneratedStream(context(STAGE, tmp_path / "run", settings), tokenizer, "transformers")
    whole, cut = stream.encode(document(1)), stream.encode(document(0))
    assert whole[0] == whole[-1] == cut[0] == tokenizer.eos_token_id
    assert cut[-1] != tokenizer.eos_token_id


def test_several_processes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="one process"):
        STAGE.check(context(STAGE, tmp_path, load_settings("tiny", SMALL)).settings)


@pytest.mark.parametrize(
    ("busy", "waited", "seen", "word"),
    [(0.5, 0, 1, "more generators"), (1, 9, 1, "fewer"), (1, 0, 3, "fresh"), (1, 0, 1, "both")],
)
def test_what_would_help_is_said(busy, waited, seen, word):
    assert word in advice(busy, waited, seen)
