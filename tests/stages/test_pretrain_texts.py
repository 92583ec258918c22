"""Pretraining on texts: targets, stops, exact resume over epochs, processes that agree, and what can go wrong."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import texts
import torch
from conftest import Recorder
from safetensors.torch import load_file
from transformers import AutoTokenizer, PhiForCausalLM
from workers import spawn

from mmphi.errors import DataError, SettingsError, TrainingError
from mmphi.models.language import load_language
from mmphi.pipeline.stage import Result
from mmphi.settings import LanguageSettings
from mmphi.settings.view import SettingsView
from mmphi.stages import load_settings, pretrain, pretrain_texts, tokens
from mmphi.training import progress
from mmphi.training.trainer import Loop


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> Result:
    """Tokens of a text of about three epochs of the small training."""
    folder = tmp_path_factory.mktemp("corpus")
    return texts.tokenised(folder / "tokens", texts.settings(str(texts.write_text(folder / "text.txt", 4000))))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "language" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alike(recorder: Recorder, figures: dict[str, float], straight: Path) -> None:
    """The losses of every step are the same but for rounding, which a training of 24 steps magnifies."""
    wanted = {int(step): loss for step, loss in json.loads((straight / "losses.json").read_text()).items()}
    assert recorder.series("train/step_loss") == pytest.approx(wanted, abs=2e-3)
    held = json.loads((straight / "figures.json").read_text())["val/loss"]
    assert figures["val/loss"] == pytest.approx(held, abs=2e-3)


@pytest.fixture(scope="module")
def straight(read, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    recorder = Recorder()
    torch.set_num_threads(1)  # As in all tests; sums are taken in another order by more.
    figures = texts.pretrained(folder, read, texts.settings("text.txt"), recorder)
    recorder.metrics(figures)  # Names that MLflow takes.
    (folder / "figures.json").write_text(json.dumps(figures))
    (folder / "lines.json").write_text(json.dumps(recorder.said))
    (folder / "losses.json").write_text(json.dumps(recorder.series("train/step_loss")))
    return folder


def test_it_learns_and_tells(straight, read):
    figures = json.loads((straight / "figures.json").read_text())
    assert figures["pretrain/initial_loss"] == pytest.approx(math.log(300), abs=0.2)
    assert figures["pretrain/tokens"] == 24 * 512
    assert figures["val/loss"] < figures["pretrain/initial_loss"] - 1
    assert figures["reached/initial-1/tokens"] == 512 * figures["reached/initial-1/steps"]
    assert figures["reached/5/steps"] <= figures["reached/initial-1/steps"] < figures["reached/reference-plus-1/steps"]
    read_tokens = json.loads((read.path / "tokens.json").read_text())["sources"]["text.txt"]["train"]
    assert figures["pretrain/tokens"] > 2 * read_tokens
    assert "reached/7/steps" in figures  # Before it began: ln 300 is less.
    lines = json.loads((straight / "lines.json").read_text())
    told = [line for line in lines if line.startswith("iter ")]
    assert told[0].startswith("iter 0 step 0: loss 5.7")
    assert [line.split(":")[0] for line in told] == [f"iter {n} step {n}" for n in range(0, 24, 4)]
    assert "LR: 0.010000" in told[1]
    assert any("parameters (" in line for line in lines)


def test_result_is_a_phi_of_hugging_face(straight):
    model = PhiForCausalLM.from_pretrained(straight / "language")
    tokenizer = AutoTokenizer.from_pretrained(straight / "language")
    ids = tokenizer("one two three", return_tensors="pt")["input_ids"]
    found = load_language(LanguageSettings(), straight, torch.device("cpu"))
    assert torch.equal(model.eval()(ids).logits, found.model(ids).logits)
    assert model.config._attn_implementation == "sdpa"


def test_losses_of_rows_and_of_validation_are_right(straight, read):
    """The validation loss against transformers' own, window by window."""
    from mmphi.data.tokens import INDEX, Tokens

    model = PhiForCausalLM.from_pretrained(straight / "language").eval()
    index = json.loads((read.path / INDEX).read_text())
    held = Tokens(read.path, index["shards"])
    nats = count = 0.0
    for stretch in held.of(0, validation=True):
        ids = torch.tensor(held.ids(int(stretch)).astype("int64"))
        for first in range(0, len(ids) - 1, 32):
            part = ids[None, first : first + 33]
            loss = model(input_ids=part, labels=part).loss
            nats, count = nats + float(loss) * (part.shape[1] - 1), count + part.shape[1] - 1
    assert json.loads((straight / "figures.json").read_text())["val/loss"] == pytest.approx(nats / count, abs=1e-4)


