"""A projector between your own vision encoder and a language model, trained on images in memory.

python examples/own_encoder.py FOLDER_OR_HUB_NAME      a causal language model, such as HuggingFaceTB/SmolLM2-135M
"""

import sys

import numpy as np
import torch
from PIL import Image

import mmphi

COLORS = {"red": (200, 40, 40), "green": (40, 160, 40), "blue": (40, 60, 200), "yellow": (220, 200, 40)}


class Patches(torch.nn.Module):
    """The mean color of each of 4 x 4 patches: features (N, 16, 3)."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)


def preprocess(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 255


def main(language: str) -> None:
    model = mmphi.join(language=language, vision=Patches(), preprocess=preprocess, max_length=64)
    pairs = [(Image.new("RGB", (32, 32), color), f"a {name} square") for name, color in COLORS.items()]
    model.fit(pairs, validation=pairs, steps=40, batch_size=4, learning_rate=5e-3, eval_every=40)
    for image, text in pairs:
        print(f"{text}: {model.ask('', image, max_new_tokens=8)}")
    model.save_pretrained("own_encoder")
    again = mmphi.load("own_encoder", vision=Patches(), preprocess=preprocess)
    print(f"loss {model.loss(pairs):.3f} nats per token, of the loaded model {again.loss(pairs):.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
