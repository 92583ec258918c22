from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from branches import BRANCHES
from forked import Forked

from mmphi.pipeline.background_build import independent_stages
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Result
from mmphi.stages import load_settings
from mmphi.tracking.run_writer import TrackingStore

SETTINGS = load_settings("tiny")


@pytest.fixture
def pipeline(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """One that has a helper, in a process of four threads."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    torch.set_num_threads(4)
    yield Pipeline(BRANCHES, TrackingStore(empty_store), helper="branches")
    torch.set_num_threads(1)


def result(pipeline: Pipeline, name: str) -> Result:
    found = pipeline.result(name, SETTINGS)
    assert found
    return found


def test_what_is_independent_of_a_training(pipeline: Pipeline) -> None:
    assert independent_stages(pipeline, "goal", "root", SETTINGS) == []
    assert independent_stages(pipeline, "goal", "left", SETTINGS) == ["further"]
    assert independent_stages(pipeline, "goal", "right", SETTINGS) == ["left"]
    assert independent_stages(pipeline, "left", "left", SETTINGS) == []
    pipeline.build("right", SETTINGS)
    assert (
        independent_stages(pipeline, "goal", "left", SETTINGS) == []
    )  # What is left of the other branch trains nothing.


def test_only_trainings_are_worth_another_process(empty_store: str) -> None:
    for name in ("left", "right"):
        stages = {**BRANCHES, name: replace(BRANCHES[name], trains=False)}
        assert independent_stages(Pipeline(stages, TrackingStore(empty_store)), "goal", "left", SETTINGS) == []


@pytest.mark.slow
def test_branches_are_built_at_once(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one here waits for a file that the other writes: one after the other would never end."""
    for name in ("LEFT_HOLD", "FURTHER_DONE"):
        monkeypatch.setenv(name, str(tmp_path / "further"))
    built = pipeline.build("goal", SETTINGS)
    figures = {name: result(pipeline, name).metrics for name in BRANCHES}
    assert [figures[name]["pid"] == os.getpid() for name in BRANCHES] == [True, True, False, False, True]
    assert [figures[name]["threads"] for name in BRANCHES] == [4, 2, 2, 2, 4]
    assert built.metrics == figures["goal"]
    assert torch.get_num_threads() == 4
    said = capsys.readouterr().out
    assert "right, further: started in parallel with left, by process" in said
    assert f"further: reusing run {result(pipeline, 'further').run_id}" in said
    assert len(list(pipeline.store.search())) == len(BRANCHES)


@pytest.mark.slow
def test_progress_is_shown_while_it_is_waited_for(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEFT_HOLD", str(tmp_path / "begun"))
    monkeypatch.setenv("RIGHT_BEGUN", str(tmp_path / "begun"))
    monkeypatch.setenv("RIGHT_HOLD", str(tmp_path / "waited"))
    write = sys.stdout.write

    def seen(text: str) -> int:
        if "waiting for it" in text:
            (tmp_path / "waited").touch()
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", seen)
    pipeline.build("goal", SETTINGS)
    told = capfd.readouterr()
    assert "right is done" in told.err
    assert "right has begun" not in told.err  # Left's own bar was there then.


@pytest.mark.parametrize("why", ["one thread", "asked not to", "no helper", "a GPU"])
def test_one_after_the_other(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    if why == "one thread":
        torch.set_num_threads(1)
    if why == "asked not to":
        monkeypatch.setenv("MMPHI_BESIDE", "0")
    if why == "no helper":
        pipeline.helper = ""
    if why == "a GPU":
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    threads = torch.get_num_threads()
    pipeline.build("goal", SETTINGS)
    assert {(m["pid"], m["threads"]) for n in BRANCHES if (m := result(pipeline, n).metrics)} == {
        (os.getpid(), threads)
    }
    assert "beside" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_a_helper_fails_at_is_built_here(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RIGHT_FAIL", "not in this process")
    pipeline.build("goal", SETTINGS)
    assert result(pipeline, "right").metrics["pid"] == os.getpid()
    # The helper's run is resumed, with the number of threads that it began with.
    assert result(pipeline, "right").metrics["threads"] == 2
    assert torch.get_num_threads() == 4
    assert "ended with code 1: ValueError: not in this process; continuing here" in capsys.readouterr().out
    failed = [run for run in pipeline.store.search(stage="right") if run.info.status == "FAILED"]
    assert len(failed) == 1


@pytest.mark.slow
def test_an_error_here_stops_the_helper(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEFT_HOLD", str(tmp_path / "begun"))
    monkeypatch.setenv("RIGHT_BEGUN", str(tmp_path / "begun"))
    monkeypatch.setenv("RIGHT_HOLD", str(tmp_path / "never"))
    monkeypatch.setenv("LEFT_FAIL", "too much")
    with pytest.raises(ValueError, match="too much"):
        pipeline.build("goal", SETTINGS)
    run = next(pipeline.store.search(stage="right"))
    assert run.info.status == "KILLED"
    assert not Path(f"/proc/{run.data.tags['mmphi.pid']}").exists()
    assert torch.get_num_threads() == 4


HERE = """
import torch
from branches import BRANCHES
from mmphi.pipeline.build import Pipeline
from mmphi.stages import load_settings
torch.set_num_threads(2)
Pipeline(BRANCHES, helper="branches").build("goal", load_settings("tiny"))
"""


@pytest.mark.slow
def test_a_helper_does_not_outlive_a_process_that_was_killed(pipeline: Pipeline, tmp_path: Path) -> None:
    holds = {"LEFT_HOLD": "never", "RIGHT_BEGUN": "begun", "RIGHT_HOLD": "never"}
    environment = os.environ | {name: str(tmp_path / file) for name, file in holds.items()}
    process = Forked(["-c", HERE], environment)
    end = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while (run := next(pipeline.store.search(stage="right"))).info.status == "RUNNING":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert run.info.status == "KILLED"
    (tmp_path / "never").touch()
    assert pipeline.build("goal", SETTINGS).metrics["pid"] == os.getpid()
