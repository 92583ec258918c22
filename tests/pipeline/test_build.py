from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import yaml

from mmphi.config.fields import leaves
from mmphi.errors import StoreError
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Context
from mmphi.stages import Settings, load_settings
from mmphi.tracking.run_tracker import params_of
from mmphi.tracking.run_writer import TrackingStore


@pytest.fixture
def store(empty_store: str) -> TrackingStore:
    toys.CALLS.clear()
    return TrackingStore(empty_store)


@pytest.fixture
def pipeline(store: TrackingStore) -> Pipeline:
    return Pipeline(toys.TOYS, store)


def settings(**overrides: str) -> Settings:
    return load_settings("tiny", {"projector.steps": "4", **{k.replace("__", "."): v for k, v in overrides.items()}})


def test_builds_what_is_missing_and_reuses_what_is_there(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pipeline.build("train", settings())
    assert toys.CALLS == ["draw", "train"]
    again = pipeline.build("train", settings())
    assert (again.run_id, again.metrics, again.path) == (first.run_id, first.metrics, first.path)
    other = pipeline.build("train", settings(projector__layers="3"))
    assert toys.CALLS == ["draw", "train", "train"]
    assert other.run_id != first.run_id
    said = capsys.readouterr().out
    assert f"reusing run {first.run_id}" in said
    assert f"projector.layers is 3, was 2, compared with run {first.run_id}" in said


def test_finished_result_does_not_need_what_it_was_built_on(pipeline: Pipeline, store: TrackingStore) -> None:
    first = pipeline.build("train", settings())
    drawn = next(store.search(stage="draw"))
    store.client.delete_run(drawn.info.run_id)
    assert pipeline.build("train", settings()).run_id == first.run_id
    assert toys.CALLS == ["draw", "train"]


def test_metrics_of_a_stored_result_have_their_current_names(store: TrackingStore) -> None:
    def measured(ctx: Context) -> Mapping[str, float]:
        del ctx
        return {"test/ended": 0.5}

    stages = {**toys.TOYS, "draw": replace(toys.TOYS["draw"], run=measured)}
    for _ in range(2):  # Built as by an earlier version, then read.
        found = Pipeline(stages, store).build("draw", settings())
    assert found.metrics == {"test/eos_rate": 0.5}


def test_setting_that_does_not_matter_reuses(pipeline: Pipeline) -> None:
    first = pipeline.build("train", settings())
    assert pipeline.build("train", settings(projector__log_every="3")).run_id == first.run_id


def test_force_builds_the_asked_stage_alone(pipeline: Pipeline) -> None:
    first = pipeline.build("train", settings())
    forced = pipeline.build("train", settings(), force=True)
    assert toys.CALLS == ["draw", "train", "train"]
    assert forced.run_id != first.run_id
    assert forced.metrics["begun_at"] == 0
    assert pipeline.build("train", settings()).run_id == forced.run_id


def test_no_build_names_all_that_is_missing(pipeline: Pipeline) -> None:
    with pytest.raises(StoreError, match="draw, train"):
        pipeline.build("train", settings(), no_build=True)
    pipeline.build("draw", settings())
    with pytest.raises(StoreError, match="settings: train"):
        pipeline.build("train", settings(), no_build=True)
    pipeline.build("train", settings())
    assert pipeline.build("train", settings(), no_build=True).stage == "train"


def test_lineage_is_recorded(pipeline: Pipeline, store: TrackingStore, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    result = pipeline.build("train", settings(), label="layers=2")
    run = store.client.get_run(result.run_id)
    drawn = next(store.search(stage="draw"))
    tags, params = run.data.tags, run.data.params
    assert run.info.run_name == "train tiny layers=2"
    assert tags["mmphi.key"] == pipeline.key("train", settings())
    assert tags["mmphi.upstream.draw"] == drawn.info.run_id
    assert drawn.info.run_id in tags["mlflow.note.content"]
    assert {"mmphi.git_commit", "mmphi.git_dirty", "mmphi.cpu", "mmphi.cores", "mmphi.host", "mmphi.pid"} <= set(tags)
    assert params["projector.layers"] == "2"
    assert params["projector.seed"] == "0"
    assert yaml.safe_load((result.path / "settings.yaml").read_text())["projector"]["steps"] == 4
    assert "mlflow==" in (result.path / "packages.txt").read_text()
    assert run.data.metrics["begun_at"] == 0
    read = pipeline.build("read", settings(corpus__sources=f"[{tmp_path / 'text.txt'}]"))
    assert "mmphi.data.corpus.sources.0.path" in store.client.get_run(read.run_id).data.tags


def test_goes_on_in_the_run_that_mlflow_began(pipeline: Pipeline, store: TrackingStore) -> None:
    experiment = store.client.create_experiment("another")
    assert "mlflow.experimentKind" not in store.client.get_experiment(experiment).tags
    given = store.client.create_run(experiment, run_name="merciful-ox-123")
    store.client.log_param(given.info.run_id, "seed", "preset")
    result = pipeline.build("train", settings(), run=given.info.run_id, tags={"team": "red"})
    assert result.run_id == given.info.run_id
    run = store.client.get_run(given.info.run_id)
    assert run.info.run_name == "train tiny"
    assert run.data.tags["team"] == "red"
    # Without its kind, MLflow's pages open the experiment as one of agents' traces.
    assert store.client.get_experiment(experiment).tags["mlflow.experimentKind"] == "custom_model_development"
    drawn = next(store.search(stage="draw"))
    assert drawn.info.experiment_id == experiment
    assert drawn.info.run_id != given.info.run_id

    second = store.client.create_run(experiment, run_name="my own name")
    assert pipeline.build("train", settings(), run=second.info.run_id).run_id == given.info.run_id
    assert "mmphi.last_used" in store.client.get_run(given.info.run_id).data.tags
    run = store.client.get_run(second.info.run_id)
    assert run.data.tags["mmphi.reuses"] == given.info.run_id
    assert "mmphi.key" not in run.data.tags
    assert run.info.run_name == "my own name"
    assert run.data.metrics == {"begun_at": 0.0, "rank": 0.0}


def test_run_of_another_store_is_told(pipeline: Pipeline) -> None:
    with pytest.raises(StoreError, match="has no run 0000"):
        pipeline.build("draw", settings(), run="0" * 32)


def test_missing_file_is_told_before_anything_is_built(pipeline: Pipeline, store: TrackingStore) -> None:
    stages: dict[str, Any] = {
        **toys.TOYS,
        "late": replace(toys.TOYS["read"], name="late", upstream=lambda _: ("draw",)),
    }
    with pytest.raises(Exception, match="no such file"):
        Pipeline(stages, store).build("late", settings(corpus__sources="[nowhere.txt]"))
    assert toys.CALLS == []
    assert list(store.search(stage="draw")) == []


def test_run_that_mlflow_began_has_its_name_before_its_stage_starts(store: TrackingStore) -> None:
    """What it is built on may take minutes."""
    run = store.client.create_run("0", run_name="merciful-ox-123").info.run_id
    names = []

    def look(ctx: Context) -> Mapping[str, float]:
        names.append(store.run(run).info.run_name)
        return toys.draw(ctx)

    stages = {**toys.TOYS, "draw": replace(toys.TOYS["draw"], run=look)}
    Pipeline(stages, store).build("train", settings(), run=run, label="layers=2")
    assert names == ["train tiny layers=2"]


def test_a_training_goes_on_with_the_threads_that_it_began_with(
    pipeline: Pipeline, store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is resumed alone after it was killed while another training had half of the cores."""
    seen = []
    monkeypatch.setitem(
        pipeline.stages,
        "train",
        replace(pipeline.stages["train"], run=lambda ctx: seen.append(torch.get_num_threads()) or toys.train(ctx)),
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        monkeypatch.setenv("TOY_FAIL", "killed")
        with pytest.raises(ValueError, match="killed"):
            pipeline.build("train", load_settings("tiny"))
        monkeypatch.delenv("TOY_FAIL")
        torch.set_num_threads(2)
        result = pipeline.build("train", load_settings("tiny"))
        assert seen == [1, 1]
        assert torch.get_num_threads() == 2
        assert store.run(result.run_id).data.tags["mmphi.threads"] == "1"
    finally:
        torch.set_num_threads(before)


SPELLINGS = {  # As typed after `mlflow run . -P`, and what is meant.
    "projector.learning_rate": ("1e-3", 0.001),
    "projector.muon_learning_rate": (".02", 0.02),
    "projector.weight_decay": ("0", 0.0),
    "projector.beta2": ("0.9990", 0.999),
    "projector.max_grad_norm": ("1.", 1.0),
    "projector.warmup_ratio": ("3e-2", 0.03),
    "projector.steps": ("4", 4),
    "projector.seed": ("007", 7),
    "projector.batch_size": ("+16", 16),
    "projector.layers": ("2 ", 2),
    "projector.width": (" 64", 64),
    "projector.norm": ("yes", True),
    "projector.gradient_checkpointing": ("False", False),
    "projector.lr_scheduler": ("wsd", "wsd"),
    "projector.optimizer": ("adamw", "adamw"),
    "projector.precision": ("auto", "fp32"),
    "projector.dropout": ("1E-1", 0.1),
    "scenes.held_out": ("2e-1", 0.2),
    "scenes.image_size": ("32", 32),
    "scenes.train_images": ("1_000", 1000),
    "scenes.seed": ("0", 0),
    "pretrain.initializer_range": ("0.060", 0.06),
    "pretrain.tied": ("no", False),
    "pretrain.layers": ("1", 1),
    "light_clip.width": ("64", 64),
    "data.max_images": ("0", 0),
    "vision.cls": ("keep", "keep"),
    "vision.mean": ("[0.5, .5, 5e-1]", [0.5, 0.5, 0.5]),
    "vision.layer": ("-1", -1),
    "evaluate.temperature": ("5e-1", 0.5),
}


def test_thirty_spellings_of_what_mlflow_run_has_recorded(pipeline: Pipeline, store: TrackingStore) -> None:
    """MLflow records what was typed before mmphi begins, and no parameter can be changed then."""
    assert len(SPELLINGS) == 30
    begun = store.client.create_run(store.experiment()).info.run_id
    typed = {name: text for name, (text, _) in SPELLINGS.items()}
    for name, text in typed.items():
        store.client.log_param(begun, name, text)
    chosen = load_settings("tiny", typed)
    values = dict(leaves(chosen))
    result = pipeline.build("train", chosen, run=begun)
    assert result.run_id == begun
    run = store.run(begun)
    assert run.info.status == "FINISHED"
    recorded = params_of(run)
    for name, (text, meant) in SPELLINGS.items():
        assert run.data.params[name] == text
        if isinstance(meant, list):
            assert getattr(chosen.vision, name.partition(".")[2]) == meant
            continue
        assert values[name] == meant or name == "projector.precision"
        if name.startswith("projector."):  # What the stage reads.
            assert recorded[name] == str(meant)
