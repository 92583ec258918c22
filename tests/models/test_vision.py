from __future__ import annotations

import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import context as context_of
from PIL import Image

from mmphi.data.feature_writer import FeatureWriter
from mmphi.data.features import FeatureStore, LiveFeatures
from mmphi.data.records import ImageRef
from mmphi.errors import DataError, ModelError, StoreError
from mmphi.models.vision import load_tower
from mmphi.pipeline.stage import Context, Result
from mmphi.settings import DataSettings, SourceSettings, VisionSettings
from mmphi.stages import Settings, embed
from mmphi.stages.embed import EmbedSettings

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture
def own(tmp_path) -> str:
    path = tmp_path / "own-tiny-clip.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def weights(own, tmp_path) -> str:
    torch.manual_seed(0)
    open_clip.add_model_config(own)
    model = open_clip.create_model("own-tiny-clip")
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def tower(model: str, pretrained: str = "random", **changes):
    return load_tower(VisionSettings(model=model, pretrained=pretrained, **changes))


def test_layers_are_open_clips_own(own, weights):
    model = open_clip.create_model("own-tiny-clip", pretrained=weights).eval()
    pixels = torch.randn(2, 3, 32, 32)
    x = model.visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([model.visual.class_embedding.expand(2, 1, -1), x], dim=1) + model.visual.positional_embedding
    x = model.visual.ln_pre(x)
    for number, block in enumerate(model.visual.transformer.resblocks):
        x = block(x)
        dropped = tower(own, weights, layer=number - 3)(pixels)
        torch.testing.assert_close(dropped, x[:, 1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tower(own, weights, layer=number - 3, cls="keep")(pixels), x, rtol=1e-4, atol=1e-5)


def test_pooling_averages_squares_of_the_grid(own, weights):
    pixels = torch.randn(2, 3, 32, 32)
    full, pooled = tower(own, weights)(pixels), tower(own, weights, pool=2)(pixels)
    assert pooled.shape == (2, 4, 32)
    grid = full.reshape(2, 4, 4, 32)
    torch.testing.assert_close(pooled[:, 1], grid[:, :2, 2:].mean(dim=(1, 2)))
    with pytest.raises(ModelError, match=r"pool = 3 does not divide the grid of 4 x 4"):
        tower(own, weights, pool=3)


def test_convolutional_timm_tower(tmp_path):
    config = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "tf_efficientnet_lite0", "image_size": 64}}
    path = tmp_path / "own-lite.json"
    path.write_text(json.dumps({**config, "text_cfg": CONFIG["text_cfg"]}))
    last, before = tower(str(path), layer=-1), tower(str(path), layer=-2)
    assert (last.tokens, last.width) == (4, 1280)
    assert before.width == 320
    pixels = torch.randn(1, 3, 64, 64)
    expected = last.visual.trunk.forward_features(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(last(pixels), expected)
    with pytest.raises(ModelError, match="no CLS token"):
        tower(str(path), layer=-1, cls="keep")


def test_timm_transformer_tower(tmp_path):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "token"}
    path = tmp_path / "own-vit.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": CONFIG["text_cfg"]}))
    found = tower(str(path), layer=-2, cls="keep")
    assert (found.tokens, found.width) == (197, 192)


def test_digest_tells_what_changes_features(own, weights):
    base = tower(own, weights).digest
    assert tower(own, weights).digest == base
    others = [tower(own, weights, layer=-1), tower(own, weights, pool=2), tower(own, weights, cls="keep"), tower(own)]
    assert base not in {t.digest for t in others}


def test_unknown_models_name_the_nearest(own, tmp_path):
    with pytest.raises(ModelError, match="ViT-B-32"):
        tower("ViT-B-23")
    with pytest.raises(ModelError, match="no such file"):
        tower(str(tmp_path / "none.json"))
    with pytest.raises(ModelError, match="laion2b"):
        tower("ViT-B-32", "nobody")
    with pytest.raises(ModelError, match="-3 to -1"):
        tower(own, layer=-9)
    with pytest.raises(ModelError, match="no light CLIP"):
        tower("light_clip", "")


def test_weights_decide_the_activation(monkeypatch):
    """OpenAI's weights were trained with QuickGELU, which the plain architecture's configuration does not say."""
    made = {}

    def create(name, **options):
        made.update(options, name=name)
        raise OSError("no hub here")

    monkeypatch.setattr(open_clip, "create_model", create)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(ModelError, match="no hub here"):
            tower("ViT-B-32", tag)
        assert (made["name"], made["pretrained"], made["force_quick_gelu"]) == ("ViT-B-32", tag, quick)


