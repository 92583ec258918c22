"""By run ids: what embeds anew, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmphi.config import DataSettings, SourceSettings, VisionSettings
from mmphi.config.projector import ProjectorSettings
from mmphi.data.features import FeatureStore, LiveFeatures
from mmphi.data.schema import ImageRef
from mmphi.models.vision.vision_encoder import load_vision_encoder
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Result
from mmphi.stages import STAGES, Settings
from mmphi.stages.embed import EmbedSettings


@pytest.fixture
def vision(own: str, weights: str) -> VisionSettings:
    return VisionSettings(model=own, pretrained=weights)


def photos(folder: Path, name: str, count: int, first: int = 0) -> SourceSettings:
    """A source of captions, with pictures of its own."""
    images = folder / name
    images.mkdir()
    rows = ["image,caption"]
    for i in range(first, first + count):
        torch.manual_seed(i)
        pixels = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(images / f"{i}.png")
        rows.append(f"{i}.png,a thing")
    (folder / f"{name}.csv").write_text("\n".join(rows))
    return SourceSettings(kind="captions", path=str(folder / f"{name}.csv"), images=str(images), name=name)


def test_embed_goes_by_tower_and_images_alone(empty_store: str, tmp_path: Path, vision: VisionSettings) -> None:
    one, two = photos(tmp_path, "one", 8), photos(tmp_path, "two", 5, first=6)  # Two pictures are in both.
    pipeline = Pipeline(STAGES)

    def embed(sources: list[SourceSettings], encoder: VisionSettings = vision, **data: int) -> Result:
        chosen = DataSettings(sources=sources, **{"validation_images": 1, "test_images": 1, **data})
        settings = Settings(data=chosen, vision=encoder, embed=EmbedSettings(workers=0, batch_size=4))
        return pipeline.build("embed", settings)

    first = embed([one])
    assert first.metrics["embed/computed"] == 8
    asked = one.model_copy(update={"question": "what?", "weight": 3.0})
    for sources, data in (
        ([one], {"split_seed": 7}),
        ([one], {"validation_images": 3, "test_images": 2}),
        ([one], {"max_images": 5}),
        ([one], {"max_answer_words": 9}),
        ([asked], {}),
        ([one.model_copy(update={"name": "renamed"})], {}),
    ):
        assert embed(sources, **data).run_id == first.run_id
    both = embed([one, two])
    assert both.run_id != first.run_id
    assert both.metrics["embed/computed"] == 3
    assert both.metrics["embed/images"] == 11
    assert embed([two]).run_id == embed([one]).run_id == both.run_id
    assert embed([one], vision.model_copy(update={"layer": -1})).metrics["embed/computed"] == 8
    assert embed([one], vision.model_copy(update={"pool": 2})).metrics["embed/computed"] == 8
    assert len(FeatureStore(both.path)) == 11


def test_limit_that_is_raised_embeds_the_new_images_alone(
    empty_store: str, tmp_path: Path, vision: VisionSettings
) -> None:
    source, pipeline = photos(tmp_path, "one", 9), Pipeline(STAGES)

    def computed(limit: int) -> float:
        chosen = DataSettings(sources=[source], validation_images=1, test_images=1, max_images=limit)
        settings = Settings(data=chosen, vision=vision, embed=EmbedSettings(workers=0))
        return pipeline.build("embed", settings).metrics["embed/computed"]

    assert computed(4) == 4
    assert computed(7) == 3
    assert computed(0) == 2


def test_force_embeds_everything_anew(empty_store: str, tmp_path: Path, vision: VisionSettings) -> None:
    source, pipeline = photos(tmp_path, "one", 4), Pipeline(STAGES)
    chosen = DataSettings(sources=[source], validation_images=1, test_images=1)
    settings = Settings(data=chosen, vision=vision, embed=EmbedSettings(workers=0))
    first = pipeline.build("embed", settings)
    forced = pipeline.build("embed", settings, force=True)
    assert forced.run_id != first.run_id
    assert forced.metrics["embed/computed"] == 4


def test_views_of_training_images_are_stored_beside_them_and_live_ones_are_the_same(
    empty_store: str, tmp_path: Path, vision: VisionSettings
) -> None:
    source, pipeline = photos(tmp_path, "one", 8), Pipeline(STAGES)

    def embed(views: int) -> Result:
        chosen = DataSettings(sources=[source], validation_images=1, test_images=1)
        settings = Settings(
            data=chosen, vision=vision, embed=EmbedSettings(workers=0), projector=ProjectorSettings(views=views)
        )
        return pipeline.build("embed", settings)

    assert embed(1).metrics["embed/computed"] == 8
    result = embed(3)
    assert result.metrics["embed/computed"] == 2 * 6  # Those held out are seen as they are.
    assert embed(2).run_id == result.run_id
    store = FeatureStore(result.path)
    live = LiveFeatures(load_vision_encoder(vision, torch.device("cpu")))
    seen = 0
    for path in sorted((tmp_path / "one").glob("*.png")):
        images = [ImageRef(path.name, path, view) for view in range(3)]
        if images[1] not in store:
            continue
        seen += 1
        stored = store.get(images)
        torch.testing.assert_close(stored, live.get(images), rtol=2e-3, atol=2e-3)
        assert not torch.allclose(stored[0], stored[1], atol=1e-2)
    assert seen == 6
