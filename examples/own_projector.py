"""A custom projector, compared with the built-in one by the loss on the training images.

python examples/own_projector.py FOLDER_OR_HUB_NAME      a causal language model
"""

import sys

import torch
from own_encoder import COLORS, Patches, preprocess
from PIL import Image

import mmphi


class Gated(torch.nn.Module):
    """Features (..., D) to embeddings (..., W): a gated linear unit and a linear layer."""

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(input_width, 2 * output_width)
        self.outer = torch.nn.Linear(output_width, output_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.nn.functional.glu(self.inner(features)))


def main(language: str) -> dict[str, float]:
    pairs = [(Image.new("RGB", (32, 32), color), f"a {name} square") for name, color in COLORS.items()]
    parts = {"language": language, "vision": Patches(), "preprocess": preprocess, "max_length": 64}
    width = mmphi.join(**parts).language.width
    losses = {}
    for name, options in {"gated": {"projector": Gated(3, width)}, "mlp": {"layers": 2}}.items():
        model = mmphi.join(**parts, **options)
        model.fit(pairs, steps=20, batch_size=4, learning_rate=5e-3)
        losses[name] = model.loss(pairs)
        print(f"{name}: {losses[name]:.3f} nats per token")
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
