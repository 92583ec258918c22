"""Every script of ``examples/`` runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import small
from builders import tiny_language
from PIL import Image

from ablations.study import load
from mmphi.models.language.language_model import save_language_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
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


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUN_HERE


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
    projector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, color in enumerate(["red", "blue"] * 5):
        Image.new("RGB", (48, 48), color).save(tmp_path / f"{color}-square_{number:02}.png")
    example("own_reader", monkeypatch).main(projector, str(tmp_path))
    before, after = capsys.readouterr().out.removeprefix("held-out loss ").split(" before, ")
    assert float(after.split()[0]) < float(before)


def test_chat_with_images(
    projector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (48, 48), "red").save(tmp_path / "one.png")
    example("chat_with_images", monkeypatch).main(projector, str(tmp_path / "one.png"), "what is it?", "what color?")
    assert capsys.readouterr().out.count("> ") == 2


def test_own_study() -> None:
    assert set(load(str(EXAMPLES / "own_study.py"))[1].levels) == {"gelu", "relu", "silu"}
