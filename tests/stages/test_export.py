"""A trained model exported by the pipeline, at a size that takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import small
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmphi.errors import ModelError
from mmphi.models.export.llava_check import QUESTIONS, check_pictures, compare_outputs, expected_outputs
from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES
from mmphi.stages.export import plain_model
from mmphi.tracking.run_writer import TrackingStore

pytestmark = pytest.mark.slow

LLAVA = {
    "light_clip__from_nothing": "vit",
    "projector__norm": "false",
    "projector__width": "0",
    "projector__layers": "2",
}


@pytest.fixture(scope="module")
def pipeline(small_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A store in which a small adapter of LLaVA's shape is exported already."""
    with small.built("export", small_chain, tmp_path_factory.mktemp("export"), **LLAVA) as pipeline:
        yield pipeline


def test_what_the_pipeline_exports_loads_in_transformers_and_is_the_adapters_model(pipeline: Pipeline) -> None:
    result = pipeline.build("export", small.settings(**LLAVA))
    assert 0 <= result.metrics["export/logit_difference"] < 1e-4
    adapter = pipeline.result("qlora", small.settings(**LLAVA)).path
    model, images = plain_model(adapter), check_pictures()
    loaded = LlavaForConditionalGeneration.from_pretrained(result.path, dtype="bfloat16").eval()
    processor = AutoProcessor.from_pretrained(result.path, use_fast=False)
    found = compare_outputs(loaded, processor, expected_outputs(model, images, QUESTIONS), images, QUESTIONS)
    assert found.tokens == 0
    assert found.logits == pytest.approx(result.metrics["export/logit_difference_bf16"], rel=0.05)
    card = (result.path / "README.md").read_text()
    assert pipeline.result("qlora", small.settings(**LLAVA)).run_id in card
    with safe_open(result.path / "model.safetensors", "pt") as weights:
        assert not weights.get_tensor("language_model.lm_head.bias").any()  # vLLM's Phi has one.
        assert "vision_tower.vision_model.pre_layrnorm.weight" in set(weights.keys())  # As published models have it.
        assert str(weights.get_tensor("language_model.lm_head.weight").dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("changes", "said_so"),
    [
        ({"projector__norm": "true"}, "normalises its input"),
        ({"vision__pool": "2"}, "does not pool patches"),
        ({"light_clip__from_nothing": "resnet"}, "is a resnet, but LLaVA requires a CLIP ViT"),
    ],
)
def test_what_has_no_counterpart_is_refused_before_anything_is_trained(
    empty_store: str, changes: dict[str, str], said_so: str
) -> None:
    with pytest.raises(ModelError, match=said_so):
        Pipeline(STAGES).build("export", small.settings(**{**LLAVA, **changes}))
    assert list(TrackingStore(empty_store).search()) == []


@pytest.mark.slow
def test_a_projector_of_another_width_inside_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ModelError, match="wide inside"):
        pipeline.build("export", small.settings(**{**LLAVA, "projector__width": "48"}))
