"""What the benchmark of ablations runs side by side is the same training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionModel

from ablations.benchmarks import ablation, llava_script
from ablations.benchmarks.llava_pair import IMAGE_TOKEN, PAD, make_models
from mmphi.config import LanguageSettings, VisionSettings
from mmphi.models.language.language_model import load_language_model
from mmphi.models.packed_vlm import PackedVLM
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.models.vision.vision_encoder import load_vision_encoder
from mmphi.text.packing import pack
from mmphi.text.tokenized_example import FeatureSpan, TokenizedExample

pytestmark = pytest.mark.slow


def test_script_and_mmphi_see_and_lose_the_same(tmp_path: Path) -> None:
    shape = ablation.SHAPES["tiny"]
    preprocess = make_models(tmp_path, shape)
    vision = VisionSettings(model=str(tmp_path / "benchmark-vit.json"), pretrained=str(tmp_path / "vision.safetensors"))
    encoder, theirs = load_vision_encoder(vision), CLIPVisionModel.from_pretrained(tmp_path / "vision")
    rng = np.random.default_rng(0)
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(paths[-1])
    pixels = encoder.scaled(torch.stack([encoder.preprocess(Image.open(path)) for path in paths]))
    with torch.inference_mode():
        hidden = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    features = encoder(pixels)
    torch.testing.assert_close(hidden, features, rtol=1e-4, atol=1e-5)

    class Stored:
        width = shape.vision_width

        def length(self, image: int, /) -> int:
            return encoder.tokens

        def rows(self, images: list[int], /) -> torch.Tensor:
            return features[images].flatten(0, 1)

    samples, rows = [], []
    for number, length in enumerate((5, 9, 3)):
        ids = np.array([50256, *[0] * encoder.tokens, *rng.integers(0, 50000, length), 50256], np.int32)
        supervised = np.arange(len(ids)) > encoder.tokens
        samples.append(TokenizedExample(ids, supervised, (FeatureSpan("image", number, 1, encoder.tokens),)))
        at = {"image": str(paths[number]), "image_at": [1, encoder.tokens]}
        rows.append({"ids": ids.tolist(), "supervised": supervised.tolist(), **at})
    torch.manual_seed(0)
    projector = Projector(ProjectorConfig(shape.vision_width, shape.width))
    save_file(projector.state_dict(), tmp_path / "projector.safetensors")
    language = load_language_model(LanguageSettings(model=str(tmp_path / "language")), None, torch.device("cpu"))
    batch = pack(samples, {"image": Stored()})
    with torch.inference_mode():
        ours = PackedVLM(language.model, image=projector)(**batch) / batch["step_tokens"]
    work = {
        "language": str(tmp_path / "language"),
        "vision": str(tmp_path / "vision"),
        "projector": str(tmp_path / "projector.safetensors"),
        "preprocess": preprocess,
        "image_token": IMAGE_TOKEN,
        "pad": PAD,
        "learning_rate": 1e-3,
        "warmup": 0.0,
        "steps": [rows, rows],
        "test": rows,
    }
    (tmp_path / "work.json").write_text(json.dumps(work))
    llava_script.main(str(tmp_path / "work.json"))
    out = json.loads((tmp_path / "work.out.json").read_text())
    assert abs(out["losses"][0] - ours.item()) < 1e-4
    assert out["test"] < out["losses"][1] < out["losses"][0]  # It learns these three by heart.


def test_ratios_and_distances(capsys: pytest.CaptureFixture[str]) -> None:
    losses = {side: [[2.0, 1.0 + 1e-6 * place]] * 8 for place, side in enumerate(("study", "cold", "script"))}
    found = {"seconds": {"study": 10.0, "cold": 15.0, "script": 31.0}, "losses": losses, "embedding": 2.0}
    ablation.report(found, ablation.SHAPES["tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split()[:3] == ["cold", "15.0", "1.50"]
    assert lines[4].split() == ["script", "31.0", "3.10", "2e-06"]
