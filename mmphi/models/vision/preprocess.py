"""open_clip's preprocessing in two halves: cutting to size, image by image, and scaling, batch by batch.

An image in bytes is a quarter of one in floats: what loader workers hand over, what is copied to an accelerator and
what is kept of decoded images. Scaling is arithmetic, which the encoder's device does best.
"""

from __future__ import annotations

from math import inf

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor

from mmphi.errors import ModelError

LONGEST_SIDE = 16  # Times the short side: longer images are cropped before they are enlarged.


class Preprocess:
    """From a PIL image to pixels (3, H, W) in bytes: resized, cropped and in RGB as open_clip does it, not yet scaled.

    open_clip enlarges the short side of an image to the input's size and crops the long one afterwards, so that a line
    of 1 x 60,000 pixels would take gigabytes meanwhile. Of images whose long side is more than :data:`LONGEST_SIDE`
    times the short one, the middle is taken first. Where the long side is fitted to the input instead, the limit is
    the input's size, under which nothing would be left of the short one.

    Args:
        config: open_clip's description of it.

    Raises:
        ModelError: If open_clip's transform does not end in ``ToTensor`` and ``Normalize``.
    """

    def __init__(self, config: PreprocessCfg) -> None:
        *cut, to_tensor, normalize = image_transform_v2(config, is_train=False).transforms
        if not (isinstance(to_tensor, ToTensor) and isinstance(normalize, Normalize)):
            raise ModelError(
                f"open_clip's preprocessing ends in {to_tensor} and {normalize}",
                "install the open_clip_torch of constraints.txt",
            )
        self.cut = Compose(cut)
        smallest = min(config.size) if isinstance(config.size, tuple | list) else config.size
        self.ratio = {"longest": float(smallest), "squash": inf}.get(config.resize_mode, float(LONGEST_SIDE))

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels (3, H, W), ``uint8``."""
        pixels: Tensor = pil_to_tensor(self.cut(self._bounded(image)))
        return pixels

    def _bounded(self, image: Image.Image) -> Image.Image:
        """The middle of an image whose sides differ more than they may."""
        longest = min(max(image.size), self.ratio * min(image.size))
        if longest == max(image.size):
            return image
        width, height = (min(side, round(longest)) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