def test_quick_gelu_reaches_the_layers(own):
    open_clip.add_model_config(own)
    quick = open_clip.create_model("own-tiny-clip", force_quick_gelu=True)
    activations = {type(block.mlp.gelu).__name__ for block in quick.visual.transformer.resblocks}
    assert activations == {"QuickGELU"}


def test_no_weights_are_an_error_and_random_ones_have_a_name(own):
    with pytest.raises(ModelError, match=r"vision\.pretrained says no weights") as error:
        tower(own, "")
    assert "random" in error.value.hint
    assert tower(own, "random").tokens == 16


def test_a_warning_about_weights_is_an_error(own, weights, monkeypatch):
    real = open_clip.create_model

    def warns(*arguments, **options):
        logging.warning("No pretrained weights loaded for model 'x'. Model initialized randomly.")
        return real(*arguments, **options)

    monkeypatch.setattr(open_clip, "create_model", warns)
    with pytest.raises(ModelError, match="not loaded whole: No pretrained weights"):
        tower(own, weights)


def photos(folder: Path, count: int = 12) -> list[ImageRef]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    refs = []
    for i in range(count):
        path = folder / "images" / f"{i:02d}.png"
        torch.manual_seed(i)
        Image.fromarray(torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8).numpy()).save(path)
        refs.append(ImageRef(f"captions/{path.name}", path))
    return refs


def context(
    folder: Path, out: Path, own: str, weights: str, workers: int = 0, earlier=(), shard_images: int = 5, **data
) -> Context:
    rows = [f'{p.name},"a thing"' for p in sorted((folder / "images").iterdir())]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    source = SourceSettings(kind="captions", path=str(folder / "captions.csv"), images=str(folder / "images"))
    settings = Settings(
        data=DataSettings(sources=[source], validation_images=0, test_images=1, **data),
        vision=VisionSettings(model=own, pretrained=weights),
        embed=EmbedSettings(batch_size=4, workers=workers, shard_images=shard_images),
    )
    return context_of(embed.STAGE, out, settings, earlier=earlier)


def test_stored_features_equal_live_ones(tmp_path, own, weights):
    refs = photos(tmp_path)
    metrics = embed.run(context(tmp_path, tmp_path / "out", own, weights))
    store, live = FeatureStore(tmp_path / "out"), LiveFeatures(tower(own, weights))
    assert metrics["embed/images"] == len(store) == 12
    assert (store.tokens, store.width) == (live.tokens, live.width) == (16, 32)
    picked = [refs[7], refs[0], refs[11], refs[7]]
    torch.testing.assert_close(store.get(picked), live.get(picked), rtol=2e-3, atol=2e-3)
    assert store.get(picked).dtype == torch.float16
    assert refs[0] in store
    assert ImageRef("captions/none.png", Path("none.png")) not in store
    with pytest.raises(StoreError, match="no stored features"):
        store.get([ImageRef("captions/none.png", Path("none.png"))])


def test_workers_change_nothing(tmp_path, own, weights):
    refs = photos(tmp_path)
    embed.run(context(tmp_path, tmp_path / "a", own, weights))
    embed.run(context(tmp_path, tmp_path / "b", own, weights, workers=2))
    found = [FeatureStore(tmp_path / name).get(refs) for name in "ab"]
    assert torch.equal(*found)


