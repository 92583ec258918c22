"""Pretraining on texts: what is learned and told, targets, stops, and processes that agree."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import texts
import torch
from builders import Recorder
from transformers import AutoTokenizer, PhiForCausalLM
from workers import spawn

from mmphi.config import LanguageSettings
from mmphi.models.language.language_model import load_language_model
from mmphi.models.patches.module_patches import remove_patches
from mmphi.pipeline.stage import Result
from mmphi.training import pretraining


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> Result:
    return texts.read_few(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(read, tmp_path_factory) -> Path:
    return texts.trained_straight(tmp_path_factory.mktemp("straight"), read)


def alike(recorder: Recorder, figures: dict[str, float], straight: Path) -> None:
    """The losses of every step are the same but for rounding, which a training of 24 steps magnifies."""
    wanted = {int(step): loss for step, loss in json.loads((straight / "losses.json").read_text()).items()}
    assert recorder.series("train/step_loss") == pytest.approx(wanted, abs=2e-3)
    held = json.loads((straight / "figures.json").read_text())["val/loss"]
    assert figures["val/loss"] == pytest.approx(held, abs=2e-3)


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
    found = load_language_model(LanguageSettings(), straight, torch.device("cpu"))
    published = model.eval()(ids).logits
    assert torch.allclose(published, found.model(ids).logits, atol=1e-5)  # One GELU rounds otherwise than eight steps.
    assert torch.equal(published, remove_patches(found.model)(ids).logits)
    assert model.config._attn_implementation == "sdpa"


def test_losses_of_rows_and_of_validation_are_right(straight, read):
    """The validation loss against transformers' own, window by window."""
    from mmphi.data.token_shards import INDEX, TokenShards

    model = PhiForCausalLM.from_pretrained(straight / "language").eval()
    index = json.loads((read.path / INDEX).read_text())
    held = TokenShards(read.path, index["shards"])
    nats = count = 0.0
    for stretch in held.of(0, validation=True):
        ids = torch.tensor(held.ids(int(stretch)).astype("int64"))
        for first in range(0, len(ids) - 1, 32):
            part = ids[None, first : first + 33]
            loss = model(input_ids=part, labels=part).loss.detach()
            nats, count = nats + float(loss) * (part.shape[1] - 1), count + part.shape[1] - 1
    assert json.loads((straight / "figures.json").read_text())["val/loss"] == pytest.approx(nats / count, abs=1e-4)


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


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, read):
    """Copied to both (DDP) and spread over both (FSDP2), on gloo: the same losses and weights as in one process."""
    body = WORKER.format(read=str(read.path))
    one, two = (spawn(tmp_path, n, __file__, body) for n in (1, 2))
    wanted = texts.weights(tmp_path / "run1" / "copied")
    for name in ("copied", "spread", "resumed"):
        assert two[name]["val/loss"] == pytest.approx(one["copied"]["val/loss"], abs=2e-4)
        assert two[name]["pretrain/initial_loss"] == pytest.approx(one["copied"]["pretrain/initial_loss"], abs=1e-5)
    for name in ("copied", "spread"):
        found = texts.weights(tmp_path / "run2" / name)
        assert max(float((found[n] - wanted[n]).abs().max()) for n in wanted) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 4}])
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


def test_compile_that_fails_is_told(tmp_path, read, monkeypatch):
    def fails(*_, **__):
        def run(*_, **__):
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", fails)
    recorder = Recorder()
    texts.pretrained(tmp_path, read, texts.settings("text.txt", compile=True, stop="steps 2"), recorder)
    assert any("no C++ compiler" in line and "without it" in line for line in recorder.said)


@pytest.mark.slow
def test_walls_that_do_not_hold_are_replaced(tmp_path, read, straight, monkeypatch):
    monkeypatch.setattr(pretraining, "ISOLATION_TOLERANCE", -1.0)
    recorder = Recorder()
    figures = texts.pretrained(tmp_path, read, texts.settings("text.txt"), recorder)
    assert any("using masked rows instead" in line for line in recorder.said)
    alike(recorder, figures, straight)


def test_public_text_is_scored_by_the_protocol(tmp_path, read, straight):
    from mmphi.evaluation.perplexity import PerplexityProtocol, text_loss

    public = tmp_path / "public.txt"
    public.write_text("two three four five " * 100)
    figures = texts.pretrained(tmp_path / "run", read, texts.settings("text.txt", eval_text=str(public)))
    language = load_language_model(LanguageSettings(), tmp_path / "run", torch.device("cpu"))
    wanted = text_loss(language.model, language.tokenizer, public.read_text(), PerplexityProtocol(32, 32))
    assert figures["public/loss"] == pytest.approx(wanted.loss, abs=1e-5)
    assert figures["public/bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-3)
