"""Pictures in pages: pixels of a PNG read back, forms of arrays, and what has no form."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from karikomi.report.pictures import SIDE, picture, png


def pixels(made: tuple[str, float] | None) -> np.ndarray:
    assert made is not None
    data = re.findall(r'base64,([^"]*)"', str(made[0]))[0]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_png_is_read_back() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 4)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(colours)))), colours)


def test_colours_of_images_whatever_their_layout() -> None:
    image = np.random.default_rng(0).random((8, 8, 3))
    image[0, 0], image[0, 1] = 0.0, 1.0
    last, first = (pixels(picture(a, 0, 0)) for a in (image, np.moveaxis(image, 2, 0)))
    np.testing.assert_array_equal(first, last)
    assert last[..., :3] == pytest.approx(255 * image, abs=1)
    assert (last[..., 3] == 255).all()


def test_signs_are_colours_and_sizes_are_shades() -> None:
    found = pixels(picture([[2.0, -1.0], [0.0, -2.0]], 0, 0, signed=True))
    assert found[0, 0].tolist() == [0, 114, 178, 255]
    assert found[0, 1].tolist() == [213, 94, 0, 128] and found[1, 1, 3] == 255
    assert found[1, 0, 3] == 0


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((64,), (SIDE, SIDE)),
        ((60,), (SIDE, 14.0)),
        ((2, 64), (SIDE, 28.0)),
        ((16, 8), (46.0, SIDE)),
    ],
)
def test_boxes(shape: tuple[int, ...], size: tuple[float, float]) -> None:
    made = picture(np.arange(np.prod(shape)).reshape(shape), 3, 4)
    assert made is not None and made[1] == size[1]
    assert f'width="{size[0]:g}" height="{size[1]:g}"' in made[0]


@pytest.mark.parametrize("shape", [(0,), (2, 3, 4, 5), (4, 5, 6), ()])
def test_what_has_no_form_has_no_picture(shape: tuple[int, ...]) -> None:
    assert picture(np.zeros(shape), 0, 0) is None


def test_a_flat_array_is_a_picture_too() -> None:
    assert (pixels(picture(np.full((4, 4), 7.0), 0, 0))[..., :3] == 0).all()
    assert (pixels(picture(np.zeros((4, 4)), 0, 0, signed=True))[..., 3] == 0).all()
