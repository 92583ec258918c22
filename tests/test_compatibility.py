"""What earlier versions have stored stays valid: keys, digests and models are those recorded in ``tests/golden``.

A failure here means that users' cached results or saved models would be lost. Where that is intended, raise the
``version`` of the stages concerned and record the new values: ``pytest tests/test_compatibility.py --record-golden``.
Stored models in ``tests/golden/models`` are never written again: a new format gets a new folder beside the old ones.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from builders import byte_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from mmphi.config import VisionSettings
from mmphi.data.schema import Example, ImageRef, Turn
from mmphi.models.checkpoint import checkpoint_digest, load_checkpoint
from mmphi.models.language.adapter import adapter_digest
from mmphi.models.language.language_model import language_model_digest
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.models.vision.vision_encoder import load_vision_encoder
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.cache_key import consumed
from mmphi.stages import STAGES, load_settings

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(path for path in (GOLDEN / "models").glob("*") if path.is_dir())
CHAIN = ("scenes", "pretrain", "light_clip", "embed", "projector", "qlora", "evaluate")
# Not built by the shared chain of the tests: what they record is not compared.
NOT_COMPARED = {"tokens", "textgen", "merge", "export", "transcribe", "listen", "speech"}


class Recorded:
    """Compares found values with a file of ``tests/golden``, or writes it where ``--record-golden`` is given."""

    def __init__(self, record: bool) -> None:
        self.record = record

    def read(self, name: str) -> Any:
        path = GOLDEN / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write(self, name: str, found: Any) -> None:
        if self.record:
            GOLDEN.mkdir(exist_ok=True)
            (GOLDEN / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Recorded:
    return Recorded(bool(pytestconfig.getoption("--record-golden")))


def test_cache_keys_of_every_stage_of_tiny(
    golden: Recorded, empty_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that a key consists of are recorded beside it, so that a failure names what changed."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("corpus.txt", "one.wav"):
        (tmp_path / name).write_bytes(b"the same content everywhere")
    (tmp_path / "spoken.csv").write_text("audio,transcript\none.wav,one\n")
    given = {
        "corpus.sources": f"[{tmp_path / 'corpus.txt'}]",
        "speech.path": str(tmp_path / "spoken.csv"),
        "transcribe.path": str(tmp_path / "spoken.csv"),
        "textgen.model": "owner/model",
    }
    settings, pipeline = load_settings("tiny", given), Pipeline(STAGES)
    found = {}
    for name, stage in STAGES.items():
        parts = {key: str(value).replace(str(tmp_path), "FOLDER") for key, value in consumed(stage, settings).items()}
        found[name] = {"key": pipeline.key(name, settings), "version": stage.version, "settings": parts}
    golden.write("keys", found)
    assert found == golden.read("keys")


def deterministic(module: torch.nn.Module) -> None:
    """Weights that depend on no random generator."""
    with torch.no_grad():
        for number, tensor in enumerate(module.state_dict().values()):
            if tensor.is_floating_point():
                values = torch.arange(tensor.numel(), dtype=torch.float64).mul(0.7 + number).sin().mul(0.1)
                tensor.copy_(values.view(tensor.shape))


def test_digests(golden: Recorded, own: str, tmp_path: Path) -> None:
    """Of a vision encoder under several settings, a saved model with a projector, and a language model's folder."""
    import open_clip

    open_clip.add_model_config(own)
    clip = open_clip.create_model("own-tiny-clip")
    deterministic(clip)
    save_file(clip.state_dict(), tmp_path / "weights.safetensors")
    common = {"model": own, "pretrained": str(tmp_path / "weights.safetensors")}
    device = torch.device("cpu")
    found = {
        f"vision {json.dumps(changes)}": load_vision_encoder(VisionSettings(**common, **changes), device).digest
        for changes in ({}, {"layer": -2}, {"cls": "keep"}, {"pool": 2})
    }
    projector = Projector(ProjectorConfig(12, 32, layers=2, norm=True, whiten=True))
    deterministic(projector)
    projector.save(tmp_path / "model")
    (tmp_path / "model" / "mmphi.json").write_text(
        '{"format": 1, "language": {"model": "owner/model", "digest": "hub:1"}}'
    )
    found["model with a projector"] = checkpoint_digest(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "language")
    for path in (tmp_path / "language").iterdir():
        path.unlink()  # The libraries' own files may differ from version to version.
    (tmp_path / "language" / "config.json").write_text("{}")
    (tmp_path / "language" / "model.safetensors").write_bytes(b"weights")
    found["language model"] = language_model_digest(str(tmp_path / "language"), "")
    golden.write("digests", found)
    assert found == golden.read("digests")


