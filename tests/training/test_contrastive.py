from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from builders import Recorder
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from workers import spawn

from mmphi.config import TrainingSettings
from mmphi.errors import Stopped
from mmphi.training import contrastive
from mmphi.training.checkpoints import complete_checkpoints
from mmphi.training.contrastive import ClampLogitScaleCallback, ContrastiveTask, ImageTextDataset
from mmphi.training.image_dataset import ImageDataset
from mmphi.training.optimizers import MuonAdamW
from mmphi.training.trainer import train

VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16, "pool_type": "avg"},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
COUNT = 12


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(**VIT)


def pairs(steps: int = 4, processes: int = 1) -> ImageTextDataset:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(COUNT, 3, 16, 16, generator=rng)
    texts = torch.randint(1, 400, (2 * COUNT, 8), generator=rng)
    texts[:, -1] = 49407
    owners = [i // 2 for i in range(2 * COUNT)]
    shape = {"steps": steps, "batch_size": 6, "captions": 2, "seed": 0, "processes": processes}
    return ImageTextDataset(images, texts, owners, **shape)


def run(folder: Path, recorder: Recorder | None = None, steps: int = 4) -> ContrastiveTask:
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    inner = model()
    clip = ContrastiveTask(inner, processes=processes, rank=rank)
    settings = TrainingSettings(steps=steps, log_every=1, save_every=2, learning_rate=1e-3)
    train(
        clip,
        pairs(steps, processes),
        settings,
        folder=folder,
        tracker=recorder or Recorder(),
        title="clip",
        optimizer=torch.optim.SGD(clip.parameters(), lr=0.1),  # Adam would blow rounding up where gradients vanish.
        callbacks=[ClampLogitScaleCallback(inner)],
    )
    return clip


def test_loss_is_the_papers(tmp_path):
    """Against the pseudocode of Radford et al. (2021, figure 3), over both sets of captions."""
    clip, batch = ContrastiveTask(model()).eval(), pairs()[0]
    losses = []
    for texts in batch["texts"]:
        seen = F.normalize(clip.model.encode_image(batch["images"]), dim=-1)
        read = F.normalize(clip.model.encode_text(texts), dim=-1)
        logits = seen @ read.T * clip.model.logit_scale.exp()
        own = torch.arange(6)
        losses.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
    torch.testing.assert_close(clip(**batch), torch.stack(losses).mean())


def test_a_caption_that_several_images_have_is_read_once(monkeypatch):
    clip = ContrastiveTask(model())
    batch = pairs()[0]
    texts = batch["texts"].clone()
    texts[0, 3], texts[1, 2:5] = texts[0, 1], texts[0, 1]
    seen, scale = clip.embed_images(batch["images"]), clip.model.logit_scale.exp()
    reference = torch.stack([clip.loss(seen, clip.embed_texts(one), scale) for one in texts]).mean()
    reference.backward()
    expected = {name: p.grad.clone() for name, p in clip.named_parameters()}
    clip.zero_grad()
    read = []
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda tokens: read.append(len(tokens)) or encode(tokens))
    loss = clip(batch["images"], texts, batch["step_tokens"])
    loss.backward()
    assert read == [texts.shape[0] * texts.shape[1] - 4]
    torch.testing.assert_close(loss, reference)
    for name, parameter in clip.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_scale_stays_below_a_hundred(tmp_path):
    inner = model()
    with torch.no_grad():
        inner.logit_scale.fill_(9.0)
    ClampLogitScaleCallback(inner).on_optimizer_step(None, None, None)
    assert inner.logit_scale.item() == pytest.approx(math.log(100))


def test_running_means_are_part_of_a_checkpoint(tmp_path):
    clip = ContrastiveTask(model())
    means = torch.zeros(3)
    clip.register_buffer("means", means)
    settings = TrainingSettings(steps=2, save_every=2, precision="fp32")
    train(clip, pairs(2), settings, folder=tmp_path, tracker=Recorder(), title="clip", state={"means": means})
    saved = load_file(complete_checkpoints(tmp_path)[-1] / "trained.safetensors")
    assert torch.equal(saved["state.means"], torch.zeros(3))
    means.fill_(7)
    train(clip, pairs(2), settings, folder=tmp_path, tracker=Recorder(), title="clip", state={"means": means})
    assert torch.equal(means, torch.zeros(3))  # Taken back from the checkpoint.


