"""The assistant on a real photograph, a real voice and pretrained models, by every way there is to ask it."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES, load_settings

sys.path.insert(0, str(Path(__file__).parent / "serving"))

pytestmark = pytest.mark.real

SHORT = {
    "data.max_images": "30",
    "data.validation_images": "3",
    "data.test_images": "5",
    "light_clip.steps": "4",
    "steps": "4",
    "batch_size": "8",
    "eval_every": "4",
    "evaluate.max_new_tokens": "4",
    "evaluate.yes_no": "2",
}


def test_a_photo_a_voice_and_text_get_the_same_answer_by_every_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    real_models: Path,
    real_photos: Path,
    real_folder: Path,
) -> None:
    from answerers import all_ways

    torch.set_num_threads(os.cpu_count() or 1)  # Nothing here is compared to the bit.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    done = Pipeline(STAGES).build("projector", load_settings("photos", SHORT, "projector"))
    photo = next(iter(sorted((real_photos / "images").glob("*.jpg"))))
    voice = real_folder / "speech" / f"{photo.stem}.mp3"
    if not voice.exists():
        voice = next(iter(sorted((real_folder / "speech").glob("*.mp3"))))
    whisper = str(real_models / "whisper-tiny.en.pt")
    found = all_ways(done.path, photo, voice, "Is that what the photograph shows?", whisper, capsys, monkeypatch)
    assert len(found["python"].split()) > 1
    assert found.pop("page") == inspect.cleandoc(found["python"])
    assert set(found.values()) == {found["python"]}