def test_resumed_over_epochs_is_the_same_to_the_bit(tmp_path, straight, read, monkeypatch):
    """Stopped after 13 of 24 steps, which go more than twice over the text."""
    save = Loop._save_checkpoint

    def dying(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 13:
            raise KeyboardInterrupt

    first, second = Recorder(), Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            texts.pretrained(tmp_path, read, texts.settings("text.txt"), first)
    figures = texts.pretrained(tmp_path, read, texts.settings("text.txt"), second)
    assert same(tmp_path, straight)
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


def test_killed_at_random_moments_nothing_is_lost(tmp_path, read):
    """MMPHI_KILLS says how often."""
    kills, rng = int(os.environ.get("MMPHI_KILLS", "2")), random.Random(0)
    steps = str(16 * kills)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}

    def begin(folder: str) -> subprocess.Popen[str]:
        command = [sys.executable, texts.__file__, str(tmp_path / folder), str(read.path), steps]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    process, done = begin("killed"), 0
    while done < kills:
        before = len(list((tmp_path / "killed").glob("checkpoint-*")))
        while process.poll() is None and not before and not list((tmp_path / "killed").glob("checkpoint-*")):
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 4.0) if before else rng.uniform(0.0, 0.3))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        done += 1
        process = begin("killed")
    whole = begin("whole")
    assert process.wait(240) == whole.wait(240) == 0
    assert done > 0
    assert same(tmp_path / "killed", tmp_path / "whole")


WORKER = """
import texts
from mmphi.pipeline.stage import Result
from mmphi.tracking.tracker import SilentTracker
first = os.environ.get("RANK", "0") == "0"
read = Result("tokens", "key", "run", Path({read!r}))
figures = {{}}
for name, changes in {{"copied": {{}}, "spread": {{"shard": True}}}}.items():
    chosen = texts.settings("text.txt", stop="steps 4", **changes)
    folder = RUN / name
    folder.mkdir(parents=True, exist_ok=True)
    figures[name] = texts.pretrained(folder, read, chosen, recorder if first else SilentTracker(), first=first)
    if name == "spread":  # What is spread is put together in checkpoints, and spread again.
        (folder / "checkpoint-4" / "complete").rename(folder / "checkpoint-4" / "incomplete") if first else None
        torch.distributed.barrier() if torch.distributed.is_initialized() else None
        figures["resumed"] = texts.pretrained(folder, read, chosen, recorder if first else SilentTracker(), first=first)
saved = figures
"""


def test_two_processes_are_one(tmp_path, read):
    """Copied to both (DDP) and spread over both (FSDP2), on gloo: the same losses and weights as in one process."""
    body = WORKER.format(read=str(read.path))
    one, two = (spawn(tmp_path, n, __file__, body) for n in (1, 2))
    wanted = weights(tmp_path / "run1" / "copied")
    for name in ("copied", "spread", "resumed"):
        assert two[name]["val/loss"] == pytest.approx(one["copied"]["val/loss"], abs=2e-4)
        assert two[name]["pretrain/initial_loss"] == pytest.approx(one["copied"]["pretrain/initial_loss"], abs=1e-5)
    for name in ("copied", "spread"):
        found = weights(tmp_path / "run2" / name)
        assert max(float((found[n] - wanted[n]).abs().max()) for n in wanted) < 2e-3


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"accumulation": 4}])
def test_what_saves_memory_changes_nothing(tmp_path, read, straight, changes):
    recorder = Recorder()
    figures = texts.pretrained(tmp_path, read, texts.settings("text.txt", **changes), recorder)
    alike(recorder, figures, straight)


@pytest.mark.parametrize(
    ("stop", "steps"), [("initial-0.5", None), ("tokens 2k", 4), ("loss 1, steps 3", 3), ("time 0.01s", 1)]
)
def test_it_stops_where_it_is_told(tmp_path, read, stop, steps):
    figures = texts.pretrained(tmp_path, read, texts.settings("text.txt", stop=stop, steps=40))
    done = figures["pretrain/tokens"] / 512
    assert done == steps if steps else 1 < done < 40


def test_it_is_validated_once_at_its_end(tmp_path, read):
    """Wherever that is."""
    recorder = Recorder()
    figures = texts.pretrained(tmp_path, read, texts.settings("text.txt", stop="steps 5", steps=40), recorder)
    assert [row["step"] for row in recorder.tables["samples"]] == [5]
    assert recorder.series("val/loss") == {5: figures["val/loss"]}


def test_a_budget_of_tokens_ends_it(tmp_path, read):
    """As studies give it."""
    figures = texts.pretrained(tmp_path, read, texts.settings("text.txt", supervised_tokens=1500, steps=40))
    assert figures["pretrain/supervised_tokens"] == figures["pretrain/tokens"] == 3 * 512


def test_a_first_loss_that_cannot_be_is_told(tmp_path, read, monkeypatch):
    monkeypatch.setattr(progress, "INITIAL_TOLERANCE", -1.0)
    with pytest.raises(TrainingError, match=r"ln 300 = 5\.704"):
        texts.pretrained(tmp_path, read, texts.settings("text.txt"))


