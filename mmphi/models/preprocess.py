"""open_clip's preprocessing in two halves: cutting to size, image by image, and scaling, batch by batch.

An image in bytes is a quarter of one in floats: what loader workers hand over, what is copied to an accelerator and
what is kept of decoded images. Scaling is arithmetic, which the tower's device does best.
"""

from __future__ import annotations

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor

from mmphi.errors import ModelError


class Preprocess:
    """From a PIL image to pixels (3, H, W) in bytes: resized, cropped and in RGB as open_clip does it, not yet scaled.

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

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels (3, H, W), ``uint8``."""
        pixels: Tensor = pil_to_tensor(self.cut(image))
        return pixels
