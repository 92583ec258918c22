"""open_clip's preprocessing in two steps: resizing and cropping per image, and scaling per batch.

A uint8 image takes a quarter of the memory of a float32 one, in transfers from loader workers, in copies to the
accelerator and in caches. Scaling runs on the encoder's device.
"""

from __future__ import annotations

from math import inf

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor

from mmphi.errors import ModelError

LONGEST_SIDE = 16  # Times the short side; longer images are cropped before resizing.


class Preprocess:
    """Resizes and crops a PIL image as open_clip does, to RGB pixels (3, H, W) in uint8 that are not yet scaled.

    open_clip resizes the short side of an image to the input size before it crops the long side, so that a line of
    1 x 60,000 pixels would take gigabytes. Images whose long side is more than :data:`LONGEST_SIDE` times the short one
    are therefore center-cropped first. In the resize mode ``longest`` the limit is the input size, beyond which no
    pixel of the short side would be left; ``squash`` has no limit.

    Args:
        config: open_clip's configuration of the preprocessing.

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
        """Center crop of an image whose aspect ratio exceeds the limit."""
        longest = min(max(image.size), self.ratio * min(image.size))
        if longest == max(image.size):
            return image
        width, height = (min(side, round(longest)) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
