"""The adapter's training as the pipeline builds it, at a size that takes seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
import torch
from builders import example
from forked import run
from safetensors.torch import load_file, save_file
from transformers import PhiForCausalLM

import mmphi
from mmphi.config.qlora import QloraSettings
from mmphi.data.phrasing import DESCRIBE
from mmphi.data.schema import ImageRef
from mmphi.errors import ModelError, SettingsError, TrainingError
from mmphi.models.checkpoint import load_checkpoint
from mmphi.models.language.adapter import AdapterConfig, adapter_parameters, add_adapter, merge_adapter
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Result
from mmphi.stages import STAGES
from mmphi.stages.qlora import caption_questions
from mmphi.tracking.run_writer import TrackingStore
from mmphi.training.checkpoints import load_weights


@pytest.fixture(scope="module")
def pipeline(small_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A store in which a small adapter is trained already."""
    with small.built("qlora", small_chain, tmp_path_factory.mktemp("qlora")) as pipeline:
        yield pipeline


@pytest.fixture
def result(pipeline: Pipeline) -> Result:
    return pipeline.build("qlora", small.settings())


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter" / "adapter_model.safetensors")


def questions(pipeline: Pipeline) -> list[tuple[ImageRef, str]]:
    scenes = pipeline.result("scenes", small.settings())
    images = sorted((scenes.path / "images" / "test").glob("*.png"))[:4]
    return [(ImageRef(path.name, path), "what shapes are there?") for path in images]


def test_it_trains_what_it_should_and_tells(pipeline, result):
    base = pipeline.result("projector", small.settings()).path
    before, after = (load_file(path / "projector.safetensors") for path in (base, result.path))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter(result.path).items() if "lora_B" in name)
    own, theirs = result.path / "language", base / "language"
    assert (own / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    layers = {name.split(".layers.")[1].split(".lora_")[0][2:] for name in adapter(result.path)}
    assert layers == {*(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "dense")), "mlp.fc1", "mlp.fc2"}
    assert {"before/val/loss", "val/loss", "val/grounding_gain", "val/text_loss", "test/loss"} <= set(result.metrics)
    tables = pipeline.store.client.list_artifacts(result.run_id)
    assert {"before_and_after.json", "steps.json"} <= {Path(artifact.path).name for artifact in tables}
    (evaluated,) = result.after
    assert pipeline.store.run(evaluated.run_id).data.tags["mmphi.upstream.qlora"] == result.run_id


def test_loaded_anew_it_answers_the_same(pipeline, result):
    """In this process twice, and by PEFT alone."""
    loaded = load_checkpoint(result.path)
    assert loaded.vision is not None
    assert loaded.vision.question == DESCRIBE  # As the projector's model has it.
    held = loaded.losses([example for example in examples(pipeline) if example.split == "test"])
    assert mmphi.load(result.run_id).losses(
        [example for example in examples(pipeline) if example.split == "test"]
    ) == pytest.approx(held, rel=1e-5)
    from peft import PeftModel

    from mmphi.models.language.language_model import _quantization, disable_bnb_repacking

    config = _quantization("4bit", torch.device("cpu"))
    base = disable_bnb_repacking(PhiForCausalLM.from_pretrained(result.path / "language", quantization_config=config))
    theirs = PeftModel.from_pretrained(base, str(result.path / "adapter")).eval()
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(theirs(ids).logits, loaded.language.model(ids).logits, atol=1e-5)


def test_a_checkpoint_is_measured_and_the_adapter_in_use_stays(pipeline, result):
    """The last checkpoint is the result, and others in this process keep the adapter that they have."""
    held = [example for example in examples(pipeline) if example.split == "test"]
    shared = load_checkpoint(result.path, once=pipeline.resources.once)
    before = shared.losses(held)
    final = pipeline.build("evaluate", small.settings(evaluate__stage="qlora"))
    last = pipeline.build("evaluate", small.settings(evaluate__stage="qlora", evaluate__checkpoint="6"))
    assert last.run_id != final.run_id
    assert last.metrics["test/loss"] == pytest.approx(final.metrics["test/loss"], rel=1e-5)
    (checkpoint,) = result.path.glob("checkpoint-6")
    weights = load_file(checkpoint / "trained.safetensors")
    model = load_checkpoint(result.path)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, checkpoint.parent / "trained.safetensors")
    load_weights(model.packed, checkpoint.parent)
    (checkpoint.parent / "trained.safetensors").unlink()
    assert model.losses(held) != before
    assert shared.losses(held) == before


@pytest.mark.slow
def test_it_answers_the_same_in_another_process(pipeline, result):
    asked = questions(pipeline)
    answers = [answer.text for answer in load_checkpoint(result.path).generate(asked, 6)]
    code = (
        "import json, sys, torch, mmphi\n"
        "from pathlib import Path\n"
        "from mmphi.data.schema import ImageRef\n"
        "torch.set_num_threads(1)\n"
        "asked = [(ImageRef(Path(p).name, Path(p)), 'what shapes are there?') for p in sys.argv[2:]]\n"
        "print(json.dumps([a.text for a in mmphi.load(sys.argv[1]).generate(asked, 6)]))\n"
    )
    said = run(["-c", code, str(result.path), *(str(image.path) for image, _ in asked)])
    assert json.loads(said.stdout.splitlines()[-1]) == answers


