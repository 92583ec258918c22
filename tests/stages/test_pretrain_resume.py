"""A pretraining that is killed, fills the disk or finds its tokens damaged goes on, to the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import texts
from builders import Recorder
from forked import Forked
from transformers import AutoTokenizer

from mmphi.pipeline.stage import Result
from mmphi.stages import pretrain
from mmphi.training.hf_trainer import ExactLossTrainer


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> Result:
    return texts.read_few(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(read, tmp_path_factory) -> Path:
    return texts.trained_straight(tmp_path_factory.mktemp("straight"), read)


def test_resumed_over_epochs_is_the_same_to_the_bit(tmp_path, straight, read, monkeypatch):
    """Stopped after 13 of 24 steps, which go more than twice over the text."""
    save = ExactLossTrainer._save_checkpoint

    def dying(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 13:
            raise KeyboardInterrupt

    first, second = Recorder(), Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(ExactLossTrainer, "_save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            texts.pretrained(tmp_path, read, texts.settings("text.txt"), first)
    figures = texts.pretrained(tmp_path, read, texts.settings("text.txt"), second)
    assert texts.same(tmp_path, straight)
    wanted = json.loads((straight / "figures.json").read_text())
    exact = {name for name in wanted if "seconds" not in name}
    assert {n: figures[n] for n in exact} == {n: wanted[n] for n in exact}
    losses = second.series("train/step_loss")
    assert sorted(losses) == list(range(1, 25))  # Those of before it was killed too.
    assert losses[3] == first.series("train/step_loss")[3]


def test_finished_is_not_trained_further(tmp_path, straight, read, monkeypatch):
    """Killed after the last checkpoint, before it was saved as a model."""
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            texts.pretrained(tmp_path, read, texts.settings("text.txt", stop="loss 4.9"))
    steps = [p.name for p in tmp_path.glob("checkpoint-*")]
    figures = texts.pretrained(tmp_path, read, texts.settings("text.txt", stop="loss 4.9"))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == steps
    assert steps == [f"checkpoint-{figures['pretrain/tokens'] / 512:.0f}"]


def newest(folder: Path) -> int:
    return max((int(made.name.split("-")[1]) for made in folder.glob("checkpoint-*")), default=0)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(tmp_path, read):
    """Three of four kills in the training, the others while it begins.

    A step takes 20 ms or more, so that on any machine a training outlasts its kills: 40 steps for each of them.
    """
    kills, rng, folder = 4, random.Random(0), tmp_path / "killed"
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "TEXTS_STEP_S": "0.02"
    }  # fmt: skip

    def begin(folder: Path) -> Forked:
        with Path(os.devnull).open("w") as nowhere:
            command = [texts.__file__, str(folder), str(read.path), str(40 * kills)]
            return Forked(command, environment, nowhere.fileno())

    process = begin(folder)
    for kill in range(1, kills + 1):
        before, training = newest(folder), kill % 4 != 2
        while training and newest(folder) == before:
            assert process.poll() is None, f"it ended before kill {kill} of {kills}"
            time.sleep(0.01)
        if not training:  # Its libraries are loaded, and the training is being set up.
            assert process.stdout.readline() == "begun\n"
        time.sleep(rng.uniform(0.0, 0.25))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process = begin(folder)
    assert 0 < newest(folder) < 40 * kills
    whole = begin(tmp_path / "whole")
    assert process.wait(240) == whole.wait(240) == 0
    assert texts.same(folder, tmp_path / "whole")


def test_a_full_disk_loses_nothing(tmp_path, read, straight, monkeypatch):
    """The disk is full while the ninth checkpoint is written: told, and gone on from the eighth."""
    from mmphi.errors import disk_is_full
    from mmphi.training import hf_trainer

    real, left = hf_trainer.save_tensors, [8]

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            arguments[1].mkdir(parents=True, exist_ok=True)
            (arguments[1] / "trained.safetensors").write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(hf_trainer, "save_tensors", full)
        with pytest.raises(OSError, match="No space") as caught:
            texts.pretrained(tmp_path, read, texts.settings("text.txt"))
    assert disk_is_full(caught.value)
    recorder = Recorder()
    texts.pretrained(tmp_path, read, texts.settings("text.txt"), recorder)
    assert any("resuming from step 8" in line for line in recorder.said)
    assert texts.same(tmp_path, straight)


def test_a_corrupt_shard_of_a_result_is_named_and_built_again(tmp_path, empty_store, capsys, monkeypatch):
    """The others are taken over from the damaged result; the training built on it is the same as before."""
    from mmphi.data import token_shards as shards
    from mmphi.pipeline.build import Pipeline
    from mmphi.stages import STAGES

    written = []
    write = shards.ShardWriter.write
    monkeypatch.setattr(
        shards.ShardWriter, "write", lambda self, name, *rest: written.append(name) or write(self, name, *rest)
    )
    one, two = (
        str(texts.write_text(tmp_path / f"{name}.txt", words)) for name, words in (("one", 3000), ("two", 3400))
    )
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(
        shards.ShardTokenizer.__init__,
        "__kwdefaults__",
        {**shards.ShardTokenizer.__init__.__kwdefaults__, "shard_tokens": 10},
    )
    chosen = texts.settings(one, two)
    first = Pipeline(STAGES).build("tokens", chosen)
    assert len(written) == 2
    victim = first.path / f"{written[1]}.ids.npy"
    kept = victim.read_bytes()
    victim.write_bytes(kept[:-1] + b"\xff")
    (first.path / "tokenizer" / "tokenizer.json").write_text("{}")
    second = Pipeline(STAGES).build("tokens", chosen)
    said = capsys.readouterr()
    assert f"shard {written[1]} has changed since it was written" in said.out + said.err
    assert written == [written[0], written[1], written[1]]
    assert (second.path / victim.name).read_bytes() == kept
    assert AutoTokenizer.from_pretrained(second.path / "tokenizer").eos_token_id is not None