def test_killed_embed_goes_on_and_equals_straight(tmp_path, own, weights, monkeypatch):
    refs = photos(tmp_path)
    straight = context(tmp_path, tmp_path / "straight", own, weights)
    embed.run(straight)
    real, calls = FeatureWriter.write, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, *arguments)

    cut = context(tmp_path, tmp_path / "cut", own, weights)
    monkeypatch.setattr(FeatureWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        embed.run(cut)
    with pytest.raises(StoreError, match="no features can be read"):
        FeatureStore(tmp_path / "cut")
    monkeypatch.setattr(FeatureWriter, "write", real)
    with (tmp_path / "cut" / "progress.jsonl").open("a") as file:
        file.write('{"shard": "features-00001')  # torn by the kill
    computed = []
    decode = embed.Decoded.__getitem__
    monkeypatch.setattr(embed.Decoded, "__getitem__", lambda self, i: computed.append(i) or decode(self, i))
    embed.run(cut)
    assert len(computed) == 4  # eight of twelve were there
    assert torch.equal(FeatureStore(tmp_path / "cut").get(refs), FeatureStore(tmp_path / "straight").get(refs))


def test_resumed_with_other_shards_every_row_is_in_its_place(tmp_path, own, weights, monkeypatch):
    """The size of files is no part of what is stored: rows are found by file and place."""
    refs = photos(tmp_path)
    straight = context(tmp_path, tmp_path / "straight", own, weights)
    embed.run(straight)
    real, calls = FeatureWriter.write, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureWriter, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            embed.run(context(tmp_path, tmp_path / "cut", own, weights))
    embed.run(context(tmp_path, tmp_path / "cut", own, weights, shard_images=3))
    assert torch.equal(FeatureStore(tmp_path / "cut").get(refs), FeatureStore(tmp_path / "straight").get(refs))


def test_another_source_embeds_its_own_images_alone(tmp_path, own, weights, monkeypatch):
    """What an earlier result holds is taken over, without computing or copying it."""
    refs = photos(tmp_path, 8)
    (tmp_path / "more").mkdir()
    embed.run(context(tmp_path, tmp_path / "first", own, weights))
    added = photos(tmp_path, 11)
    computed = []
    decode = embed.Decoded.__getitem__
    monkeypatch.setattr(embed.Decoded, "__getitem__", lambda self, i: computed.append(i) or decode(self, i))
    earlier = [Result("embed", "key", "run", tmp_path / "first")]
    second = context(tmp_path, tmp_path / "second", own, weights, earlier=earlier)
    assert not embed.covers(second.settings, {}, tmp_path / "first")
    metrics = embed.run(second)
    assert len(computed) == metrics["embed/computed"] == 3
    assert embed.covers(second.settings, {}, tmp_path / "second")
    one, two = FeatureStore(tmp_path / "first"), FeatureStore(tmp_path / "second")
    assert torch.equal(one.get(refs), two.get(refs))
    live = LiveFeatures(tower(own, weights)).get(added)
    torch.testing.assert_close(two.get(added), live, rtol=2e-3, atol=2e-3)
    inodes = {p.stat().st_ino for p in (tmp_path / "first").glob("features-*.npy")}
    assert inodes <= {p.stat().st_ino for p in (tmp_path / "second").glob("features-*.npy")}


def test_same_content_is_computed_once(tmp_path, own, weights):
    refs = photos(tmp_path, 6)
    for i in (1, 4):
        refs[i].path.write_bytes(refs[0].path.read_bytes())
    metrics = embed.run(context(tmp_path, tmp_path / "out", own, weights))
    assert metrics["embed/images"] == 4
    assert metrics["embed/bytes"] == 4 * 16 * 32 * 2
    features = FeatureStore(tmp_path / "out").get(refs)
    assert torch.equal(features[0], features[4])
    assert not torch.equal(features[0], features[5])


def test_unreadable_images_are_listed_and_left_out(tmp_path, own, weights):
    refs = photos(tmp_path)
    refs[3].path.write_bytes(refs[3].path.read_bytes()[:60])
    refs[5].path.write_bytes(b"")
    allowed = context(tmp_path, tmp_path / "out", own, weights, max_bad_share=0.5)
    metrics = embed.run(allowed)
    assert metrics["embed/unreadable"] == 2
    listed = {row["image"]: row["reason"] for row in allowed.tracker.tables["unreadable"]}
    assert listed[str(refs[5].path)] == "empty image file"
    assert refs[3] not in FeatureStore(tmp_path / "out")
    with pytest.raises(DataError, match=r"16\.7% of the images cannot be read"):
        embed.run(context(tmp_path, tmp_path / "strict", own, weights))


def test_disk_that_is_too_small_is_refused_before_work(tmp_path, own, weights, monkeypatch):
    photos(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("mmphi.data.feature_writer.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="GB free"):
        embed.run(context(tmp_path, tmp_path / "out", own, weights))


def test_disk_that_fills_loses_nothing(tmp_path, own, weights, monkeypatch):
    refs = photos(tmp_path)
    chosen = context(tmp_path, tmp_path / "out", own, weights)
    calls = []

    def full(*_):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmphi.data.feature_writer.os.posix_fallocate", full)
    with pytest.raises(StoreError, match="No space left on device"):
        embed.run(chosen)
    embed.run(chosen)
    live = LiveFeatures(tower(own, weights)).get(refs)
    torch.testing.assert_close(FeatureStore(tmp_path / "out").get(refs), live, rtol=2e-3, atol=2e-3)
