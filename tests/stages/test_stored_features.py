"""Stage ``embed``: what is stored is what live features are, whatever happens while it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import context as context_of
from PIL import Image

from mmphi.config import DataSettings, SourceSettings, VisionSettings
from mmphi.data.feature_writer import FeatureWriter
from mmphi.data.features import FeatureStore, LiveFeatures
from mmphi.data.schema import ImageRef
from mmphi.errors import DataError, StoreError
from mmphi.models.vision.vision_encoder import load_vision_encoder
from mmphi.pipeline.stage import Context, Result
from mmphi.stages import Settings, embed
from mmphi.stages.embed import EmbedSettings


def live_features(own: str, weights: str) -> LiveFeatures:
    return LiveFeatures(load_vision_encoder(VisionSettings(model=own, pretrained=weights)))


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


def run_until_the_third_batch(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die as the third batch is about to be written."""
    real, calls = FeatureWriter.write, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(FeatureWriter, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            embed.run(ctx)


def test_stored_features_equal_live_ones(tmp_path, own, weights):
    refs = photos(tmp_path)
    metrics = embed.run(context(tmp_path, tmp_path / "out", own, weights))
    store, live = FeatureStore(tmp_path / "out"), live_features(own, weights)
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
    cut = context(tmp_path, tmp_path / "cut", own, weights)
    run_until_the_third_batch(cut, monkeypatch)
    with pytest.raises(StoreError, match="no features can be read"):
        FeatureStore(tmp_path / "cut")
    with (tmp_path / "cut" / "progress.jsonl").open("a") as file:
        file.write('{"shard": "features-00001')  # torn by the kill
    computed = []
    decode = embed.DecodedImages.__getitem__
    monkeypatch.setattr(embed.DecodedImages, "__getitem__", lambda self, i: computed.append(i) or decode(self, i))
    embed.run(cut)
    assert len(computed) == 4  # eight of twelve were there
    assert torch.equal(FeatureStore(tmp_path / "cut").get(refs), FeatureStore(tmp_path / "straight").get(refs))


def test_resumed_with_other_shards_every_row_is_in_its_place(tmp_path, own, weights, monkeypatch):
    """The size of files is no part of what is stored: rows are found by file and place."""
    refs = photos(tmp_path)
    straight = context(tmp_path, tmp_path / "straight", own, weights)
    embed.run(straight)
    run_until_the_third_batch(context(tmp_path, tmp_path / "cut", own, weights), monkeypatch)
    embed.run(context(tmp_path, tmp_path / "cut", own, weights, shard_images=3))
    assert torch.equal(FeatureStore(tmp_path / "cut").get(refs), FeatureStore(tmp_path / "straight").get(refs))


def test_another_source_embeds_its_own_images_alone(tmp_path, own, weights, monkeypatch):
    """What an earlier result holds is taken over, without computing or copying it."""
    refs = photos(tmp_path, 8)
    (tmp_path / "more").mkdir()
    embed.run(context(tmp_path, tmp_path / "first", own, weights))
    added = photos(tmp_path, 11)
    computed = []
    decode = embed.DecodedImages.__getitem__
    monkeypatch.setattr(embed.DecodedImages, "__getitem__", lambda self, i: computed.append(i) or decode(self, i))
    earlier = [Result("embed", "key", "run", tmp_path / "first")]
    second = context(tmp_path, tmp_path / "second", own, weights, earlier=earlier)
    assert not embed.covers(second.settings, {}, tmp_path / "first")
    metrics = embed.run(second)
    assert len(computed) == metrics["embed/computed"] == 3
    assert embed.covers(second.settings, {}, tmp_path / "second")
    one, two = FeatureStore(tmp_path / "first"), FeatureStore(tmp_path / "second")
    assert torch.equal(one.get(refs), two.get(refs))
    live = live_features(own, weights).get(added)
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
    live = live_features(own, weights).get(refs)
    torch.testing.assert_close(FeatureStore(tmp_path / "out").get(refs), live, rtol=2e-3, atol=2e-3)
