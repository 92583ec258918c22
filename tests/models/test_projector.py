from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mmphi.errors import ModelError
from mmphi.models.projector import Projector, ProjectorConfig


@pytest.mark.parametrize("layers", [1, 2, 3, 8])
@pytest.mark.parametrize("norm", [False, True])
def test_saved_and_loaded_equals_in_memory(tmp_path, layers, norm):
    projector = Projector(ProjectorConfig(6, 10, layers, 7, "silu", norm))
    linear = [m for m in projector.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.in_features for m in linear] == [6, *[7] * (layers - 1)]
    assert linear[-1].out_features == 10
    projector.save(tmp_path)
    features = torch.randn(2, 3, 6).half()
    assert torch.equal(Projector.load(tmp_path)(features), projector(features))


def test_two_layers_are_llavas():
    projector = Projector(ProjectorConfig(6, 10))
    first, second = (m for m in projector.modules() if isinstance(m, torch.nn.Linear))
    features = torch.randn(4, 6)
    expected = F.gelu(features @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(projector(features), expected)


def test_dropout_before_every_layer_and_only_in_training():
    torch.manual_seed(0)
    projector = Projector(ProjectorConfig(600, 10, dropout=0.5))
    inputs: list[torch.Tensor] = []
    for layer in projector.layers:
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    features = torch.ones(40, 600)
    projector(features)
    assert 0.4 < float((inputs[0] == 0).float().mean()) < 0.6
    assert float((inputs[1] == 0).float().mean()) > 0.2
    assert torch.equal(inputs[0][inputs[0] > 0].unique(), torch.tensor([2.0]))
    projector.eval()
    assert torch.equal(projector(features), projector(features))
    assert torch.equal(inputs[2], features)


def test_arithmetic_is_fp32_even_under_autocast():
    projector = Projector(ProjectorConfig(6, 10))
    features = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = projector(features.bfloat16())
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, projector(features.bfloat16().float()), rtol=0, atol=0)


def test_another_width_is_refused_naming_both():
    projector = Projector(ProjectorConfig(6, 10))
    projector.check_fits(6, 10)
    with pytest.raises(ModelError, match="image features of width 6, not 8"):
        projector.check_fits(8, 10)
    with pytest.raises(ModelError, match="language model of width 10, not 12"):
        projector.check_fits(6, 12)


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        Projector.load(tmp_path)
    Projector(ProjectorConfig(6, 10)).save(tmp_path)
    weights = load_file(tmp_path / "projector.safetensors")
    weights["layers.0.bias"][1] = float("nan")
    save_file(weights, tmp_path / "projector.safetensors")
    with pytest.raises(ModelError, match=r"layers\.0\.bias is not finite"):
        Projector.load(tmp_path)
    (tmp_path / "projector.safetensors").write_bytes(b"\0" * 5)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Projector.load(tmp_path)
    (tmp_path / "projector.json").write_text(json.dumps({"input_width": 6, "output_width": 10, "heads": 2}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        Projector.load(tmp_path)


def test_projectors_of_one_seed_begin_alike_where_their_shapes_allow() -> None:
    def first(layers: int) -> torch.Tensor:
        torch.manual_seed(3)
        return Projector(ProjectorConfig(12, 32, layers=layers, width=20, norm=True)).layers[1].weight

    assert torch.equal(first(2), first(3))
    assert torch.equal(first(3), first(6))


@pytest.mark.parametrize("layers", [2, 3, 6])
@pytest.mark.parametrize("parameters", [500, 40_000, 1_000_000])
def test_width_that_comes_nearest_to_a_size(layers: int, parameters: int) -> None:
    config = ProjectorConfig(128, 128, layers=layers, norm=True)
    found = config.of_size(parameters)
    assert found.size() == sum(p.numel() for p in Projector(found).parameters())
    for width in (found.width - 1, found.width + 1):
        if width:
            other = replace(found, width=width)
            assert abs(other.size() - parameters) >= abs(found.size() - parameters)


def test_one_layer_has_no_width_to_choose() -> None:
    with pytest.raises(ModelError, match="no hidden width"):
        ProjectorConfig(12, 32, layers=1).of_size(1000)


def test_whitened_features_have_mean_0_and_spread_1_whatever_they_had(tmp_path):
    torch.manual_seed(0)
    scale, shift = torch.tensor([0.01, 1.0, 90.0, 0.0]), torch.tensor([5.0, -3.0, 400.0, 2.0])
    features = torch.randn(500, 3, 4) * scale + shift
    projector = Projector(ProjectorConfig(4, 8, whiten=True))
    projector.fit(part.half() for part in features.split(64))
    seen = []
    projector.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    projector(features)
    flat = seen[0].flatten(0, 1)
    torch.testing.assert_close(flat[:, 1:3].mean(0), torch.zeros(2), atol=1e-2, rtol=0)
    torch.testing.assert_close(flat[:, 1:3].std(0), torch.ones(2), atol=1e-2, rtol=0)
    assert float(flat[:, 3].abs().max()) < 1e-3  # A channel that never changes is not blown up.
    projector.save(tmp_path)
    assert torch.equal(Projector.load(tmp_path)(features), projector(features))


def test_an_unfitted_whitening_changes_nothing():
    torch.manual_seed(0)
    plain = Projector(ProjectorConfig(4, 8))
    torch.manual_seed(0)
    white = Projector(ProjectorConfig(4, 8, whiten=True))
    features = torch.randn(2, 3, 4)
    assert torch.equal(plain(features), white(features))
    assert [n for n, p in white.named_parameters()] == [n for n, p in plain.named_parameters()]
