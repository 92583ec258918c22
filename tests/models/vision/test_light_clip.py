from __future__ import annotations

import os
import signal
from pathlib import Path

import open_clip
import pytest
import torch
from builders import Recorder, context
from safetensors.torch import load_file

from mmphi.config import SourceSettings, VisionSettings
from mmphi.config.light_clip import LightClipSettings
from mmphi.errors import ModelError, Stopped
from mmphi.evaluation.retrieval import recall
from mmphi.models.vision.vision_encoder import load_saved_clip, load_vision_encoder
from mmphi.pipeline.stage import Result
from mmphi.stages import Settings, light_clip, scenes
from mmphi.stages.scenes import ScenesSettings

SMALL = {"width": 32, "layers": 2, "image_size": 32, "embed_dim": 16, "steps": 6, "batch_size": 8, "save_every": 2}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Result:
    folder = tmp_path_factory.mktemp("scenes")
    settings = Settings(scenes=ScenesSettings(train_images=24, validation_images=4, test_images=10, texts=0))
    scenes.run(context(scenes.STAGE, folder, settings))
    return Result("scenes", "key", "run", folder)


def train(folder: Path, drawn: Result, recorder: Recorder | None = None, **changes) -> dict:
    settings = Settings(light_clip=LightClipSettings(**{**SMALL, **changes}))
    tracker = recorder or Recorder()
    return light_clip.run(context(light_clip.STAGE, folder, settings, upstream={"scenes": drawn}, tracker=tracker))


def test_saved_model_is_open_clips(tmp_path, drawn, recorder):
    metrics = train(tmp_path / "a", drawn, recorder)
    assert set(metrics) == {
        f"test/{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    assert len(recorder.tables["zero_shot"]) == 8
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'a'}").eval()
    ours = load_saved_clip(tmp_path / "a").eval()
    pixels = torch.randn(2, 3, 32, 32)
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'a'}")(["a big red circle", "a small cross"])
    assert torch.equal(theirs.encode_image(pixels), ours.encode_image(pixels))
    assert torch.equal(theirs.encode_text(tokens), ours.encode_text(tokens))
    moved = tmp_path / "moved"
    (tmp_path / "a").rename(moved)
    encoder = load_vision_encoder(VisionSettings(), moved)
    assert (encoder.tokens, encoder.width) == (4, 128)


def test_vit_from_nothing(tmp_path, drawn):
    train(tmp_path / "a", drawn, from_nothing="vit", steps=2)
    encoder = load_vision_encoder(VisionSettings(), tmp_path / "a")
    assert (encoder.tokens, encoder.width) == (16, 32)


def test_steps_hold_different_images_and_their_own_captions():
    from mmphi.training.contrastive import ImageTextDataset

    owners = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    shape = {"steps": 6, "batch_size": 2, "captions": 3, "seed": 0}
    pairs = ImageTextDataset(torch.arange(4)[:, None], torch.arange(12)[:, None], owners, **shape)
    seen = set()
    for step in range(6):
        images, sets = pairs.step(step)
        assert len(set(images)) == 2
        for chosen in sets:
            assert [owners[t] for t in chosen] == images
        assert len({t for chosen in sets for t in chosen}) == 6
        assert pairs[step]["images"].flatten().tolist() == images
        assert pairs[step]["texts"].squeeze(-1).tolist() == sets
        seen |= set(images)
    assert seen == {0, 1, 2, 3}


@pytest.mark.slow
def test_resumed_equals_straight_to_the_bit(tmp_path, drawn, monkeypatch):
    train(tmp_path / "straight", drawn)
    losses = iter(range(100))
    real = torch.nn.utils.clip_grad_norm_

    def clip_then_stop(*arguments, **options):
        if next(losses) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip_then_stop)
    with pytest.raises(Stopped, match="after step 3"):
        train(tmp_path / "cut", drawn)
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", real)
    recorder = Recorder()
    train(tmp_path / "cut", drawn, recorder)
    assert "resuming from step 3" in recorder.said[0]
    one, two = (load_file(tmp_path / n / "open_clip_model.safetensors") for n in ("straight", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path, drawn, recorder):
    train(tmp_path / "a", drawn, recorder, steps=40, learning_rate=3e-3, log_every=1)
    losses = recorder.series("train/loss")
    assert losses[40] < 0.8 * losses[1]


def test_missing_towers_are_refused(tmp_path, drawn):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        train(tmp_path / "a", drawn, text_tower=str(tmp_path))
    with pytest.raises(ModelError, match="light CLIP cannot be built"):
        train(tmp_path / "b", drawn, image_tower="no_such_tower")


def test_recall_against_counting():
    torch.manual_seed(0)
    images, texts = torch.randn(12, 4), torch.randn(30, 4)
    owners = [i % 12 for i in range(30)]
    found = recall(images, texts, owners)
    similar = (images @ texts.T).tolist()
    for k in (1, 5, 10):
        hits = 0
        for i in range(12):
            best = sorted(range(30), key=lambda t: -similar[i][t])[:k]
            hits += any(owners[t] == i for t in best)
        assert found[f"image_to_text_recall_at_{k}"] == pytest.approx(hits / 12)
        hits = 0
        for t in range(30):
            best = sorted(range(12), key=lambda i: -similar[i][t])[:k]
            hits += owners[t] in best
        assert found[f"text_to_image_recall_at_{k}"] == pytest.approx(hits / 30)


@pytest.mark.real
def test_over_pretrained_towers(tmp_path, real_models, real_photos):
    photos = SourceSettings(kind="captions", path=str(real_photos / "captions.csv"), images=str(real_photos / "images"))
    settings = Settings(
        data={"sources": [photos.model_dump()], "max_images": 60, "validation_images": 0, "test_images": 20},
        light_clip=LightClipSettings(
            image_tower="tf_efficientnet_lite0",
            image_weights=str(real_models / "efficientnet-lite0.safetensors"),
            text_tower=str(real_models / "all-minilm-l6-v2"),
            lock_image=True,
            lock_text=True,
            image_size=224,
            dropout=0.5,
            steps=60,
            batch_size=40,
        ),
    )
    metrics = light_clip.run(context(light_clip.STAGE, tmp_path, settings))
    assert metrics["test/text_to_image_recall_at_5"] > 0.4  # chance: 0.25
    model = open_clip.create_model(f"local-dir:{tmp_path}")
    assert model.visual.trunk.num_features == 1280
    encoder = load_vision_encoder(VisionSettings(layer=-1), tmp_path)
    assert (encoder.tokens, encoder.width) == (49, 1280)


def test_the_function_trains_what_the_stage_trains(tmp_path, drawn):
    from mmphi.stages.shared_models import read
    from mmphi.tracking.tracker import SilentTracker
    from mmphi.training.light_clip import train_light_clip

    train(tmp_path / "stage", drawn)
    chosen = LightClipSettings(**SMALL)
    view = context(light_clip.STAGE, tmp_path, Settings(light_clip=chosen), upstream={"scenes": drawn})
    examples, _ = read(view.settings, view.upstream)
    (tmp_path / "function").mkdir()
    train_light_clip(examples, chosen, folder=tmp_path / "function", tracker=SilentTracker())
    ours, stages = (load_file(tmp_path / name / "open_clip_model.safetensors") for name in ("function", "stage"))
    assert all(torch.equal(ours[key], stages[key]) for key in stages)
