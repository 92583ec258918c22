"""A task of drawn scenes in lmms-eval, in the environment that has it: answers and losses are those of the model."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import small
import torch
from PIL import Image

import mmphi
from mmphi.cli import main
from mmphi.data.schema import ImageRef
from mmphi.data.tokenized_dataset import image_inputs
from mmphi.models.multimodal import Multimodal
from mmphi.text.packing import pack
from mmphi.text.tokenized_example import tokenize_conversation
from mmphi.tracking.run_writer import TrackingStore

ROOT = Path(__file__).resolve().parents[1]
TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
task: scenes_said
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, temperature: 0, do_sample: false, until: ["|"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
LIKELIHOOD = """
import json, sys
from types import SimpleNamespace
from PIL import Image
from mmphi.serving.harness.lmms import Mmphi

model = Mmphi(sys.argv[1])
rows = json.load(open(sys.argv[2]))
model.task_dict = {"task": {"test": rows}}
show = lambda row: [Image.open(row["image"])] if row["image"] else []
asked = [(row["question"], said, show, i, "task", "test") for i, row in enumerate(rows) for said in ("red", "up")]
print(json.dumps(model.loglikelihood([SimpleNamespace(args=each) for each in asked])))
"""
UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["image"])] if doc["image"] else []
"""


def test_without_the_package_it_says_how_to_install_it(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["evaluate", "--harness", "lmms-eval", "--tasks", "pope", "--model", "x"]) == 2
    assert "pip install 'lmms-eval" in capsys.readouterr().err


needs_it = pytest.mark.skipif("MMPHI_LMMS" not in os.environ, reason="MMPHI_LMMS is the Python that has lmms-eval")


@dataclass(frozen=True)
class Asked:
    """A model and questions to it, with images and without."""

    run_id: str
    model: Multimodal
    questions: list[tuple[str, str]]

    def images(self, path: str) -> list[ImageRef]:
        return [ImageRef(path, Path(path))] if path else []


@pytest.fixture
def asked(small_chain: Path, tmp_path: Path) -> Iterator[Asked]:
    with small.built("projector", small_chain, tmp_path) as pipeline:
        run, scenes = (pipeline.result(stage, small.settings()) for stage in ("projector", "scenes"))
        images = sorted((scenes.path / "images" / "test").glob("*.png"))[:5]
        with Image.open(images[0]) as image:  # One of them transparent: it is laid on white, as everywhere.
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(tmp_path / "clear.png")
        images[0] = tmp_path / "clear.png"
        questions = [(str(path), f"what is there, number {i}?") for i, path in enumerate(images)]
        yield Asked(run.run_id, mmphi.load(run.path), [*questions, ("", "two and two?")])


@pytest.mark.harness
@needs_it
def test_a_local_task_says_what_the_model_says(asked: Asked, tmp_path: Path) -> None:
    answers = asked.model.generate([(asked.images(path), question) for path, question in asked.questions], 6)
    # Half of the targets are what the model says, the others are not.
    rows = [
        {"image": path, "question": question, "answer": said.text if i % 2 else f"not {said.text}"}
        for i, ((path, question), said) in enumerate(zip(asked.questions, answers, strict=True))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    (tasks / "scenes_said.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    command = [os.environ["MMPHI_LMMS"], "-m", "mmphi", "evaluate", "--harness", "lmms-eval", "--batch_size", "4"]
    command += ["--model", asked.run_id, "--include", str(tasks), "--tasks"]
    done = subprocess.run([*command, "scenes_said"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (kept,) = TrackingStore().search("FINISHED", stage="harness")
    assert kept.data.metrics["lmms/scenes_said/exact_match"] == pytest.approx(0.5)
    assert json.loads(kept.data.tags["mmphi.questions"]) == {"scenes_said": 6}
    done = subprocess.run([*command, "scenes_sad"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "did you mean scenes_said?" in done.stderr


@pytest.mark.harness
@needs_it
def test_lmms_eval_finds_the_model_by_its_name() -> None:
    """As `python -m lmms_eval --model mmphi` looks it up: by the entry point of the package."""
    code = "from lmms_eval.models import get_model; print(get_model('mmphi').__module__)"
    done = subprocess.run([os.environ["MMPHI_LMMS"], "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-1:] == ["mmphi.serving.harness.lmms"], done.stderr[-2000:]


@pytest.mark.harness
@needs_it
def test_losses_of_given_answers_are_the_models(asked: Asked, tmp_path: Path) -> None:
    rows = [{"image": path, "question": question} for path, question in asked.questions]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [os.environ["MMPHI_LMMS"], "-c", LIKELIHOOD, asked.run_id, str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = [loss(asked, *each, said) for each in asked.questions for said in ("red", "up")]
    assert [value for value, _ in found] == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 3) for value in expected}) > 6


def loss(asked: Asked, path: str, question: str, answer: str) -> float:
    """Of an answer without its end, in nats per token."""
    model = asked.model
    inputs = image_inputs(asked.images(path), model.length)
    rows = pack([tokenize_conversation([(question, answer)], inputs, model.language.prompt, 256)], model.sources)
    logits = model.packed.logits(rows)[:-1]
    return torch.nn.functional.cross_entropy(logits.float(), rows["targets"][:-1]).item()
