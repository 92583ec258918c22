from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from builders import TINY_CLIP
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose

from mmphi.config import VisionSettings
from mmphi.errors import ModelError
from mmphi.models.vision import preprocess
from mmphi.models.vision.feature_extraction import layer_tokens
from mmphi.models.vision.vision_encoder import VisionEncoder, encoder_output_shape, load_vision_encoder


def encoder(model: str, pretrained: str = "random", **changes):
    return load_vision_encoder(VisionSettings(model=model, pretrained=pretrained, **changes))


def test_layers_are_open_clips_own(own, weights):
    model = open_clip.create_model("own-tiny-clip", pretrained=weights).eval()
    pixels = torch.randn(2, 3, 32, 32)
    x = model.visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([model.visual.class_embedding.expand(2, 1, -1), x], dim=1) + model.visual.positional_embedding
    x = model.visual.ln_pre(x)
    for number, block in enumerate(model.visual.transformer.resblocks):
        x = block(x)
        dropped = encoder(own, weights, layer=number - 3)(pixels)
        torch.testing.assert_close(dropped, x[:, 1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder(own, weights, layer=number - 3, cls="keep")(pixels), x, rtol=1e-4, atol=1e-5)


def test_pooling_averages_squares_of_the_grid(own, weights):
    pixels = torch.randn(2, 3, 32, 32)
    full, pooled = encoder(own, weights)(pixels), encoder(own, weights, pool=2)(pixels)
    assert pooled.shape == (2, 4, 32)
    grid = full.reshape(2, 4, 4, 32)
    torch.testing.assert_close(pooled[:, 1], grid[:, :2, 2:].mean(dim=(1, 2)))
    with pytest.raises(ModelError, match=r"pool = 3 does not divide the grid of 4 x 4"):
        encoder(own, weights, pool=3)


def test_convolutional_timm_tower(tmp_path):
    config = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "tf_efficientnet_lite0", "image_size": 64}}
    path = tmp_path / "own-lite.json"
    path.write_text(json.dumps({**config, "text_cfg": TINY_CLIP["text_cfg"]}))
    last, before = encoder(str(path), layer=-1), encoder(str(path), layer=-2)
    assert (last.tokens, last.width) == (4, 1280)
    assert before.width == 320
    pixels = torch.randn(1, 3, 64, 64)
    expected = last.visual.trunk.forward_features(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(last(pixels), expected)
    with pytest.raises(ModelError, match="no CLS token"):
        encoder(str(path), layer=-1, cls="keep")


# timm's smallest of each family that open_clip's models have, and the shape (tokens, width) of its last two layers.
FAMILIES = {
    "vit_tiny_patch16_224": ((196, 192), (196, 192)),
    "swin_tiny_patch4_window7_224": ((49, 768), (49, 768)),
    "convnext_atto": ((49, 320), (49, 320)),
    "eva02_tiny_patch14_224": ((256, 192), (256, 192)),
    "fastvit_t8": ((49, 768), (49, 384)),
    "vitamin_small_224": ((196, 384), (196, 384)),
    "vit_pe_core_tiny_patch16_384": ((576, 192), (576, 192)),
    "vit_pe_lang_large_patch14_448": ((1024, 1024), (1024, 1024)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_grid_of_patches(family):
    """Built on the meta device: shapes without weights."""
    size = 448 if "448" in family else 384 if "384" in family else 224
    with torch.device("meta"):
        visual = TimmModel(family, 16, size, pool="", proj="linear").eval()
    for layer, expected in zip((-1, -2), FAMILIES[family], strict=True):
        settings = VisionSettings(model="any", layer=layer)
        found = layer_tokens(visual, torch.zeros(2, 3, size, size, device="meta"), settings)
        assert tuple(found.shape) == (2, *expected)


def test_swins_last_layer_is_its_own_in_the_order_of_its_patches():
    torch.manual_seed(0)
    visual = TimmModel("swin_tiny_patch4_window7_224", 16, 224, pool="avg", proj="linear").eval()
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        found = layer_tokens(visual, pixels, VisionSettings(model="any", layer=-1))
        expected = visual.trunk.forward_features(pixels)
    assert expected.shape == (1, 7, 7, 768)
    torch.testing.assert_close(found, expected.reshape(1, 49, 768))


@pytest.mark.slow
def test_every_model_of_open_clip_has_a_shape():
    """On the meta device; those that cannot give the tokens of a layer say so."""
    refused, seen = {}, set()
    shipped = {path.stem for path in (Path(open_clip.__file__).parent / "model_configs").glob("*.json")}
    assert len(shipped) > 100
    # Names that other tests have registered in this process are left out.
    for name in sorted(shipped.intersection(open_clip.list_models())):
        config = open_clip.get_model_config(name)
        shape = json.dumps({k: v for k, v in config["vision_cfg"].items() if k != "image_size"}, default=str)
        if "hf_model_name" in config["text_cfg"] or shape in seen:
            continue  # Its text tower is on the hub, or it was built at another size.
        seen.add(shape)
        try:
            tokens, width = encoder_output_shape(VisionSettings(model=name, pretrained="random", layer=-2))
        except ModelError as error:
            refused[name] = error.what
            continue
        assert 16 <= tokens <= 4096, name
        assert 64 <= width <= 4096, name
    assert refused == {}


def test_timm_transformer_tower(tmp_path):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "token"}
    path = tmp_path / "own-vit.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TINY_CLIP["text_cfg"]}))
    found = encoder(str(path), layer=-2, cls="keep")
    assert (found.tokens, found.width) == (197, 192)


def test_digest_tells_what_changes_features(own, weights):
    base = encoder(own, weights).digest
    assert encoder(own, weights).digest == base
    others = [
        encoder(own, weights, layer=-1),
        encoder(own, weights, pool=2),
        encoder(own, weights, cls="keep"),
        encoder(own),
    ]
    assert base not in {t.digest for t in others}


def test_unknown_models_name_the_nearest(own, tmp_path):
    with pytest.raises(ModelError, match="ViT-B-32"):
        encoder("ViT-B-23")
    with pytest.raises(ModelError, match="no such file"):
        encoder(str(tmp_path / "none.json"))
    with pytest.raises(ModelError, match="laion2b"):
        encoder("ViT-B-32", "nobody")
    with pytest.raises(ModelError, match="-3 to -1"):
        encoder(own, layer=-9)
    with pytest.raises(ModelError, match="no light CLIP"):
        encoder("light_clip", "")


def test_weights_decide_the_activation(monkeypatch):
    """OpenAI's weights were trained with QuickGELU, which the plain architecture's configuration does not say."""
    made = {}

    def create(name, **options):
        made.update(options, name=name)
        raise OSError("no hub here")

    monkeypatch.setattr(open_clip, "create_model", create)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(ModelError, match="no hub here"):
            encoder("ViT-B-32", tag)
        assert (made["name"], made["pretrained"], made["force_quick_gelu"]) == ("ViT-B-32", tag, quick)


def test_quick_gelu_reaches_the_layers(own):
    open_clip.add_model_config(own)
    quick = open_clip.create_model("own-tiny-clip", force_quick_gelu=True)
    activations = {type(block.mlp.gelu).__name__ for block in quick.visual.transformer.resblocks}
    assert activations == {"QuickGELU"}


def test_no_weights_are_an_error_and_random_ones_have_a_name(own):
    with pytest.raises(ModelError, match=r"vision\.pretrained names no weights") as error:
        encoder(own, "")
    assert "random" in error.value.hint
    assert encoder(own, "random").tokens == 16


def test_a_warning_about_weights_is_an_error(own, weights, monkeypatch):
    real = open_clip.create_model

    def warns(*arguments, **options):
        logging.warning("No pretrained weights loaded for model 'x'. Model initialized randomly.")
        return real(*arguments, **options)

    monkeypatch.setattr(open_clip, "create_model", warns)
    with pytest.raises(ModelError, match="loaded incompletely: No pretrained weights"):
        encoder(own, weights)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_pixels_cut_in_bytes_and_scaled_in_batches_are_open_clips_own_to_the_bit(own, weights, resize_mode):
    visual = open_clip.create_model("own-tiny-clip", pretrained=weights).visual
    visual.preprocess_cfg = {**visual.preprocess_cfg, "resize_mode": resize_mode, "mean": (0.5, 0.4, 0.3)}
    found = VisionEncoder(visual, VisionSettings())
    theirs = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, shape, np.uint8)) for shape in [(40, 70, 3), (90, 33, 3), (50, 50)]]
    pixels, expected = torch.stack([found.preprocess(i) for i in images]), torch.stack([theirs(i) for i in images])
    assert pixels.dtype == torch.uint8
    assert torch.equal(found.scaled(pixels), expected)
    assert found.scaled(expected) is expected
    assert torch.equal(found(pixels), found(expected))


def test_what_open_clips_preprocessing_does_last_is_known(monkeypatch):
    whole = image_transform_v2(PreprocessCfg(), is_train=False)
    monkeypatch.setattr(preprocess, "image_transform_v2", lambda *_, **__: Compose(whole.transforms[:-1]))
    with pytest.raises(ModelError, match="open_clip's preprocessing ends in"):
        preprocess.Preprocess(PreprocessCfg())
