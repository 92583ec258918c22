"""Views of an image: by name alone, parts of it, some of them mirrored."""

import numpy as np
from PIL import Image

from mmphi.data.augmentation import AREA, augmented_image, augmented_name


def ramp(width=90, height=60):
    """Pixels that say where they are: red from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def test_the_image_itself_is_its_first_view():
    image = ramp()
    assert augmented_name("abc", 0) == "abc"
    assert augmented_image(image, "abc") is image


def test_a_name_is_one_view_and_others_are_others():
    image = ramp()
    names = [augmented_name("abc", view) for view in range(1, 9)] + [augmented_name("abd", 1)]
    seen = [augmented_image(image, name).tobytes() for name in names]
    assert len(set(seen)) == len(names)
    assert seen == [augmented_image(image, name).tobytes() for name in names]


def test_a_view_is_a_part_of_the_image_half_of_them_mirrored():
    image, mirrored, shares = ramp(), 0, []
    for view in range(1, 101):
        part = np.asarray(augmented_image(image, augmented_name("abc", view))).astype(int)
        across, down = np.diff(part[0, :, 0]), np.diff(part[:, 0, 1])
        assert set(down) == {1}
        assert set(across) in ({1}, {-1})
        mirrored += across[0] < 0
        shares.append(part.shape[0] * part.shape[1] / (90 * 60))
    assert 30 < mirrored < 70
    assert AREA[0] * 0.7 < min(shares) < 0.6  # A part that would stand out is cut off at the border.
    assert 0.85 < max(shares) <= 1


def test_the_smallest_image_has_views():
    assert augmented_image(ramp(1, 1), augmented_name("abc", 3)).size == (1, 1)
