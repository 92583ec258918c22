"""A trained model as MLflow loads, serves and registers it."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import pandas as pd
import pytest
from answerers import picture
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

import mmphi
from mmphi.cli import main
from mmphi.errors import StoreError
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.manifest import manifest_holds
from mmphi.pipeline.stage import Result
from mmphi.tracking.logged_model import logged_model
from mmphi.tracking.register import register
from mmphi.tracking.run_writer import TrackingStore

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from small import built, settings

SHORT = {"max_tokens": 6}
IMAGE = base64.b64encode(picture()).decode()


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory, small_chain: Path) -> Iterator[Result]:
    with built("projector", small_chain, tmp_path_factory.mktemp("pyfunc")) as pipeline:
        yield Pipeline(pipeline.stages).build("projector", settings())


def asked(question: str, image: bytes | None = None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_the_run_is_a_model_of_mlflows_and_answers_as_python_does(projector: Result) -> None:
    model = mmphi.load(projector.path)
    expected = [model.chat(asked("what is it?", picture()), **SHORT), model.chat(asked("hello"), **SHORT)]
    rows = pd.DataFrame([{"question": "what is it?", "image": IMAGE}, {"question": "hello"}])
    for name in (str(projector.path), f"models:/{logged_model(TrackingStore().run(projector.run_id))}"):
        loaded = mlflow.pyfunc.load_model(name)
        found = loaded.predict(rows, params=SHORT)
        assert list(found["answer"]) == expected
        assert list(found["heard"]) == ["", ""]
    assert loaded.input_example.columns.tolist() == ["question", "image"]
    assert loaded.predict(loaded.input_example, params=SHORT)["answer"].map(type).tolist() == [str]


def test_a_model_whose_loader_has_the_name_of_earlier_versions_loads(projector: Result, tmp_path: Path) -> None:
    stored = shutil.copytree(projector.path, tmp_path / "stored")
    described = (stored / "MLmodel").read_text()
    assert "mmphi.serving.pyfunc" in described
    (stored / "MLmodel").write_text(described.replace("mmphi.serving.pyfunc", "mmphi.assistant.pyfunc"))
    loaded = mlflow.pyfunc.load_model(str(stored))
    assert loaded.predict(pd.DataFrame([{"question": "hello"}]), params=SHORT)["answer"].map(type).tolist() == [str]


def test_messages_data_uris_and_seeds(projector: Result) -> None:
    loaded = mlflow.pyfunc.load_model(str(projector.path))
    model = mmphi.load(projector.path)
    uri = f"data:image/png;base64,{IMAGE}"
    told = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    rows = pd.DataFrame([{"messages": json.dumps(told), "image": None}, {"messages": None, "image": uri}])
    found = loaded.predict(rows, params=SHORT)["answer"]
    assert found[0] == found[1] == model.chat(told, **SHORT)
    how = {"max_tokens": 6, "temperature": 1.0, "top_p": 0.9, "seed": 4}
    drawn = loaded.predict(pd.DataFrame([{"question": "hello"}]), params=how)["answer"][0]
    assert drawn == model.chat(asked("hello"), **how)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": "x", "image": "!"}, "base64"),
        ({"question": "x", "image": base64.b64encode(b"no image").decode()}, "image"),
        ({"question": " "}, "conversation 1, message 1: it is empty"),
        ({"messages": "{"}, "JSON"),
        (
            {"messages": json.dumps([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}])},
            "local file paths",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(projector: Result, row: dict[str, str], why: str) -> None:
    with pytest.raises(MlflowException, match=why) as raised:
        mlflow.pyfunc.load_model(str(projector.path)).predict(pd.DataFrame([row]))
    assert raised.value.get_http_status_code() == 400


def test_mlflows_server_takes_images_as_base64(projector: Result) -> None:
    client = TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(projector.path))))
    body = {"dataframe_records": [{"question": "what is it?", "image": IMAGE}], "params": SHORT}
    answer = client.post("/invocations", json=body)
    assert answer.status_code == 200
    expected = mmphi.load(projector.path).chat(asked("what is it?", picture()), **SHORT)
    assert answer.json() == {"predictions": [{"answer": expected, "heard": ""}]}
    body["dataframe_records"][0]["image"] = "!"
    assert client.post("/invocations", json=body).status_code == 400


def test_logged_once_in_no_room_of_its_own_and_with_no_pickle(projector: Result) -> None:
    run = TrackingStore().run(projector.run_id)
    model = TrackingStore().client.get_logged_model(logged_model(run))
    assert model.source_run_id == run.info.run_id
    assert model.tags["mmphi.stage"] == "projector"
    folder = Path(model.artifact_location.removeprefix("file://"))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "mmphi.json", "projector.safetensors"} <= names
    assert (folder / "projector.safetensors").samefile(projector.path / "projector.safetensors")
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
    assert manifest_holds(projector.path)
    described = (folder / "MLmodel").read_text()
    assert "loader_module: mmphi.serving.pyfunc" in described
    assert "signature" in described
    logged = TrackingStore().client.search_logged_models([run.info.experiment_id])
    assert sorted(each.name for each in logged) == ["pretrain", "projector", "qlora"]


def test_it_is_registered_on_request(projector: Result, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["register", projector.run_id, "seer", "--alias", "best"]) == 0
    assert capsys.readouterr().out == "models:/seer/1\n"
    assert register(TrackingStore(), projector.run_id, "seer") == "models:/seer/2"
    expected = mmphi.load(projector.path).chat(asked("hello"), **SHORT)
    for name in ("models:/seer/1", "models:/seer@best", "models:/seer/latest"):
        assert mmphi.load(name).chat(asked("hello"), **SHORT) == expected
    loaded = mlflow.pyfunc.load_model("models:/seer/1")
    assert loaded.predict(pd.DataFrame([{"question": "hello"}]), params=SHORT)["answer"][0] == expected
    scenes = TrackingStore().newest("scenes")
    assert scenes is not None
    with pytest.raises(StoreError, match="did not end in a model"):
        register(TrackingStore(), scenes.info.run_id, "seer")
    with pytest.raises(StoreError, match="no run"):
        register(TrackingStore(), "nothing", "seer")
