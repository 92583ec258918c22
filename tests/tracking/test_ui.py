from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
import toys

from mmphi.cli import main
from mmphi.pipeline.build import Pipeline
from mmphi.stages import load_settings
from mmphi.tracking.run_writer import TrackingStore
from mmphi.tracking.ui import addresses, experiment_id


def test_pages_open_on_the_training_runs(empty_store: str) -> None:
    """Of the experiment with the newest run; MLflow's own first page is one for agents."""
    assert experiment_id(empty_store) == "0"
    Pipeline(toys.TOYS).build("draw", load_settings("tiny"))
    assert experiment_id(empty_store) == TrackingStore(empty_store).experiment()
    assert experiment_id("sqlite:////nowhere/none.db") == "0"
    pages = addresses("http://127.0.0.1:5000", "7")
    assert pages["runs"] == "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning"
    assert pages["charts"].endswith("&compareRunsMode=CHART")


@pytest.mark.slow
def test_server_is_started_and_said(empty_store: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mmphi", "ui", "--port", str(port), "--no-browser"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("runs"))
        assert line.split()[1].startswith(f"http://127.0.0.1:{port}/#/experiments/0/runs")
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).status == 200
        assert main(["ui", "--port", str(port)]) == 2  # It is taken.
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_has_pages_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert main(["ui"]) == 2
    assert "open it in a browser" in capsys.readouterr().err
