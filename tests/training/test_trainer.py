from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from builders import RandomFeatures, Recorder, encode, example, tiny_language
from safetensors.torch import load_file
from small_training import ANSWERS, new_projector, trained, weights
from transformers import TrainingArguments
from workers import spawn

from mmphi.config import TrainingSettings
from mmphi.data.schema import ImageRef
from mmphi.errors import ModelError, Stopped, TrainingError
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.training.checkpoints import complete_checkpoints, load_trained, prune
from mmphi.training.packed_dataset import packed_dataset
from mmphi.training.trainer import train
from mmphi.training.training_args import training_arguments


def run(folder: Path, recorder: Recorder | None = None, validate=None, dropout: float = 0.0, **changes) -> Projector:
    """Train a projector for a few steps, always from the same beginning."""
    projector = new_projector(dropout)
    trained(projector, folder, changes, tracker=recorder or Recorder(), validate=validate)
    return projector


def test_loss_falls_and_frozen_weights_stay(tmp_path, recorder):
    before = tiny_language().model.state_dict()
    run(tmp_path, recorder, steps=30, learning_rate=1e-2)
    losses = recorder.series("train/loss")
    assert losses[30] < losses[1]
    assert {"train/lr", "train/grad_norm", "train/tokens_per_s", "train/memory_gb"} <= set(recorder.metric_rows[-1][1])
    saved = load_file(complete_checkpoints(tmp_path)[-1] / "trained.safetensors")
    assert all(name.startswith("projectors.image.") for name in saved)
    assert not saved.keys() & before.keys()


def test_every_step_is_validated_once(tmp_path):
    validated = []

    def validate(step: int) -> dict[str, float]:
        validated.append(step)
        return {"val/loss": 1.0}

    run(tmp_path, validate=validate, steps=5, eval_every=2)
    assert validated == [2, 4, 5]


def test_accumulated_equals_whole(tmp_path):
    whole, parts = Recorder(), Recorder()
    one = weights(run(tmp_path / "a", whole, gradient_accumulation_steps=1))
    four = weights(run(tmp_path / "b", parts, gradient_accumulation_steps=4))
    torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-5)
    for step, loss in whole.series("train/loss").items():
        assert parts.series("train/loss")[step] == pytest.approx(loss, rel=1e-5)


def test_loss_is_per_supervised_token_of_the_step(tmp_path, recorder):
    """Against plain arithmetic: summed nats of the step's samples over the number of their tokens."""
    run(tmp_path, recorder, steps=1)
    from mmphi.text.packing import pack
    from mmphi.training.packed_dataset import PackedStepDataset

    language = tiny_language()
    torch.manual_seed(1)
    model = PackedVLM(language.model, image=Projector(ProjectorConfig(RandomFeatures.width, 32)))
    sources = {"image": RandomFeatures()}
    samples = [encode(example(i, a), language.prompt, RandomFeatures.tokens, 200) for i, a in enumerate(ANSWERS)]
    step = PackedStepDataset(samples, sources, steps=1, batch_size=4, packs_per_step=1, seed=0).step(0)
    nats = sum(model(**pack([s], sources)).item() for s in step)
    tokens = sum(int(s.supervised.sum()) for s in step)
    assert recorder.series("train/loss")[1] == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_resumed_equals_straight_to_the_bit(tmp_path, dropout):
    straight, resumed = Recorder(), Recorder()
    expected = run(tmp_path / "straight", straight, dropout=dropout)

    def stop_after_three(step: int):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"val/loss": 1.0}

    with pytest.raises(Stopped, match="step"):
        run(tmp_path / "cut", Recorder(), validate=stop_after_three, eval_every=1, dropout=dropout)
    done = complete_checkpoints(tmp_path / "cut")
    assert [p.name for p in done] == ["checkpoint-4"]
    assert torch.equal(weights(run(tmp_path / "cut", resumed, dropout=dropout)), weights(expected))
    for step, loss in straight.series("train/loss").items():
        assert resumed.series("train/loss")[step] == loss  # earlier steps are recorded again in the new run


def test_incomplete_checkpoint_is_not_resumed_from(tmp_path):
    expected = run(tmp_path / "a")
    run(tmp_path / "b", steps=2, lr_scheduler="constant")
    torn = tmp_path / "b" / "checkpoint-4"
    torn.mkdir()
    (torn / "trained.safetensors").write_bytes(b"torn")
    (tmp_path / "b" / "checkpoint-2" / "complete").unlink()
    assert torch.equal(weights(run(tmp_path / "b")), weights(expected))


def test_not_finite_stops_and_saves_the_batch(tmp_path):
    language = tiny_language()
    projector = Projector(ProjectorConfig(RandomFeatures.width, 32))
    with torch.no_grad():
        projector.layers[0].weight[0, 0] = float("nan")
    samples = [encode(example(i, a), language.prompt, RandomFeatures.tokens, 200) for i, a in enumerate(ANSWERS)]
    settings = TrainingSettings(steps=2, batch_size=4)
    with pytest.raises(TrainingError, match=r"step 1 is nan; the batch is saved"):
        train(
            PackedVLM(language.model, image=projector),
            packed_dataset(samples, {"image": RandomFeatures()}, settings),
            settings,
            folder=tmp_path,
            tracker=Recorder(),
            title="test",
        )
    assert load_file(tmp_path / "bad_batch.safetensors")["input_ids"].ndim == 2