def examples(pipeline: Pipeline) -> list:
    from mmphi.data.dataset_builder import read_examples

    scenes = pipeline.result("scenes", small.settings())
    return read_examples(small.settings().data, scenes.path)[0]


def test_two_models_of_one_base_do_not_meet(pipeline, result):
    """A projector's model that is loaded after an adapter's has no adapter, and is what it was."""
    projector = pipeline.result("projector", small.settings()).path
    test = [example for example in examples(pipeline) if example.split == "test"]
    before = mmphi.load(projector).losses(test)
    mmphi.load(result.path)
    again = mmphi.load(projector)
    assert again.language.adapter is None
    assert again.losses(test) == before


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same(pipeline):
    command = [str(Path(small.__file__)), "qlora", "qlora.seed=7", "qlora.dropout=0.1"]
    died = run(command, {**os.environ, "SMALL_DIE_AT": "4"})
    assert died.returncode == -signal.SIGKILL
    resumed = run(command)
    assert "resuming from step 4" in resumed.stderr + resumed.stdout
    path = Path(json.loads(resumed.stdout.splitlines()[-1])["path"])
    straight = Pipeline(STAGES).build("qlora", small.settings(qlora__seed="7", qlora__dropout="0.1"), force=True)
    one, other = adapter(path), adapter(straight.path)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_frozen_projector_stays(pipeline):
    frozen = pipeline.build("qlora", small.settings(qlora__projector_learning_rate="0", qlora__steps="2"), after=False)
    base = pipeline.result("projector", small.settings()).path
    before, after = (load_file(path / "projector.safetensors") for path in (base, frozen.path))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_mixtures_take_groups(pipeline):
    mixed = {"qlora__mixture": "scenes:caption=1, text=2", "qlora__steps": "2"}
    found = pipeline.build("qlora", small.settings(**mixed), after=False)
    rows = (
        json.loads(Path(found.path / "data_read.json").read_text()) if (found.path / "data_read.json").exists() else []
    )
    assert found.metrics["qlora/steps"] == 2 or rows
    with pytest.raises(SettingsError, match="no training row is in the group 'jokes'") as caught:
        pipeline.build("qlora", small.settings(qlora__mixture="jokes=1"))
    assert "scenes:caption" in caught.value.hint
    with pytest.raises(SettingsError, match="not of the form group=weight"):
        pipeline.build("qlora", small.settings(qlora__mixture="caption=-1"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"qlora__rank": "33"}, ModelError, "rank 33 is above the width"),
        ({"qlora__targets": "[q_proj, w_proj]"}, ModelError, "no linear layer 'w_proj'"),
        ({"qlora__optimizer": "muon"}, SettingsError, "trained with AdamW"),
        ({"qlora__batch_size": "2", "qlora__gradient_accumulation_steps": "3"}, SettingsError, "qlora.batch_size = 2"),
        ({"qlora__dora": "true", "qlora__rslora": "true"}, SettingsError, "both on"),
    ],
)
def test_what_cannot_be_is_told(pipeline, changes, error, words):
    with pytest.raises(error, match=words):
        pipeline.build("qlora", small.settings(**changes))


def test_a_damaged_or_foreign_adapter_is_refused(pipeline, result, tmp_path):
    shutil.copytree(result.path, tmp_path / "other")
    file = tmp_path / "other" / "adapter" / "adapter_model.safetensors"
    file.unlink()
    tensors = adapter(result.path)
    save_file({name: torch.full_like(t, torch.nan) for name, t in tensors.items()}, file)
    with pytest.raises(ModelError, match="was changed after it was saved"):
        load_checkpoint(tmp_path / "other")
    from mmphi.models.language.adapter import load_adapter

    language = load_checkpoint(pipeline.result("projector", small.settings()).path).language
    with pytest.raises(ModelError, match="not finite"):
        load_adapter(language, tmp_path / "other" / "adapter")
    save_file({name: t[:, :-1].contiguous() if t.ndim == 2 else t for name, t in tensors.items()}, file)
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(language, tmp_path / "other" / "adapter")
    other = pipeline.build("pretrain", small.settings(pretrain__seed="5"))
    with pytest.raises(ModelError, match="not the language model that"):
        load_checkpoint(result.path, language=str(other.path / "language"))


def test_a_projector_of_another_width_is_refused(pipeline, tmp_path):
    base = pipeline.result("projector", small.settings()).path
    for side, words in (("output_width", "for the language model of width 31, not 32"), ("input_width", "of width 31")):
        folder = tmp_path / side
        shutil.copytree(base, folder)
        config = ProjectorConfig(**{**json.loads((base / "projector.json").read_text()), side: 31})
        Projector(config).save(folder)
        with pytest.raises(ModelError, match=words):
            pipeline.build("qlora", small.settings(qlora__model=str(folder)))


