"""Rounding, grids and files: what is written is what was meant."""

import numpy as np
import pytest
from PIL import Image

from ogdm_jax.data import pictures as report

pytestmark = pytest.mark.fast


def test_rounding_is_edms_and_inverts_the_way_images_enter():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(report.to_uint8(levels.astype(np.float32) / 127.5 - 1), levels)
    x = np.float32([-7, -1, -0.001, 0, 0.0039, 0.004, 1, 7])
    np.testing.assert_array_equal(report.to_uint8(x), np.clip(np.floor(x * 127.5 + 128), 0, 255))
    assert report.to_uint8(levels) is levels
    with pytest.raises(ValueError, match="NaN"):
        report.to_uint8(np.float32([np.nan]))


def test_grid_places_image_i_at_row_and_column():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    page = report.grid(images, columns=2)
    assert page.shape == (6, 6, 3) and page.dtype == np.uint8
    for i in range(5):
        row, column = divmod(i, 2)
        assert (page[2 * row : 2 * row + 2, 3 * column : 3 * column + 3] == i).all()
    assert (page[4:, 3:] == 255).all()
    assert report.grid(images).shape == (4, 9, 3)
    padded = report.grid(images, columns=2, padding=1, scale=2)
    assert padded.shape == (3 * 4 + 2, 2 * 6 + 1, 3)
    assert (
        (padded[5:9, 7:13] == 3).all() and (padded[4] == 255).all() and (padded[:, 6] == 255).all()
    )


@pytest.mark.parametrize(
    "images", [np.zeros((0, 2, 2, 1)), np.zeros((2, 2, 2)), np.zeros((2, 2, 2, 2))]
)
def test_grid_refuses_what_is_no_batch_of_images(images):
    with pytest.raises(ValueError, match="expected \\[n, h, w, c\\]"):
        report.grid(images)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_comes_back_bit_equal_and_the_folder_is_made(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    path = tmp_path / "new" / "image.png"
    report.save_png(path, image)
    with Image.open(path) as file:
        np.testing.assert_array_equal(np.asarray(file).reshape(image.shape), image)


def test_animation_holds_every_frame(tmp_path):
    frames = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(4)]
    for ending in ("webp", "gif"):
        report.save_animation(tmp_path / f"a.{ending}", frames)
        with Image.open(tmp_path / f"a.{ending}") as file:
            assert file.n_frames == 4
    with pytest.raises(ValueError, match="expected .webp, .gif or .png"):
        report.save_animation(tmp_path / "a.mp4", frames)
