"""Every kind of projector of the registry, whatever is added to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmphi.config.projector import KIND_SETTINGS, ProjectorKind
from mmphi.errors import ModelError
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.models.projector_kinds import KINDS

SIDE, WIDTH, EMBEDDING = 4, 6, 10
TOKENS = {"mlp": 16, "pixel_shuffle": 4, "ldp_v2": 4, "resampler": 5}


def config(kind: Any, **changes: object) -> ProjectorConfig:
    options: dict[str, object] = {"width": 8, "input_tokens": SIDE * SIDE, "merge": 2, "queries": 5, **changes}
    return ProjectorConfig(WIDTH, EMBEDDING, kind=kind, **options)  # type: ignore[arg-type]  # Of every type.


def test_names_of_the_setting_are_those_of_the_registry() -> None:
    assert list(get_args(ProjectorKind)) == list(KINDS)
    assert set(TOKENS) == set(KINDS)
    assert {name for layers in KINDS.values() for name in layers.uses} == set(KIND_SETTINGS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"norm": True, "whiten": True, "layers": 3}])
def test_images_become_their_number_of_tokens_however_they_are_given(
    kind: ProjectorKind, changes: dict[str, object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    projector = Projector(config(kind, **changes)).eval()
    images = torch.randn(3, SIDE * SIDE, WIDTH).half()
    projected = projector(images)
    assert projected.shape == (3, TOKENS[kind], EMBEDDING)
    assert projector.output_tokens(SIDE * SIDE) == TOKENS[kind]
    assert projector.feature_rows(3 * TOKENS[kind]) == 3 * SIDE * SIDE
    torch.testing.assert_close(projector(images.flatten(0, 1)), projected.flatten(0, 1))
    torch.testing.assert_close(projector(images[1:2]), projected[1:2])  # No image changes another one.
    assert projector(torch.zeros(0, WIDTH)).shape == (0, EMBEDDING)  # A pack without images.
    projector.save(tmp_path)
    assert torch.equal(Projector.load(tmp_path).eval()(images), projected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_is_counted(kind: ProjectorKind) -> None:
    projector = Projector(config(kind, norm=True))
    projector(torch.randn(2, SIDE * SIDE, WIDTH)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters() if p.dim() > 1)
    assert projector.config.size() == sum(p.numel() for p in projector.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_is_met_by_the_width(kind: ProjectorKind) -> None:
    wanted = 4 * config(kind).size()
    assert config(kind).of_size(wanted).size() == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_scaled_by_the_factor(kind: ProjectorKind) -> None:
    projector = Projector(config(kind)).eval()
    images = torch.randn(2, SIDE * SIDE, WIDTH)
    before = projector(images)
    projector.scale_output(3.0)
    torch.testing.assert_close(projector(images), 3 * before)


def test_pixel_shuffle_is_a_projection_of_each_square_with_all_its_features() -> None:
    projector = Projector(config("pixel_shuffle", layers=1))
    images = torch.randn(1, SIDE * SIDE, WIDTH)
    grid = images.view(SIDE, SIDE, WIDTH)
    (linear,) = (module for module in projector.modules() if isinstance(module, nn.Linear))
    for token in range(4):
        row, column = 2 * (token // 2), 2 * (token % 2)
        square = torch.cat([grid[row, column], grid[row, column + 1], grid[row + 1, column], grid[row + 1, column + 1]])
        torch.testing.assert_close(projector(images)[0, token], F.linear(square, linear.weight, linear.bias))


def test_ldp_v2_without_its_convolution_is_the_mean_of_each_square() -> None:
    projector = Projector(config("ldp_v2"))
    for parameter in projector.layers.position.parameters():
        nn.init.zeros_(parameter)
    images = torch.randn(1, SIDE * SIDE, WIDTH)
    embeddings = projector.layers.mlp(images).view(SIDE, SIDE, EMBEDDING)
    expected = torch.stack([embeddings[r : r + 2, c : c + 2].mean((0, 1)) for r in (0, 2) for c in (0, 2)])
    torch.testing.assert_close(projector(images)[0], expected)


@pytest.mark.parametrize("kind", ["pixel_shuffle", "ldp_v2"])
def test_what_is_no_grid_is_refused(kind: ProjectorKind) -> None:
    with pytest.raises(ModelError, match="17 features per image are not a square grid"):
        Projector(config(kind, input_tokens=17))
    with pytest.raises(ModelError, match=r"merge = 3 does not divide the grid of 4 x 4(.|\n)*use 1, 2, 4"):
        Projector(config(kind, merge=3))
    with pytest.raises(ModelError, match=r"nothing to merge(.|\n)*kind = mlp"):
        Projector(config(kind, input_tokens=1))


def test_another_number_of_features_is_refused() -> None:
    with pytest.raises(ModelError, match="trained for 16 features per image, not 25"):
        Projector(config("resampler")).output_tokens(25)
    assert Projector(config("mlp")).output_tokens(25) == 25
    for features in (torch.zeros(2, 8, WIDTH), torch.zeros(40, WIDTH)):
        with pytest.raises(ModelError, match="trained for 16 features per image"):
            Projector(config("resampler"))(features)


def test_a_size_below_the_smallest_is_refused() -> None:
    with pytest.raises(ModelError, match="the smallest projector of kind ldp_v2 has"):
        config("ldp_v2").of_size(10)
    for kind in ("mlp", "pixel_shuffle", "ldp_v2"):
        with pytest.raises(ModelError, match="no hidden width"):
            config(kind, layers=1).of_size(500)


def test_a_kind_of_a_newer_version_is_named(tmp_path: Path) -> None:
    Projector(config("resampler")).save(tmp_path)
    file = tmp_path / "projector.json"
    file.write_text(file.read_text().replace('"resampler"', '"of_tomorrow"'))
    with pytest.raises(ModelError, match=r"unknown projector kind of_tomorrow(.|\n)*update mmphi"):
        Projector.load(tmp_path)


@pytest.mark.parametrize("page", ["how-to/python-library", "explanation/glossary"])
def test_every_kind_is_documented(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text()
    assert all(f"`{kind}`" in text for kind in KINDS)
