"""The stages as the pipeline builds them, at sizes that take seconds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
from forked import run
from safetensors.torch import load_file

import mmphi
from mmphi.config import LanguageSettings
from mmphi.data.phrasing import DESCRIBE
from mmphi.data.schema import ImageRef
from mmphi.errors import ModelError, SettingsError
from mmphi.models.checkpoint import load_checkpoint
from mmphi.models.multimodal import Multimodal
from mmphi.models.patches.layer_norm_dtype import cast_output_to_input_dtype
from mmphi.pipeline.build import Pipeline
from mmphi.tracking.run_writer import TrackingStore

UPSTREAM = ("scenes", "pretrain", "light_clip", "embed")


@pytest.fixture(scope="module")
def pipeline(small_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A store in which the small projector is built already."""
    with small.built("projector", small_chain, tmp_path_factory.mktemp("stages")) as pipeline:
        yield pipeline


def runs(pipeline: Pipeline, **changes: str) -> dict[str, str]:
    """Run ids of everything that a projector of these settings is built on, and its own."""
    result = pipeline.build("projector", small.settings(**changes), after=False)
    tags = pipeline.store.run(result.run_id).data.tags
    return {"projector": result.run_id} | {name: tags[f"mmphi.upstream.{name}"] for name in UPSTREAM}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "projector.safetensors")


def losses(pipeline: Pipeline, run_id: str) -> list[float]:
    return [m.value for m in pipeline.store.client.get_metric_history(run_id, "train/loss")]


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([str(Path(small.__file__)), *arguments], {**os.environ, **environment})


def test_projector_is_trained_and_evaluated(pipeline: Pipeline) -> None:
    result = pipeline.build("projector", small.settings())
    (evaluated,) = result.after
    assert evaluated.stage == "evaluate"
    assert {"test/loss", "test/grounding_gain", "test/cider", "test/exact_match", "projector/steps"} <= set(
        result.metrics
    )
    run = pipeline.store.run(result.run_id)
    assert run.data.metrics["test/loss"] == pipeline.store.run(evaluated.run_id).data.metrics["test/loss"]
    assert set(run.data.metrics) >= {"train/loss", "val/loss", "val/grounding_gain"}
    assert (evaluated.path / "test_predictions.json").exists()
    assert (result.path / "README.md").read_text().count(result.run_id) >= 1


def test_other_seed_shares_everything_upstream(pipeline: Pipeline) -> None:
    one, other = runs(pipeline), runs(pipeline, projector__seed="1")
    assert one["projector"] != other["projector"]
    assert {name: one[name] for name in UPSTREAM} == {name: other[name] for name in UPSTREAM}
    results = [pipeline.build("projector", small.settings(projector__seed=seed), after=False) for seed in "01"]
    assert not torch.equal(*[weights(result.path)["layers.1.weight"] for result in results])


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"projector__layers": "1"}, True),
        ({"data__sources": "[{kind: scenes, question: why, weight: 3}]"}, True),
        ({"evaluate__split": "validation"}, True),
        ({"pretrain__seed": "1"}, True),
        ({"vision__layer": "-1"}, False),
        ({"light_clip__seed": "1"}, False),
    ],
)
def test_what_embeds_anew(pipeline: Pipeline, changes: dict[str, str], same: bool) -> None:
    one, other = small.settings(), small.settings(**changes)
    assert (pipeline.key("embed", one) == pipeline.key("embed", other)) == same


def test_evaluate_settings_change_evaluate_alone(pipeline: Pipeline) -> None:
    before = pipeline.build("projector", small.settings())
    after = pipeline.build("projector", small.settings(evaluate__max_images="3"))
    assert before.run_id == after.run_id
    assert before.after[0].run_id != after.after[0].run_id


@pytest.mark.slow
def test_forced_projector_is_evaluated_anew(pipeline: Pipeline) -> None:
    changes = {"projector__seed": "6"}
    first = pipeline.build("projector", small.settings(**changes))
    forced = pipeline.build("projector", small.settings(**changes), force=True)
    assert forced.run_id != first.run_id
    tags = pipeline.store.run(forced.after[0].run_id).data.tags
    assert tags["mmphi.upstream.projector"] == forced.run_id


@pytest.mark.slow
def test_kept_checkpoints_can_be_evaluated(pipeline: Pipeline) -> None:
    changes = {"projector__seed": "5", "projector__keep_checkpoints": "9"}
    final = pipeline.build("evaluate", small.settings(**changes))
    early = pipeline.build("evaluate", small.settings(**changes, evaluate__checkpoint="2"))
    last = pipeline.build("evaluate", small.settings(**changes, evaluate__checkpoint="8"))
    assert early.metrics["test/loss"] != final.metrics["test/loss"]
    assert last.metrics["test/loss"] == final.metrics["test/loss"]
    with pytest.raises(SettingsError, match="available: final, 2, 4, 6, 8"):
        pipeline.build("evaluate", small.settings(**changes, evaluate__checkpoint="3"))


