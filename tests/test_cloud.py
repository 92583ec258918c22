"""The tasks for clouds: as SkyPilot reads them, and the very commands that they run, on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import small
import texts
import yaml
from builders import byte_tokenizer, tiny_language

from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shard_reader import ShardReader
from mmphi.tracking.run_writer import TrackingStore

ROOT = Path(__file__).resolve().parents[1]
TASKS = sorted((ROOT / "experiments" / "cloud").glob("*.yaml"))
READ = """
import json, sys, sky, yaml
task = sky.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])), [("BUCKET", "s3://a-bucket")])
print(json.dumps({"name": task.name, "spot": all(r.use_spot for r in task.resources), "run": task.run,
                  "clouds": sorted({str(r.cloud) for r in task.resources}), "mounts": list(task.storage_mounts)}))
"""


def test_there_is_a_task_of_each_kind():
    assert [path.stem for path in TASKS] == ["ablate", "pretrain", "projector", "textgen"]
    for path in TASKS:
        task = yaml.safe_load(path.read_text())
        assert task["resources"]["use_spot"] is True
        assert task["envs"]["BUCKET"] is None  # Whose it is nobody else knows.
        # Generators have no store that would have to outlive their machine.
        assert ("experiments/cloud/run.sh" in task["run"]) == (path.stem != "textgen")


@pytest.mark.cloud
@pytest.mark.skipif("MMPHI_SKY" not in os.environ, reason="MMPHI_SKY is the Python of SkyPilot's own environment")
@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_skypilot_reads_it(path, tmp_path):
    command = [os.environ["MMPHI_SKY"], "-c", READ, str(path)]
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["name"] == f"mmphi-{path.stem}"
    assert found["spot"]
    assert found["clouds"] == ["AWS"]
    assert found["mounts"] == [*["/mmphi"] * (path.stem != "textgen")]
    assert found["run"] == yaml.safe_load(path.read_text())["run"]


def begin(task: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """What a task runs, with a bucket and a disk of its own."""
    written = yaml.safe_load((ROOT / "experiments" / "cloud" / f"{task}.yaml").read_text())
    given = {name: value or "" for name, value in written["envs"].items()}
    ours = {
        "MMPHI_BUCKET": str(folder / "bucket"),
        "MMPHI_WORK": str(folder / "disk"),
        "MMPHI_PYTHON": sys.executable,
        "MMPHI_KEEP_S": "1",
        "MMPHI_LEASE_S": "4",
        "SKYPILOT_NUM_GPUS_PER_NODE": "2",
        "SKYPILOT_NODE_IPS": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    kept = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        ["bash", "-c", written["run"]],
        cwd=ROOT,
        env={**kept, **given, **ours, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def store(folder: Path) -> TrackingStore:
    """As the bucket has it, seen from a machine of its own."""
    return TrackingStore(f"sqlite:///{folder / 'bucket' / 'mlflow.db'}")


def runs_in_copy(folder: Path) -> int:
    """Not by MLflow, which would keep a connection to this copy when another has replaced it."""
    try:
        with closing(sqlite3.connect(f"file:{folder / 'bucket' / 'mlflow.db'}?mode=ro", uri=True)) as copy:
            return int(copy.execute("SELECT count(*) FROM runs").fetchone()[0])
    except sqlite3.OperationalError:  # No copy yet, or one of a database that is being made.
        return 0


@pytest.mark.cloud
def test_pretraining_goes_on_on_another_machine(tmp_path):
    """Two gloo processes; the machine is lost in the middle of training, all of its processes at once."""
    text = texts.write_text(tmp_path / "text.txt", 4000)
    shape = {"layers": 2, "width": 32, "heads": 2, "context": 32, "save_every": 5, "log_every": 5, "eval_every": 1000}
    words = " ".join(f"--{name} {value}" for name, value in shape.items())
    environment = {
        "CORPUS": str(text),
        "PRESET": "tiny",
        "SIZE": "custom",
        "STOP": "steps 400",
        "BATCH_TOKENS": "512",
        "ARGUMENTS": f"{words} --corpus.vocabulary 300 --corpus.validation_share 0.3",
    }
    first = begin("pretrain", tmp_path, **environment)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("bucket/artifacts/*/artifacts/checkpoint-*/complete")):
        assert first.poll() is None, first.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.2)
    # The database is copied every second: the next machine must find the run in the copy.
    while not runs_in_copy(tmp_path):
        assert first.poll() is None
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    shutil.rmtree(tmp_path / "disk")  # The next machine's own disk is empty.
    output = ended(begin("pretrain", tmp_path, MMPHI_PORT="29517", **environment))
    assert "resuming from what run" in output
    assert "pretrain: resuming from step" in output
    runs = list(store(tmp_path).search(stage="pretrain"))
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED"]
    finished = next(run for run in runs if run.info.status == "FINISHED")
    assert finished.data.metrics["pretrain/tokens"] == 400 * 512


@pytest.mark.cloud
def test_projector_on_two_processes(tmp_path):
    words = " ".join(f"--{name} {value}" for name, value in small.SMALL.items())
    output = ended(begin("projector", tmp_path, PRESET="tiny", ARGUMENTS=words, MMPHI_PORT="29519"))
    assert "test/loss" in output
    assert [run.info.status for run in store(tmp_path).search(stage="projector")] == ["FINISHED"]


@pytest.mark.cloud
def test_ablation_in_one_driver(tmp_path):
    study = ROOT / "tests" / "ablations" / "cloud_study.py"
    output = ended(begin("ablate", tmp_path, STUDY=str(study), ARGUMENTS="--seeds 1 --workers 1"))
    assert "cloud_study" in output
    done = [r for r in store(tmp_path).search(study="cloud_study") if r.info.status == "FINISHED"]
    assert len(done) == 2


@pytest.mark.cloud
def test_generators_fill_a_spool_that_another_machine_reads(tmp_path):
    """The generators are told to end in the middle, as a spot machine is; what they wrote is read elsewhere."""
    model = tmp_path / "writer"
    tiny_language(initializer_range=0.05).model.save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    small_ones = "--generators 1 --batch 4 --max_tokens 16 --shard_documents 4 --precision fp32"
    process = begin("textgen", tmp_path, BUCKET=str(tmp_path / "bucket"), MODEL=str(model), ARGUMENTS=small_ones)
    spool = ShardQueue(str(tmp_path / "bucket" / "spool"), say=lambda _: None)
    until = time.monotonic() + 120
    while not spool.held():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    found = [document for _, documents in ShardReader(spool, say=lambda _: None).everything() for document in documents]
    assert len({document.id for document in found}) == len(found) >= 4
    assert {document.generator for document in found} == {str(model)}
