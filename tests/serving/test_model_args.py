from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mmphi.errors import SettingsError, StoreError
from mmphi.serving.model_args import choices, chosen_model, model_options, newest
from mmphi.tracking.run_writer import TrackingStore
from mmphi.tracking.status_reader import ClientStatusReader, SqliteStatusReader, status_reader
from mmphi.tracking.tags import FOR_STUDY, REQUESTED, STUDY


@pytest.fixture
def store(empty_store: str) -> TrackingStore:
    return TrackingStore()


def add(store: TrackingStore, ended_ms: int, preset: str = "tiny", stage: str = "projector", **tags: str) -> str:
    experiment = store.experiment()
    run = store.client.create_run(experiment, run_name=f"{stage} {preset}", start_time=ended_ms - 1000)
    own = {"mmphi.stage": stage, "mmphi.key": "k", "mmphi.preset": preset, **tags}
    for name, value in own.items():
        store.client.set_tag(run.info.run_id, name, value)
    store.client.set_terminated(run.info.run_id, "FINISHED", end_time=ended_ms)
    return str(run.info.run_id)


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    model_options(parser)
    return parser.parse_args(words)


def test_trials_and_what_is_built_for_them_are_no_candidates(store: TrackingStore) -> None:
    own = add(store, 10_000_000)
    add(store, 20_000_000, **{STUDY: "projector_depth"})
    add(store, 30_000_000, **{FOR_STUDY: "lora_rank"})
    assert newest().name == own
    assert [run_id for _, run_id in choices()] == [own]


def test_a_trial_that_a_user_asks_for_as_well_is_a_candidate(store: TrackingStore) -> None:
    add(store, 10_000_000)
    trial = add(store, 20_000_000, **{STUDY: "projector_depth"})
    store.note_use(trial)
    assert newest().name != trial
    store.note_use(trial, own=True)
    assert newest().name == trial


def test_the_preset_chooses_among_the_newest(store: TrackingStore) -> None:
    tiny = add(store, 10_000_000)
    photos = add(store, 20_000_000, preset="photos")
    assert chosen_model(options()).name == photos
    choice = chosen_model(options("--preset", "tiny"))
    assert choice.name == tiny
    assert choice.label.startswith("projector tiny, 1970-01-01")
    assert tiny[:8] in choice.label
    with pytest.raises(StoreError, match="no trained model of the preset phi2") as error:
        chosen_model(options("--preset", "phi2"))
    assert error.value.hint == "it has: projector photos, projector tiny"


def test_a_language_model_is_chosen_only_where_there_is_no_other(store: TrackingStore) -> None:
    text = add(store, 10_000_000, preset="text", stage="pretrain")
    assert newest().name == text
    projector = add(store, 20_000_000)
    add(store, 30_000_000, stage="pretrain")  # Of a build that is under way.
    assert newest().name == projector
    assert newest("text").name == text


def test_a_smoke_run_is_the_last_choice(store: TrackingStore) -> None:
    add(store, 30_000_000, preset="tiny smoke")
    assert newest().label.startswith("projector tiny smoke")
    assert newest("tiny").label.startswith("projector tiny smoke")
    trained = add(store, 10_000_000)
    assert newest().name == trained


def test_a_model_and_a_preset_exclude_each_other(
    store: TrackingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="--preset chooses among others"):
        chosen_model(options("--model", str(tmp_path), "--preset", "tiny"))
    monkeypatch.chdir(tmp_path)
    assert chosen_model(options("--model", ".")).short == tmp_path.name


def test_both_ways_to_read_a_store_find_the_same(store: TrackingStore) -> None:
    for number, tags in enumerate(({}, {STUDY: "s"}, {STUDY: "s", REQUESTED: "true"}, {FOR_STUDY: "s"})):
        add(store, 10_000_000 + 1000 * number, **tags)
    add(store, 20_000_000, preset="photos")
    by_client, by_tables = ClientStatusReader(), status_reader()
    assert isinstance(by_tables, SqliteStatusReader)
    for preset in ("", "tiny", "photos", "none"):
        assert by_tables.models("projector", preset, 9) == by_client.models("projector", preset, 9)
    assert len(by_tables.models("projector", "", 9)) == 3
    assert len(by_tables.models("projector", "", 2)) == 2


def test_a_named_model_is_taken_as_it_is(store: TrackingStore, tmp_path: Path) -> None:
    choice = chosen_model(options("--model", str(tmp_path)))
    assert (choice.name, choice.short) == (str(tmp_path), tmp_path.name)
    assert chosen_model(options("--model", "models:/seer/1")).short == "models:/seer/1"