def test_compile_that_fails_is_told(tmp_path, read, monkeypatch):
    def fails(*_, **__):
        def run(*_, **__):
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", fails)
    recorder = Recorder()
    texts.pretrained(tmp_path, read, texts.settings("text.txt", compile=True, stop="steps 2"), recorder)
    assert any("no C++ compiler" in line and "without it" in line for line in recorder.said)


def test_walls_that_do_not_hold_are_replaced(tmp_path, read, straight, monkeypatch):
    monkeypatch.setattr(pretrain_texts, "WALLS_TOLERANCE", -1.0)
    recorder = Recorder()
    figures = texts.pretrained(tmp_path, read, texts.settings("text.txt"), recorder)
    assert any("masked rows are used" in line for line in recorder.said)
    alike(recorder, figures, straight)


def test_public_text_is_scored_by_the_protocol(tmp_path, read, straight):
    from mmphi.evaluation.perplexity import Protocol, text_loss

    public = tmp_path / "public.txt"
    public.write_text("two three four five " * 100)
    figures = texts.pretrained(tmp_path / "run", read, texts.settings("text.txt", public_text=str(public)))
    language = load_language(LanguageSettings(), tmp_path / "run", torch.device("cpu"))
    wanted = text_loss(language.model, language.tokenizer, public.read_text(), Protocol(32, 32))
    assert figures["public/loss"] == pytest.approx(wanted.loss, abs=1e-5)
    assert figures["public/bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-3)


def test_what_was_not_read_is_told(tmp_path):
    good = texts.write_text(tmp_path / "good.txt", 1200)
    (tmp_path / "bad.txt").write_bytes(bytes(range(256)))
    recorder = Recorder()
    with pytest.raises(DataError, match=r"bad\.txt has no text"):
        texts.tokenised(tmp_path / "one", texts.settings(str(good), str(tmp_path / "bad.txt")), recorder)
    assert any("binary" in line for line in recorder.said)
    with pytest.raises(DataError, match="kept apart"):
        texts.tokenised(tmp_path / "two", texts.settings(str(good), corpus={"validation_share": 1e-9}))


def checked(*sources: str, **changes: str) -> None:
    written = json.dumps(list(sources))
    chosen = load_settings("tiny", {"corpus.sources": written, **changes}, "pretrain")
    for stage in (tokens.STAGE, pretrain.STAGE):
        stage.check(SettingsView(chosen, stage.declared))


def test_settings_that_cannot_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = str(texts.write_text(tmp_path / "a.txt", 100))
    checked(text)
    with pytest.raises(SettingsError, match="no condition") as caught:
        checked(text, stop="when done")
    assert "initial-1" in caught.value.hint
    with pytest.raises(SettingsError, match="cannot be spread evenly over 3") as caught:
        checked(text, accumulation="3")
    assert "7680" in caught.value.hint
    with pytest.raises(SettingsError, match="no multiple of context"):
        checked(text, batch_tokens="1000")
    with pytest.raises(SettingsError, match="two sources are called"):
        checked(text, text)
    with pytest.raises(SettingsError, match="has no weight"):
        load_settings("tiny", {"corpus.sources": json.dumps([{"path": text, "weight": 1.0}, {"path": "b.txt"}])})
    (tmp_path / "books").mkdir()
    with pytest.raises(SettingsError, match="may be a folder"):
        checked("books")
    with pytest.raises(SettingsError, match="no text to tokenise"):
        tokens.STAGE.check(SettingsView(load_settings("tiny"), tokens.STAGE.declared))


def test_a_full_disk_loses_nothing(tmp_path, read, straight, monkeypatch):
    """The disk is full while the ninth checkpoint is written: told, and gone on from the eighth."""
    from mmphi.errors import disk_is_full
    from mmphi.training import trainer

    real, left = trainer.save_tensors, [8]

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            arguments[1].mkdir(parents=True, exist_ok=True)
            (arguments[1] / "trained.safetensors").write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_tensors", full)
        with pytest.raises(OSError, match="No space") as caught:
            texts.pretrained(tmp_path, read, texts.settings("text.txt"))
    assert disk_is_full(caught.value)
    recorder = Recorder()
    texts.pretrained(tmp_path, read, texts.settings("text.txt"), recorder)
    assert any("going on from step 8" in line for line in recorder.said)
    assert same(tmp_path, straight)


def test_a_corrupt_shard_of_a_result_is_named_and_built_again(tmp_path, empty_store, capsys, monkeypatch):
    """The others are taken over from the damaged result; the training built on it is the same as before."""
    from mmphi.data import tokens as shards
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
        shards.TokenWriting.__init__,
        "__kwdefaults__",
        {**shards.TokenWriting.__init__.__kwdefaults__, "shard_tokens": 10},
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
    assert f"shard {written[1]} is not as it was written" in said.out + said.err
    assert written == [written[0], written[1], written[1]]
    assert (second.path / victim.name).read_bytes() == kept
    assert AutoTokenizer.from_pretrained(second.path / "tokenizer").eos_token_id is not None
