"""Every script of ``examples/`` runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import small
from builders import tiny_language
from matplotlib import pyplot as plt
from PIL import Image

from ablations.study import Study, load
from mmphi.config.shared import REGISTERED_KINDS
from mmphi.data.readers import READERS
from mmphi.errors import SettingsError
from mmphi.models.language.language_model import save_language_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = EXAMPLES / "library.ipynb"
RUN_HERE = {"own_encoder", "own_projector", "own_reader", "chat_with_images", "own_study"}


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def language(tmp_path: Path) -> str:
    tiny = tiny_language()
    save_language_model(tiny.model, tiny.prompt, tmp_path / "language")
    return str(tmp_path / "language")


@pytest.fixture(scope="module")
def projector(small_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    with small.built("projector", small_chain, tmp_path_factory.mktemp("examples")) as pipeline:
        return str(pipeline.build("projector", small.settings()).path)


@pytest.fixture
def registry() -> Iterator[None]:
    """Data readers that a test registers are removed after it."""
    yield
    for kind in REGISTERED_KINDS:
        del READERS[kind]
    REGISTERED_KINDS.clear()


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUN_HERE
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == {NOTEBOOK.name}


def test_own_encoder(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example("own_encoder", monkeypatch).main(language)
    told = capsys.readouterr().out
    assert told.count("a red square: ") == 1
    before, after = told.rpartition("loss ")[2].split(" nats per token, of the loaded model ")
    assert float(before) == pytest.approx(float(after), abs=2e-3)


def test_own_projector(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(example("own_projector", monkeypatch).main(language)) == {"gated", "mlp"}


def test_own_reader(
    registry: None, projector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, color in enumerate(["red", "blue"] * 5):
        image = Image.new("RGB", (48, 48), color)
        image.putpixel((number, 0), (255, 255, 255))  # Files of the same picture would share a split.
        image.save(tmp_path / f"{color}-square_{number:02}.png")
    (tmp_path / "_01.png").write_bytes(b"")
    example("own_reader", monkeypatch).main(projector, str(tmp_path))
    losses, *table = capsys.readouterr().out.splitlines()
    before, after = losses.removeprefix("held-out loss ").split(" before, ")
    assert float(after.split()[0]) < float(before)
    assert [line.split()[:3] for line in table] == [["file_names", "kept", "10"], ["file_names", "dropped:", "no"]]


def test_chat_with_images(
    projector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (48, 48), "red").save(tmp_path / "one.png")
    example("chat_with_images", monkeypatch).main(projector, str(tmp_path / "one.png"), "what is it?", "what color?")
    assert capsys.readouterr().out.count("> ") == 2


def test_own_study() -> None:
    study = load(str(EXAMPLES / "own_study.py"))[1]
    assert isinstance(study, Study)
    assert set(study.levels) == {"gelu", "relu", "silu"}
    study.check()
    with pytest.raises(SettingsError, match=r"Muon trains the matrices(.|\n)*fix projector.optimizer = adamw"):
        replace(study, fixed={}).check()  # The reason that the study gives for what it fixes.


def notebook_cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_is_valid_and_stored_without_images() -> None:
    content = json.loads(NOTEBOOK.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    assert {cell["cell_type"] for cell in content["cells"]} == {"code", "markdown"}
    outputs = [output for cell in content["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream"}
    assert NOTEBOOK.stat().st_size < 20_000


def test_the_cells_of_the_notebook_run_in_order(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    shown: list[Any] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    namespace: dict[str, Any] = {"__name__": "notebook"}
    before = set(tmp_path.iterdir())
    for cell in notebook_cells():
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", ()):
                namespace["LANGUAGE"] = language
    told = capsys.readouterr().out
    steps = namespace["STEPS"]
    _, curve = shown
    training, validation = curve.axes[0].get_lines()
    assert list(training.get_xdata()) == list(range(1, steps + 1))
    losses = list(training.get_ydata())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert validation.get_ydata()[-1] == pytest.approx(namespace["right"], rel=1e-3)
    assert len(namespace["answers"]) == 12
    assert all(a != b for (_, a), (_, b) in zip(namespace["held_out"], namespace["wrong_images"], strict=True))
    assert namespace["wrong"] > namespace["right"]  # The image is used.
    assert set(namespace["losses"]) == {1, 2}
    assert "1 layer: held-out loss" in told
    assert told.strip().splitlines()[-1].startswith("One seed per setting: the difference is no evidence")
    assert set(tmp_path.iterdir()) == before  # As its text says, no file is written.
    plt.close("all")