def test_images_are_decoded_when_asked_for_and_once(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(path)
    preprocess = image_transform_v2(PreprocessCfg(size=16), is_train=False)
    calls = []
    pixels = ImageDataset([path], lambda image: calls.append(1) or preprocess(image))
    assert calls == []
    assert torch.equal(pixels[0], pixels[0])
    assert len(calls) == 1
    monkeypatch.setattr("mmphi.training.image_dataset.KEPT_BYTES", 10)
    bounded = ImageDataset([path], lambda image: calls.append(1) or preprocess(image))
    assert bounded[0] is not bounded[0]


def test_images_that_cannot_be_read_are_told_and_the_others_decoded_by_then(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path in paths:
        Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(path)
    paths[1].write_bytes(b"no image")
    paths[3].unlink()
    preprocess = image_transform_v2(PreprocessCfg(size=16), is_train=False)
    calls = []
    pixels, wrong = ImageDataset.readable(paths, lambda image: calls.append(1) or preprocess(image))
    assert pixels.paths == [paths[0], paths[2], paths[4]]
    assert set(wrong) == {paths[1], paths[3]}
    assert "missing" in wrong[paths[3]].reason
    assert pixels.kept
    assert [pixels[i].shape for i in range(3)] == [(3, 16, 16)] * 3
    assert len(calls) == 3


def test_decoded_images_are_embedded_without_another_process(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(path)
    timm = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    clip = ContrastiveTask(open_clip.CLIP(**{**VIT, "vision_cfg": timm}), lock_image=True).eval()
    pixels = ImageDataset([path, path], image_transform_v2(PreprocessCfg(size=32), is_train=False))
    workers, loader = [], contrastive.DataLoader

    def watched(*given, num_workers):
        workers.append(num_workers)
        return loader(*given, num_workers=num_workers)

    monkeypatch.setattr(contrastive, "DataLoader", watched)
    read = clip.image_inputs(pixels, 1)
    known = clip.image_inputs(ImageDataset.readable([path, path], pixels.preprocess)[0], 1)
    assert workers == [1, 0]
    assert torch.equal(read, known)
    with torch.inference_mode():
        torch.testing.assert_close(known, clip.model.visual.trunk(torch.stack([pixels[0]] * 2)))


WORKER = """
from test_contrastive import run
clip = run(RUN, recorder)
saved = {"weights": {n: p.detach() for n, p in clip.named_parameters()}, "losses": recorder.series("train/loss")}
"""


@pytest.mark.slow
def test_two_processes_with_gathered_negatives_equal_one(tmp_path):
    one, two = (spawn(tmp_path, n, __file__, WORKER) for n in (1, 2))
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=2e-5, msg=name)
    for step, loss in one["losses"].items():
        assert two["losses"][step] == pytest.approx(loss, rel=1e-4)


def test_muon_has_what_is_between_the_ends_of_both_towers():
    resnet = {**VIT, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4}}
    for shape, layer in ((VIT, "transformer.resblocks.0.attn.in_proj_weight"), (resnet, "layer2.0.conv2.weight")):
        clip = ContrastiveTask(open_clip.CLIP(**shape))
        names = MuonAdamW(clip, learning_rate=1e-3, muon_learning_rate=0.02).matrices
        assert f"model.visual.{layer}" in names
        assert "model.transformer.resblocks.0.mlp.c_fc.weight" in names
        ends = ("embedding", "projection", "visual.conv1", "visual.proj", "attnpool")
        assert not [name for name in names for end in ends if end in name]


@pytest.mark.slow
def test_a_training_with_muon_goes_on_to_the_bit(tmp_path):
    resnet = {**VIT, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4}}
    settings = TrainingSettings(steps=4, log_every=1, save_every=2, eval_every=1, optimizer="muon")

    def stop(step: int) -> dict[str, float]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"val/loss": 1.0}

    def trained(folder: Path, **asked) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        clip = ContrastiveTask(open_clip.CLIP(**resnet))
        given = pairs(4)
        given.images = torch.nn.functional.interpolate(given.images, 32)
        state = {name: b for name, b in clip.named_buffers() if name in clip.state_dict()}
        train(clip, given, settings, folder=folder, tracker=Recorder(), title="clip", state=state, **asked)
        return clip.state_dict()

    straight = trained(tmp_path / "straight")
    with pytest.raises(Stopped):
        trained(tmp_path / "cut", validate=stop)
    resumed = trained(tmp_path / "cut")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