@pytest.fixture(scope="module")
def chain(small_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with small.built("qlora", small_chain, tmp_path_factory.mktemp("surfaces")) as pipeline:
        yield pipeline


def test_a_stage_whose_metrics_or_files_change_raises_its_version(golden: Recorded, chain: Pipeline) -> None:
    assert {*CHAIN} | NOT_COMPARED == set(STAGES)  # A new stage belongs to one of them.
    found = {}
    for name in CHAIN:
        result = chain.build(name, small.settings())
        paths = (path for path in result.path.rglob("*") if path.is_file() and path.name != "uncommitted.diff")
        files = (path.relative_to(result.path).as_posix() for path in paths)
        found[name] = {
            "version": STAGES[name].version,
            "metrics": sorted(n for n in chain.store.run(result.run_id).data.metrics if not n.startswith("system/")),
            "files": sorted({re.sub(r"[0-9a-f]{8,}|\d+", "N", file) for file in files}),
        }
    golden.write("surfaces", found)
    recorded = golden.read("surfaces")
    for name, surface in found.items():
        if surface != recorded[name] and surface["version"] == recorded[name]["version"]:
            pytest.fail(f"{name} records other metrics or files than before: raise the version of its Stage")
    assert found == recorded


def picture(folder: Path) -> str:
    """The same pixels everywhere."""
    rows, columns = np.mgrid[0:48, 0:48]
    pixels = np.stack([rows * 5, columns * 5, (rows + columns) * 2], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return str(folder / "picture.png")


def behaviour(model: Multimodal, image: str) -> dict[str, Any]:
    """A greedy answer, and the loss of a given answer in nats per token."""
    example = Example("x", (ImageRef("picture", Path(image)),), (Turn("what is this?", "a red circle"),), "x", "test")
    nats, tokens = model.losses([example])
    return {"answer": model.ask("", image, max_new_tokens=8), "loss": nats / tokens}


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_models_that_earlier_versions_saved_load_and_answer_as_they_did(folder: Path, tmp_path: Path) -> None:
    found = behaviour(load_checkpoint(folder), picture(tmp_path))
    recorded = json.loads((folder.parent / f"{folder.name}.json").read_text())
    assert found["answer"] == recorded["answer"]
    assert found["loss"] == pytest.approx(recorded["loss"], abs=1e-3)


@pytest.mark.parametrize("stage", ["projector", "qlora"])
def test_the_format_of_today_is_among_the_stored_models(
    stage: str, golden: Recorded, chain: Pipeline, tmp_path: Path
) -> None:
    """Another set of files, or other fields in mmphi.json, are a format that later versions have to read too."""
    result = chain.build(stage, small.settings())
    model = Multimodal.from_pretrained(result.path)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").unlink(missing_ok=True)
    stored = [folder for folder in MODELS if folder.name.startswith(stage)]
    if golden.record and format_of(tmp_path / "saved") not in map(format_of, stored):
        folder = GOLDEN / "models" / f"{stage}-{len(stored) + 1}"
        copy_small(tmp_path / "saved", folder)
        told = json.dumps(behaviour(load_checkpoint(folder), picture(tmp_path)), indent=1)
        (folder.parent / f"{folder.name}.json").write_text(told + "\n")
        stored.append(folder)
    assert format_of(tmp_path / "saved") in map(format_of, stored), "record it with --record-golden"


def copy_small(saved: Path, folder: Path) -> None:
    """Copy a stored model with 64 words in CLIP's text encoder, which no part of it uses, in place of 49,408."""
    for name in format_of(saved)[0]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(saved / name, folder / name)
    vision, words = folder / "vision", 64
    config = json.loads((vision / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] = words
    (vision / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    tensors = load_file(vision / "open_clip_model.safetensors")
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:words].clone()
    save_file(tensors, vision / "open_clip_model.safetensors")
    if (folder / "adapter").exists():  # PEFT names the folder of the base model, which was a temporary one.
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "language"
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        described = json.loads((folder / "mmphi.json").read_text())
        described["adapter"] = adapter_digest(folder / "adapter")
        (folder / "mmphi.json").write_text(json.dumps(described, indent=2))


def format_of(folder: Path) -> tuple[list[str], list[str]]:
    """Files of a stored model, and the fields of its description."""
    fields = [name for name, _ in flat(json.loads((folder / "mmphi.json").read_text()))]
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    # Beside a light CLIP lies what its training has recorded: no part of the model.
    return sorted(f for f in files if not f.startswith("vision/") or f.startswith("vision/open_clip")), fields


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from flat(value[key], f"{name}.{key}")
    else:
        yield name, value
