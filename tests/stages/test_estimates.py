from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small

from mmphi.cli import main
from mmphi.config import VisionSettings
from mmphi.config.declared_view import SettingsView
from mmphi.data.features import FeatureStore
from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES, Settings, load_settings
from mmphi.stages.estimates import feature_bytes, feature_shape, image_count, to_fetch, vit_shape
from mmphi.stages.memory_estimates import adapter_memory, projector_disk, projector_memory

MEASURED_SHAPE = {
    "batch_size": "16",
    "gradient_accumulation_steps": "1",
    "max_length": "690",  # Mean positions of a conversation, from its tokens/s and FLOP/s.
    "gradient_checkpointing": "false",
}


@pytest.fixture(scope="module")
def pipeline(small_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with small.built("embed", small_chain, tmp_path_factory.mktemp("estimates")) as pipeline:
        yield pipeline


@pytest.mark.parametrize(
    "changes", [{}, {"vision__layer": "-1"}, {"vision__pool": "2"}, {"light_clip__from_nothing": "vit"}]
)
def test_size_of_features_is_what_embed_stores(pipeline: Pipeline, changes: dict[str, str]) -> None:
    settings = small.settings(**changes)
    view = pipeline.view("embed", settings)
    result = pipeline.build("embed", settings)
    store = FeatureStore(result.path)
    assert feature_shape(view) == (store.tokens, store.width)
    assert image_count(view) == len(store) == 54
    assert feature_bytes(view) == result.metrics["embed/bytes"]


@pytest.mark.parametrize("changes", [{}, {"pool": 2}, {"cls": "keep"}])
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-336"])
def test_shape_of_a_vit_is_known_without_open_clip(name: str, changes: dict[str, Any]) -> None:
    from mmphi.models.vision.vision_encoder import encoder_output_shape

    if name == "ViT-B-32" and "pool" in changes:
        changes = {"pool": 7}  # Its grid is 7 x 7.
    vision = VisionSettings(model=name, pretrained="random", **changes)
    assert vit_shape(vision) == encoder_output_shape(vision)


def test_shape_of_other_encoders_is_left_to_open_clip() -> None:
    for name in ("RN50", "convnext_base", "ViT-B-16-SigLIP", "folder/of/mine"):
        assert vit_shape(VisionSettings(model=name, pretrained="random")) is None


def all_sections(settings: Settings) -> SettingsView:
    return SettingsView(settings, type(settings).model_fields)


def test_memory_of_phi2_is_that_of_the_measurement() -> None:
    """docs/explanation/benchmarks.md: 23.7 GB (projector) and 46 GB (adapter), 16 conversations of 576 image tokens."""
    shape = {f"{stage}.{key}": value for stage in ("projector", "qlora") for key, value in MEASURED_SHAPE.items()}
    view = all_sections(load_settings("phi2", shape, "projector", expand=False))
    assert projector_memory(view) == pytest.approx(23.7e9, rel=0.1)
    assert adapter_memory(view) == pytest.approx(46e9, rel=0.15)


def test_what_saves_memory_lowers_the_estimate() -> None:
    def memory(**changes: str) -> tuple[int, int]:
        names = {name.replace("__", "."): value for name, value in changes.items()}
        view = all_sections(load_settings("phi2", names, "projector", expand=False))
        return projector_memory(view), adapter_memory(view)

    projector, adapter = memory()
    assert max(projector, adapter) < 24e9  # The preset is meant for cards of 24 GB.
    for stage, before in (("projector", projector), ("qlora", adapter)):
        which = 0 if stage == "projector" else 1
        assert memory(**{f"{stage}__gradient_checkpointing": "false"})[which] > 2 * before
        assert memory(**{f"{stage}__gradient_accumulation_steps": "32"})[which] < before
        assert memory(**{f"{stage}__max_length": "1024"})[which] < before
    assert memory(language__precision="4bit")[0] < projector - 3e9
    assert memory(qlora__base_precision="bf16")[1] > adapter + 3e9
    assert memory(qlora__rank="16")[1] < adapter - 2e9


def test_language_model_of_unknown_size_has_no_estimate() -> None:
    view = all_sections(load_settings("phi2", {"language.model": "owner/name"}, "projector", expand=False))
    assert (projector_disk(view), projector_memory(view), adapter_memory(view)) == (0, 0, 0)


def test_images_are_counted_where_the_data_is_there(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("image,caption\na.jpg,x\na.jpg,y\nb.jpg,z\n")
    (tmp_path / "l.json").write_text(
        json.dumps([{"image": "a.jpg"}, {"image": "b.jpg"}, {"id": 1}, {"image": "c.jpg"}])
    )
    sources = [
        {"kind": "captions", "path": str(tmp_path / "c.csv"), "name": "c"},
        {"kind": "llava", "path": str(tmp_path / "l.json"), "name": "l"},
        {"kind": "llava", "path": str(tmp_path / "llava_instruct_150k.json"), "name": "instruct"},
    ]
    for limit, count in (("0", 2 + 3 + 80_000), ("2", 6)):
        settings = load_settings("tiny", {"data.sources": json.dumps(sources), "data.max_images": limit})
        assert image_count(Pipeline(STAGES).view("embed", settings)) == count


def test_status_of_phi2_works_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MMPHI_LLAVA", "MMPHI_COCO"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    assert main(["status", "--preset", "phi2"]) == 0
    out = capsys.readouterr().out
    (embed,) = [line for line in out.splitlines() if "embed " in line and "(above)" not in line]
    assert "would take 23.6 GB of disk" in embed  # 80,000 images x 144 tokens x 1,024 x 2 bytes
    assert "needs data.sources.0.path" in embed
    # Missing data are reported once, whatever needs them, with the total of what is to be built.
    assert out.count("there is no such file") == 1
    assert "data.sources.0.path = ${MMPHI_LLAVA}/llava_instruct_150k.json: there is no such file" in out
    assert "in all: 26.9 GB of disk" in out
    shown, _, others = out.partition("other stages, not required by these:")
    assert "pretrain" not in shown
    assert "pretrain" in others
    assert "microsoft/phi-2, 5.6 GB" in out
    assert "ViT-L-14-336 openai, by open_clip" in out
    assert "mmphi fetch llava FOLDER" in out
    hashed = out.partition("files to hash once:")[2].split()
    assert hashed == ["${MMPHI_LLAVA}/llava_instruct_150k.json", "${MMPHI_COCO}/train2017"]


def test_small_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("MMPHI_PHOTOS", "MMPHI_MODELS"):
        monkeypatch.delenv(name, raising=False)
    assert main(["projector", "--preset", "small"]) == 2
    error = capsys.readouterr().err
    assert "MMPHI_PHOTOS, which is not set" in error
    assert "images/ and captions.csv" in error


def test_nothing_to_fetch_for_tiny() -> None:
    assert list(to_fetch(Pipeline(STAGES).view("projector", load_settings("tiny")))) == []


def test_disk_of_a_projector_is_of_the_order_of_what_it_writes(pipeline: Pipeline) -> None:
    settings = small.settings()
    result = pipeline.build("projector", settings, after=False)
    written = sum(file.stat().st_size for file in result.path.rglob("*") if file.suffix in (".safetensors", ".pt"))
    assert projector_disk(all_sections(settings)) == pytest.approx(written, rel=0.5)