RESUMED = {"projector__seed": "2", "projector__dropout": "0.2", "projector__alignment_steps": "3"}


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped when the checkpoint of step 4 is complete; the same call resumes from it."""
    with small.interrupted_after(4):
        pipeline.build("projector", small.settings(**RESUMED))
    resumed = pipeline.build("projector", small.settings(**RESUMED), after=False)
    assert "resuming from step 4" in "".join(capsys.readouterr())
    straight = pipeline.build("projector", small.settings(**RESUMED), after=False, force=True)
    assert resumed.run_id != straight.run_id
    after, expected = (losses(pipeline, run.run_id)[-4:] for run in (resumed, straight))
    assert after == expected
    assert_equal_weights(resumed.path, straight.path)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(pipeline: Pipeline) -> None:
    """SIGKILL after the checkpoint of step 4, in processes of their own."""
    own = {**RESUMED, "projector__seed": "3"}
    given = [f"{name.replace('__', '.')}={value}" for name, value in own.items()]
    killed = script("projector", *given, SMALL_DIE_AT="4")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = script("projector", *given)
    assert "resuming from step 4" in resumed.stdout + resumed.stderr
    straight = pipeline.build("projector", small.settings(**own), force=True)
    ended = json.loads(resumed.stdout.splitlines()[-1])
    assert ended["run_id"] != straight.run_id
    assert_equal_weights(Path(ended["path"]), straight.path)


def assert_equal_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_features_may_learn_to_name_words_first(pipeline: Pipeline) -> None:
    own = {"projector__alignment_steps": "6", "projector__alignment_batch_size": "16", "projector__eval_every": "3"}
    result = pipeline.build("projector", small.settings(**own), after=False)
    loss, gain = (
        {m.step: m.value for m in pipeline.store.client.get_metric_history(result.run_id, f"align/val/{name}")}
        for name in ("loss", "gain")
    )
    assert list(loss) == list(gain) == [3, 6]
    assert loss[6] < loss[3]
    assert gain[3] + loss[3] == pytest.approx(gain[6] + loss[6], rel=1e-4)
    rows = json.loads((result.path / "align_words.json").read_text())
    named = [dict(zip(rows["columns"], row, strict=True)) for row in rows["data"]]
    assert {row["step"] for row in named} == {3, 6}
    assert len({str(row["image"]) for row in named}) == 2
    assert all(len(row["words"].split()) == 16 for row in named)
    plain = pipeline.build("projector", small.settings(projector__eval_every="3"), after=False)
    first, other = (losses(pipeline, run.run_id)[0] for run in (result, plain))
    assert first != other


def test_cached_features_train_as_live_ones(pipeline: Pipeline) -> None:
    cached = pipeline.build("projector", small.settings())
    live = pipeline.build("projector", small.settings(projector__features="live"), after=False)
    assert "mmphi.upstream.embed" not in pipeline.store.run(live.run_id).data.tags
    expected = losses(pipeline, cached.run_id)
    assert len(expected) == 8
    assert losses(pipeline, live.run_id) == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_two_projectors_share_one_language_model(pipeline: Pipeline) -> None:
    results = [pipeline.build("projector", small.settings(projector__layers=n), after=False) for n in "12"]
    one, two = (mmphi.load(result.path) for result in results)
    assert one.language.model is two.language.model
    assert one.features.encoder is two.features.encoder
    assert one.projector is not two.projector
    modules = list(one.language.model.modules())
    hooks = [
        hook for module in modules for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    assert set(hooks) <= {cast_output_to_input_dtype}  # As it was loaded.
    assert not one.language.model.training
    assert "forward" not in vars(one.language.model)


def test_loads_by_run_id(pipeline: Pipeline) -> None:
    result = pipeline.build("projector", small.settings())
    assert mmphi.load(result.run_id).projector.config == mmphi.load(result.path).projector.config  # type: ignore[union-attr]
    client = pipeline.store.client
    client.create_registered_model("seer")
    client.create_model_version("seer", str(result.path), result.run_id)
    assert pipeline.store.model_folder("models:/seer/1") == result.path
    assert pipeline.store.model_folder("models:/seer/latest") == result.path


def test_a_language_model_trained_here_is_a_model_too(pipeline: Pipeline) -> None:
    model = mmphi.load(pipeline.build("pretrain", small.settings()).path)
    assert model.language.prompt.style == "plain"
    assert model.projector is None
    assert isinstance(model.ask("what is it?", max_new_tokens=3), str)


ANSWER = """
import json, sys, torch
torch.set_num_threads(1)
import mmphi
model = mmphi.load(sys.argv[1])
print(json.dumps([model.ask("", image, max_new_tokens=12) for image in sys.argv[2:]]))
"""


@pytest.mark.slow
def test_model_answers_alone(pipeline: Pipeline, tmp_path: Path) -> None:
    """In a new process, with data, store and cache out of reach."""
    result = pipeline.build("projector", small.settings())
    scenes = pipeline.build("scenes", small.settings())
    originals = sorted((scenes.path / "images" / "test").glob("*.png"))[:4]
    images = [str(shutil.copy(original, tmp_path)) for original in originals]
    model = load_checkpoint(result.path)
    expected = [model.generate([(ImageRef("x", Path(i)), "")], max_new_tokens=12)[0].text for i in images]
    moved = tmp_path / "alone"
    moved.mkdir()
    for name in ("mmphi.json", "projector.json", "projector.safetensors"):
        shutil.copy(result.path / name, moved)
    for name in ("language", "vision"):
        shutil.copytree(result.path / name, moved / name)
    environment = {"MLFLOW_TRACKING_URI": "sqlite:////nowhere/at/all.db", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(moved), *images],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_saved_and_loaded_as_hugging_face_users_know_it(pipeline: Pipeline, tmp_path: Path) -> None:
    result = pipeline.build("projector", small.settings())
    scenes = pipeline.build("scenes", small.settings())
    image = str(next((scenes.path / "images" / "test").glob("*.png")))
    model = Multimodal.from_pretrained(result.path)
    model.save_pretrained(tmp_path / "copy")
    again = Multimodal.from_pretrained(tmp_path / "copy")
    assert again.ask("", image) == model.ask("", image) == model.ask(DESCRIBE, image)
    assert again.max_length == model.max_length
    assert again.language.model is not model.language.model  # Shared only by `mmphi.load`.


def test_what_is_not_what_it_was_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    result = pipeline.build("projector", small.settings())
    model = Multimodal.from_pretrained(result.path)
    other = tmp_path / "other"
    shutil.copytree(result.path / "language", other)
    model.own_language = False  # As one whose language model lies in a folder of its own.
    model.language = replace(model.language, settings=LanguageSettings(model=str(other), prompt="plain"))
    model.save_pretrained(tmp_path / "saved")
    assert mmphi.load(tmp_path / "saved").language.digest == model.language.digest
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is not the language model that .* was trained with"):
        mmphi.load(tmp_path / "saved")
    shutil.rmtree(other)
    with pytest.raises(ModelError, match="which does not exist") as caught:
        mmphi.load(tmp_path / "saved")
    assert "language=FOLDER" in caught.value.hint
    assert mmphi.load(tmp_path / "saved", language=str(result.path / "language")).max_length == model.max_length
    bundle = json.loads((tmp_path / "saved" / "mmphi.json").read_text())
    bundle["vision"]["digest"] = "0" * 64
    (tmp_path / "saved" / "mmphi.json").write_text(json.dumps(bundle))
    with pytest.raises(ModelError, match="is not the one that the model was trained with"):
        mmphi.load(tmp_path / "saved", language=str(result.path / "language"))
    with pytest.raises(ModelError, match="is not a model folder"):
        mmphi.load(tmp_path)


@pytest.mark.slow
def test_any_model_is_measured_on_any_data(pipeline: Pipeline) -> None:
    """`mmphi evaluate --model RUN` with the data of other settings: what is measured follows both."""
    model = pipeline.build("projector", small.settings())
    own = pipeline.build("evaluate", small.settings())
    other_data = small.settings(scenes__seed="3", evaluate__model=model.run_id)
    moved = pipeline.build("evaluate", other_data)
    assert "mmphi.upstream.projector" not in pipeline.store.run(moved.run_id).data.tags
    assert moved.metrics["test/loss"] != own.metrics["test/loss"]
    same = pipeline.build("evaluate", small.settings(evaluate__model=str(model.path)))
    assert same.metrics["test/loss"] == pytest.approx(own.metrics["test/loss"], rel=1e-3)
    assert pipeline.key("evaluate", small.settings(evaluate__model=model.run_id)) == same.key


@pytest.mark.slow
def test_store_is_shared_by_builds_under_one_run(pipeline: Pipeline) -> None:
    """Two builds in one process under one run of MLflow's: the second points at its result."""
    store: TrackingStore = pipeline.store
    run = store.client.create_run("0", run_name="both").info.run_id
    first = pipeline.build("scenes", small.settings(scenes__seed="8"), run=run)
    second = pipeline.build("scenes", small.settings(scenes__seed="9"), run="")
    assert first.run_id == run != second.run_id
