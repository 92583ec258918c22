"""A file of CLIP weights says neither how images are prepared for it nor which activation it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmphi.config import VisionSettings
from mmphi.data.clip_weights import prepared_for
from mmphi.errors import ModelError
from mmphi.models.vision.vision_encoder import load_vision_encoder

HALF = [0.5, 0.5, 0.5]
BESIDE = {"mean": HALF, "std": HALF, "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "weights.bin").write_bytes(b"any")
    return str(tmp_path / "weights.bin")


def changed(before: VisionSettings, after: VisionSettings) -> dict[str, Any]:
    return {n: v for n, v in after.model_dump().items() if v != before.model_dump()[n]}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("ViT-B-16-SigLIP", {"mean": HALF, "std": HALF, "resize": "squash"}),
        ("MobileCLIP-S1", {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}),
        ("ViT-L-14-336", {"quick_gelu": "yes"}),
        ("ViT-B-32-quickgelu", {}),
        ("ViT-B-32-256", {}),
    ],
)
def test_what_all_tags_of_an_architecture_have_is_taken(file: str, model: str, expected: dict[str, Any]) -> None:
    given = VisionSettings(model=model, pretrained=file)
    assert changed(given, prepared_for(given)) == expected


def test_names_with_a_slash_are_those_with_a_dash(file: str) -> None:
    given = VisionSettings(model="ViT-B/16-SigLIP", pretrained=file)
    assert changed(given, prepared_for(given)) == {"mean": HALF, "std": HALF, "resize": "squash"}
    with pytest.raises(ModelError, match=r"quick_gelu"):
        prepared_for(VisionSettings(model="ViT-B/32", pretrained=file))


def test_a_folder_that_is_called_like_a_tag_is_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    given = VisionSettings(model="ViT-B-32", pretrained="openai")
    assert prepared_for(given) == given
    with pytest.raises(ModelError, match="none of"):
        prepared_for(VisionSettings(model="ViT-B-32", pretrained=str(tmp_path / "openai")))
    (tmp_path / "wrong.json").write_text("{")
    for name in ("missing.json", "wrong.json"):
        with pytest.raises(ModelError, match="is no configuration of open_clip"):
            prepared_for(VisionSettings(model=str(tmp_path / name), pretrained=file))


def test_where_tags_differ_the_choices_are_listed(file: str) -> None:
    given = VisionSettings(model="ViT-B-32", pretrained=file)
    with pytest.raises(ModelError) as caught:
        prepared_for(given)
    lines = str(caught.value).splitlines()
    assert any("vision.quick_gelu = yes" in line and "openai" in line for line in lines)
    assert any("vision.quick_gelu = no" in line and "laion2b_s34b_b79k" in line for line in lines)
    assert "vision.mean" not in str(caught.value)
    for said in ("yes", "no"):
        chosen = given.model_copy(update={"quick_gelu": said})
        assert prepared_for(chosen) == chosen


def test_a_configuration_beside_the_file_goes_before_tags_and_settings_before_it(file: str) -> None:
    config = {"model_cfg": {"embed_dim": 8, "quick_gelu": True}, "preprocess_cfg": BESIDE}
    (Path(file).parent / "open_clip_config.json").write_text(json.dumps(config))
    given = VisionSettings(model="ViT-B-32", pretrained=file, interpolation="bicubic")
    expected = {"mean": HALF, "std": HALF, "resize": "squash", "quick_gelu": "yes"}
    assert changed(given, prepared_for(given)) == expected
    (Path(file).parent / "open_clip_config.json").write_text("[]")
    with pytest.raises(ModelError, match="no configuration of open_clip"):
        prepared_for(given)


def test_tags_random_weights_and_own_architectures_stay(own: str, weights: str) -> None:
    for given in (
        VisionSettings(model="ViT-B-32", pretrained="openai"),
        VisionSettings(model="ViT-B-32", pretrained="random"),
        VisionSettings(model=own, pretrained=weights),
        VisionSettings(),
    ):
        assert prepared_for(given) == given


def test_preprocessing_and_activation_are_part_of_the_digest_and_of_the_features(own: str, weights: str) -> None:
    plain = VisionSettings(model=own, pretrained=weights)
    variants = [{}, {"mean": HALF}, {"std": HALF}, {"interpolation": "bilinear"}, {"resize": "squash"}]
    variants += [{"quick_gelu": "yes"}]
    towers = [load_vision_encoder(plain.model_copy(update=each)) for each in variants]
    assert len({encoder.digest for encoder in towers}) == len(variants)
    pixels = torch.rand(1, 3, 32, 32)
    assert not torch.equal(towers[0](pixels), towers[-1](pixels))
    in_bytes = (pixels * 255).byte()
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(towers[1].scaled(in_bytes), (in_bytes / 255 - 0.5) / std)


def test_the_activation_is_openais_where_it_is_asked_for(own: str, weights: str) -> None:
    """Against the architecture's own description with that activation."""
    config = json.loads(Path(own).read_text()) | {"quick_gelu": True}
    other = Path(own).with_name("quick-clip.json")
    other.write_text(json.dumps(config))
    asked = load_vision_encoder(VisionSettings(model=own, pretrained=weights, quick_gelu="yes"))
    described = load_vision_encoder(VisionSettings(model=str(other), pretrained=weights))
    refused = load_vision_encoder(VisionSettings(model=str(other), pretrained=weights, quick_gelu="no"))
    plain = load_vision_encoder(VisionSettings(model=own, pretrained=weights))
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(asked(pixels), described(pixels))
    assert torch.equal(refused(pixels), plain(pixels))
    assert not torch.equal(asked(pixels), plain(pixels))


def test_a_folder_as_open_clip_writes_it_is_a_model(own: str, weights: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    config = {"model_cfg": json.loads(Path(own).read_text()), "preprocess_cfg": BESIDE}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="none of"):
        load_vision_encoder(VisionSettings(model=str(folder)))
    (folder / "open_clip_model.safetensors").write_bytes(Path(weights).read_bytes())
    found = load_vision_encoder(VisionSettings(model=str(folder)))
    own_config = load_vision_encoder(VisionSettings(model=str(folder / "open_clip_config.json"), pretrained=weights))
    beside = load_vision_encoder(VisionSettings(model=own, pretrained=str(folder)))
    assert found.mean.flatten().tolist() == own_config.mean.flatten().tolist() == HALF
    pixels = (torch.rand(1, 3, 32, 32) * 255).byte()
    assert torch.equal(found(pixels), own_config(pixels))
    assert torch.equal(found(pixels), beside(pixels))
