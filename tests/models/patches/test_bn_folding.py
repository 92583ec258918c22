from __future__ import annotations

import copy

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from mmphi.config.shared import VisionSettings
from mmphi.models.patches.bn_folding import fold_batch_norms
from mmphi.models.vision.vision_encoder import VisionEncoder

RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1},
}


def lived_in(module: nn.Module) -> nn.Module:
    """The same with norms that have seen something."""
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.2)
            child.running_var.uniform_(0.5, 2)
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias, 0, 0.2)
    return module.eval()


@pytest.mark.parametrize(
    ("name", "count"), [("tf_efficientnet_lite0", 49), ("resnet18", 20), ("mobilenetv3_small_050", 34)]
)
@torch.no_grad()
def test_folded_is_the_same(name, count):
    model = lived_in(timm.create_model(name, pretrained=False, num_classes=0))
    image = torch.rand(2, 3, 64, 64)
    folded = copy.deepcopy(model)
    assert fold_batch_norms(folded, image) == count
    assert not any(isinstance(child, nn.BatchNorm2d) for child in folded.modules())
    torch.testing.assert_close(folded(image * 2), model(image * 2), rtol=1e-3, atol=1e-4)


def test_a_towers_features_are_those_of_open_clip(tmp_path):
    visual = lived_in(open_clip.CLIP(**RESNET).visual)
    visual.preprocess_cfg = {"size": 32}
    expected = copy.deepcopy(visual)
    settings = VisionSettings(model="RN50", pretrained="random", layer=-1)
    state = torch.get_rng_state()
    encoder = VisionEncoder(visual, settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(isinstance(child, nn.BatchNorm2d) for child in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    pixels = torch.randn(2, 3, 32, 32)
    last = expected.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"][-1]
    torch.testing.assert_close(encoder(pixels), last.flatten(2).transpose(1, 2).float(), rtol=1e-3, atol=1e-4)


class Awkward(nn.Module):
    """A convolution whose output is read before its norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, image: Tensor) -> Tensor:
        seen = self.conv(image)
        return self.norm(seen) + seen


class Twice(Awkward):
    """A convolution that is used twice."""

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.conv(image)) + self.conv(image.flip(-1))


@pytest.mark.parametrize("kind", [Awkward, Twice, lambda: nn.Conv2d(3, 4, 3)])
@torch.no_grad()
def test_what_cannot_be_folded_stays(kind):
    module, image = lived_in(kind()), torch.rand(1, 3, 8, 8)
    expected, names = module(image), [type(child) for child in module.modules()]
    assert fold_batch_norms(module, image) == 0
    assert [type(child) for child in module.modules()] == names
    assert torch.equal(module(image), expected)
