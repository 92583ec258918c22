"""Settings that cannot work together are told before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small

from mmphi.config import VisionSettings
from mmphi.config.declared_view import SettingsView
from mmphi.config.light_clip import LightClipSettings
from mmphi.errors import MmphiError
from mmphi.models.vision.vision_encoder import encoder_output_shape, load_vision_encoder
from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES, evaluate
from mmphi.stages.light_clip import config_of
from mmphi.tracking.run_writer import TrackingStore


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        (
            "projector",
            {"projector.batch_size": "4", "projector.gradient_accumulation_steps": "5"},
            ["batch_size = 4", "nearest", "5"],
        ),
        (
            "projector",
            {"pretrain.batch_size": "1", "pretrain.gradient_accumulation_steps": "2"},
            ["pretrain.batch_size = 1"],
        ),
        ("projector", {"vision.layer": "-9"}, ["vision.layer = -9", "5 layers"]),
        ("projector", {"vision.pool": "3"}, ["vision.pool = 3 does not divide the grid of 4 x 4", "1, 2, 4"]),
        ("projector", {"vision.cls": "keep"}, ["no CLS token"]),
        ("projector", {"projector.max_length": "20"}, ["max_length = 20", "16 tokens", "the nearest is 24"]),
        ("projector", {"language.prompt": "chat"}, ["no chat template"]),
        (
            "projector",
            {"light_clip.image_tower": "tf_efficientnet_lite"},
            ["not a timm model", "tf_efficientnet_lite4"],
        ),
        ("projector", {"light_clip.lock_image": "true"}, ["random weights", "image_weights"]),
        ("projector", {"light_clip.lock_text": "true"}, ["random weights", "text_tower"]),
        ("projector", {"vision.model": "ViT-B-32"}, ["names no weights", "laion2b_s34b_b79k"]),
        ("projector", {"vision.model": "ViT-B-23", "vision.pretrained": "openai"}, ["ViT-B-32"]),
        (
            "projector",
            {"projector.kind": "resampler", "projector.queries": "1024"},
            ["1024 tokens", "lower projector.queries"],
        ),
        (
            "projector",
            {"projector.kind": "pixel_shuffle", "projector.merge": "3"},
            ["does not divide the grid of 4 x 4"],
        ),
        (
            "projector",
            {"projector.kind": "pixel_shuffle", "projector.layers": "1", "projector.parameters": "5000"},
            ["no hidden width"],
        ),
        ("projector", {"pretrain.context": "64"}, ["pretrain.max_length = 96", "64"]),
        ("evaluate", {"evaluate.checkpoint": "3"}, ["that step is not kept", "available: final, 8"]),
    ],
)
def test_impossible_settings_are_told_first(
    empty_store: str, stage: str, changes: dict[str, str], words: list[str]
) -> None:
    settings = small.settings(**{name.replace(".", "__"): value for name, value in changes.items()})
    with pytest.raises(MmphiError) as caught:
        Pipeline(STAGES).build(stage, settings)
    for word in words:
        assert word in str(caught.value)
    assert not list(TrackingStore(empty_store).client.search_runs(["0"]))
    assert [e.name for e in TrackingStore(empty_store).client.search_experiments()] == ["Default"]


def test_more_processes_than_sequences_are_told(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "9")
    view = Pipeline(STAGES).view("projector", small.settings())
    with pytest.raises(MmphiError, match="9 forward passes over all processes"):
        STAGES["projector"].check(view)


@pytest.mark.parametrize("changes", [{}, {"layer": -1}, {"pool": 2}, {"layer": -3, "cls": "keep"}])
def test_shape_without_weights_is_the_towers(tmp_path: Path, changes: dict) -> None:
    vision = {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    path = tmp_path / "shape-tiny-clip.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    settings = VisionSettings(model=str(path), pretrained="random", **changes)
    encoder = load_vision_encoder(settings)
    assert encoder_output_shape(settings) == (encoder.tokens, encoder.width)


def test_shape_of_large_towers_takes_no_weights() -> None:
    assert encoder_output_shape(VisionSettings(model="ViT-L-14-336", pretrained="openai")) == (576, 1024)
    assert encoder_output_shape(VisionSettings(model="ViT-L-14-336", pretrained="openai", pool=2)) == (144, 1024)
    lite = LightClipSettings(image_tower="tf_efficientnet_lite0", image_size=224)
    assert encoder_output_shape(VisionSettings(layer=-1), config_of(lite)) == (49, 1280)


def test_checkpoints_of_a_token_budget_are_not_counted_in_steps() -> None:
    settings = small.settings(projector__supervised_tokens="500", evaluate__checkpoint="3")
    evaluate.check(SettingsView(settings, STAGES["evaluate"].declared))
