"""The whole path on real photographs and pretrained models, short; full results: docs/explanation/results.md."""

from __future__ import annotations

import math
import os

import pytest
import torch

from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES, load_settings

pytestmark = pytest.mark.real

SHORT = {
    "data.max_images": "60",
    "data.validation_images": "5",
    "data.test_images": "15",
    "light_clip.steps": "40",
    "steps": "12",
    "batch_size": "8",
    "eval_every": "12",
    "evaluate.max_new_tokens": "12",
    "evaluate.yes_no": "10",
}


def test_from_photos_to_captions(tmp_path, monkeypatch, real_models, real_photos):
    torch.set_num_threads(os.cpu_count() or 1)  # Nothing here is compared to the bit.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    settings = load_settings("photos", SHORT, "projector")
    done = Pipeline(STAGES).build("projector", settings)
    metrics = done.metrics
    assert math.isfinite(metrics["test/loss"])
    assert metrics["test/loss"] < 5.5  # SmolLM2 has 4.5 to 5 nats on captions after nothing at all
    assert 0 <= metrics["test/eos_rate"] <= 1
    assert (done.path / "projector.safetensors").stat().st_size > 1e6
    again = Pipeline(STAGES).build("evaluate", settings)
    for name in ("test/loss", "test/grounding_gain", "test/cider"):
        assert again.metrics[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-3)
