"""Linear layers with the weight first: the same sums."""

import pytest
import torch
from builders import tiny_language
from torch import nn

from mmphi.models.patches.cpu_linear import FEW
from mmphi.models.patches.module_patches import patched


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (FEW, 1), (FEW + 1, 2), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_gives_what_the_layer_gives(shape, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11, bias=bias))
    inputs = torch.randn(*shape, 7)
    expected = model(inputs)
    with patched(model, "decoding"):
        torch.testing.assert_close(model(inputs), expected)
        torch.testing.assert_close(model(inputs.transpose(0, -2)), expected.transpose(0, -2))


def test_few_rows_go_another_way_and_only_as_long_as_it_is_open(monkeypatch):
    model, told = nn.Sequential(nn.Linear(4, 4)), []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a: told.append(1) or real(*a))
    for _ in range(2):
        with patched(model, "decoding"):
            model(torch.ones(FEW, 4))
            model(torch.ones(FEW + 1, 4))
        model(torch.ones(2, 4))
    assert len(told) == 2


def test_a_whole_model_says_the_same():
    model = tiny_language().model
    ids = torch.randint(0, 250, (3, 5))
    with torch.inference_mode():
        expected = model(ids).logits
        with patched(model, "decoding"):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_of_another_kind_stay_as_they_are():
    class Own(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) + 1

    model = nn.Sequential(Own(3, 3))
    inputs = torch.ones(2, 3)
    expected = model(inputs)
    with patched(model, "decoding"):
        assert torch.equal(model(inputs), expected)