def test_validation_is_recorded_at_its_steps(tmp_path, recorder):
    run(tmp_path, recorder, validate=lambda step: {"val/loss": float(step)}, eval_every=4)
    assert recorder.series("val/loss") == {4: 4.0, 6: 6.0}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = weights(run(tmp_path / "a"))
    torch.testing.assert_close(weights(run(tmp_path / "b", gradient_checkpointing=True)), plain, rtol=1e-5, atol=1e-6)


def test_another_order_for_another_seed(tmp_path):
    assert not torch.equal(weights(run(tmp_path / "a")), weights(run(tmp_path / "b", seed=1)))


def test_a_budget_of_tokens_is_as_many_steps_whatever_the_features() -> None:
    """The steps that learn from at least so many tokens; and their number does not depend on how images are seen."""
    language, answers = tiny_language(), ANSWERS * 3
    made = {}
    for tokens in (2, 4):
        samples = [encode(example(i, a), language.prompt, tokens, 200) for i, a in enumerate(answers)]
        made[tokens] = packed_dataset(samples, {}, TrainingSettings(steps=5, batch_size=4))
    learned = [sum(int(s.supervised.sum()) for s in made[4].step(step)) for step in range(40)]
    assert made[4].supervised() == sum(learned[:5])
    for budget in (1, learned[0], learned[0] + 1, sum(learned[:30])):
        steps = made[4].until(budget)
        assert sum(learned[:steps]) >= budget > sum(learned[: steps - 1])
        assert made[2].until(budget) == steps
    assert [s.name for s in made[2].step(3)] == [s.name for s in made[4].step(3)]


def test_prune_keeps_the_newest(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    (tmp_path / "checkpoint-8").mkdir()
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    run(tmp_path, steps=2)
    other = PackedVLM(tiny_language().model, image=Projector(ProjectorConfig(RandomFeatures.width, 32, layers=3)))
    with pytest.raises(ModelError, match="another model"):
        load_trained(other, complete_checkpoints(tmp_path)[-1])


WORKER = """
from test_trainer import run, weights
projector = run(RUN, recorder, gradient_accumulation_steps=2 // int(os.environ.get("WORLD_SIZE", "1")))
saved = {"weights": weights(projector), "losses": recorder.series("train/loss")}
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one, two = (spawn(tmp_path, n, __file__, WORKER) for n in (1, 2))
    torch.testing.assert_close(one["weights"], two["weights"], rtol=1e-4, atol=1e-5)
    assert one["losses"].keys() == two["losses"].keys()
    for step, loss in one["losses"].items():
        assert two["losses"][step] == pytest.approx(loss, rel=1e-5)


def test_checkpoints_are_shared_where_the_settings_say_so(tmp_path):
    """A remote store gets them when they are complete."""
    for share, expected in ((True, ["checkpoint-2", "checkpoint-4", "checkpoint-6"]), (False, [])):
        recorder = Recorder()
        run(tmp_path / str(share), recorder, share_checkpoints=share)
        assert recorder.checkpoints == expected


def test_one_process_takes_one_device(tmp_path, monkeypatch):
    """With two visible GPUs and no torchrun, transformers' Trainer would take both."""
    real = TrainingArguments._setup_devices.func

    def two(self):
        device = real(self)
        self._n_gpu = 2
        return device

    devices = cached_property(two)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]).n_gpu == 2
    assert training_arguments(TrainingSettings(), tmp_path, 1e-8).n_gpu == 1


def test_views_of_an_image_take_turns(tmp_path):
    """Each sequence is met with all of its views as often as the others, whatever the step, and by its number alone."""
    language = tiny_language()
    samples = []
    for number, answer in enumerate(ANSWERS):
        sample = encode(example(number, answer), language.prompt, RandomFeatures.tokens, 200)
        image = sample.spans[0]._replace(reference=ImageRef(str(number), Path("somewhere")))
        samples.append(replace(sample, spans=(image,), name=str(number)))
    settings = TrainingSettings(steps=12, batch_size=4)
    steps = packed_dataset(samples, {"image": RandomFeatures()}, settings, views=3)
    met = [(s.name, s.spans[0].reference.view) for step in range(12) for s in steps.step(step)]
    assert Counter(met) == {(sample.name, view): 2 for sample in samples for view in range(3)}
    assert {view for _, view in met[:8]} == {0, 1, 2}
    plain = packed_dataset(samples, {"image": RandomFeatures()}, settings)
    assert {s.spans[0].reference.view for step in range(12) for s in plain.step(step)} == {0}
    for step in (0, 11):
        for one, other in zip(plain.step(step), steps.step(step), strict=True):
            assert one.name == other.name
            assert one.spans[0]._replace(reference=None) == other.spans[0]._replace(reference=None)