@pytest.mark.slow
def test_weights_that_are_no_longer_numbers_end_the_training_and_lose_nothing(pipeline, monkeypatch, capsys):
    """At step 5, after the checkpoint of step 4, from which the next call goes on to what it would have been."""
    settings = small.settings(qlora__seed="9")
    forward = PackedVLM.forward

    def broken(self, **pack):
        loss = forward(self, **pack)
        broken.calls += torch.is_grad_enabled()
        return loss * torch.nan if broken.calls == 5 else loss

    broken.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(PackedVLM, "forward", broken)
        with pytest.raises(TrainingError, match="the loss at step 5 is nan"):
            pipeline.build("qlora", settings)
    resumed = pipeline.build("qlora", settings, after=False)
    assert "resuming from step 4" in "".join(capsys.readouterr())
    straight = pipeline.build("qlora", settings, after=False, force=True)
    one, other = adapter(resumed.path), adapter(straight.path)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_is_not_put_on_an_adapter(pipeline, result):
    with pytest.raises(ModelError, match="has an adapter already"):
        pipeline.build("qlora", small.settings(qlora__model=result.run_id))


@pytest.mark.slow
def test_a_projector_of_another_run_is_taken_over(pipeline):
    other = TrackingStore().model_folder(pipeline.result("projector", small.settings()).run_id)
    found = pipeline.build("qlora", small.settings(qlora__model=str(other), qlora__steps="2"), after=False)
    assert found.metrics["qlora/steps"] == 2
    with pytest.raises(ModelError, match="other image features"):
        pipeline.build("qlora", small.settings(qlora__model=str(other), vision__pool="2"), after=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_is_adapter_on_the_dequantised_base(pipeline, result, precision):
    found = pipeline.build("merge", small.settings(merge__precision=precision))
    tolerance = 1e-4 if precision == "fp32" else 0.02
    assert found.metrics["val/loss"] == pytest.approx(found.metrics["before/val/loss"], abs=tolerance)
    ids = torch.arange(5, 25)[None]
    alone = PhiForCausalLM.from_pretrained(found.path / "language", dtype=torch.float32)
    assert not any(hasattr(m, "quant_state") for m in alone.modules())
    whole = load_checkpoint(result.path).language.model
    assert torch.allclose(alone(ids).logits, whole(ids).logits, atol=1e-4 if precision == "fp32" else 0.05)
    test = [example for example in examples(pipeline) if example.split == "test"]
    nats, tokens = mmphi.load(found.path, precision="fp32").losses(test)
    wanted, _ = load_checkpoint(result.path).losses(test)
    assert nats / tokens == pytest.approx(wanted / tokens, abs=tolerance)
    if precision == "fp32":
        evaluated = pipeline.build("evaluate", small.settings(evaluate__stage="merge", merge__precision=precision))
        assert evaluated.metrics["test/loss"] == pytest.approx(result.metrics["test/loss"], abs=tolerance)


def test_what_has_no_adapter_is_not_merged(pipeline):
    projector = pipeline.result("projector", small.settings())
    with pytest.raises(ModelError, match="no adapter to merge"):
        pipeline.build("merge", small.settings(merge__model=projector.run_id))


@pytest.mark.parametrize("how", [{"dora": True}, {"rslora": True}, {"targets": ("q_proj", "fc2")}])
@pytest.mark.parametrize("base", ["fp32", "8bit", "4bit"])
def test_every_kind_of_adapter_merges(pipeline, how, base):
    """Beside PEFT's own forward pass, after a step of training."""
    if base == "8bit" and "dora" in how:
        with pytest.raises(SettingsError, match="does not work on"):
            pipeline.build("qlora", small.settings(qlora__dora="true", qlora__base_precision="8bit"))
        return
    folder = pipeline.result("projector", small.settings()).path
    language = load_checkpoint(folder, precision=base).language
    language = add_adapter(language, AdapterConfig(rank=4, alpha=8, **how))
    for parameter in adapter_parameters(language).values():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim == 2 else parameter.data.mul_(1.1)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = language.model(ids).logits
        found = merge_adapter(language, torch.float32).model(ids).logits
    # In 8 bit the layer rounds its inputs too, which the merged one does not.
    assert torch.allclose(found, wanted, atol=0.3 if base == "8bit" else 1e-4)


def test_questions_are_made_of_the_captions_of_their_own_split():
    """And the test is left as it is."""
    rows = [example(0, "a dog"), example(1, "a cat", split="validation"), example(2, "a car", split="test")]
    rows += [example(3, "a boat"), example(4, "a horse", split="validation")]
    made = caption_questions(rows, QloraSettings(questions=2))
    shown = sorted((row.split, row.image.id[-5]) for row in made)
    assert shown == [("train", "0"), ("train", "3"), ("validation", "1"), ("validation", "4")]
    learned = " ".join(turn.question for row in made if row.split == "train" for turn in row.turns)
    assert not {"cat", "horse", "car"} & set(learned.replace("?", "").split())
    assert caption_questions(rows, QloraSettings()) == []
