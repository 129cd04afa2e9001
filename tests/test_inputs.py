"""What sampling measures and hides is read by the one reader of pictures, from files as they are."""

import numpy as np
import pytest
from PIL import Image

from ogdm_jax.data import open_source
from ogdm_jax.inverse import tasks
from ogdm_jax.inverse.files import open_input

pytestmark = pytest.mark.fast


def mask_of(path, side: int) -> np.ndarray:
    task = tasks.make_task("inpaint", tasks.Settings(mask=str(path)), (side, side, 1))
    return task.draw(np.arange(2))["mask"]


def test_a_sixteen_bit_picture_is_that_of_its_folder(tmp_path):
    wide = (np.arange(256, dtype="u2") * 257).reshape(16, 16)
    Image.fromarray(wide).save(tmp_path / "a.png")
    one = open_input(str(tmp_path / "a.png"), (16, 16, 1))
    assert one.images[0, 8, 8] == 136
    np.testing.assert_array_equal(one.images, open_source(f"folder:{tmp_path}").images)
    np.testing.assert_array_equal(one.images, open_input(str(tmp_path), (16, 16, 1)).images)


def test_colour_is_not_measured_by_a_grey_model(tmp_path):
    Image.new("RGB", (8, 8), (9, 3, 1)).save(tmp_path / "a.png")
    for where in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(ValueError, match="^--input: .*has colour where grey images"):
            open_input(str(where), (8, 8, 1))


def test_a_mask_of_zeros_and_ones_hides_its_zeros(tmp_path):
    seen = np.ones((8, 8), np.uint8)
    seen[1:5, 2:6] = 0
    Image.fromarray(seen).save(tmp_path / "mask.png")
    mask = mask_of(tmp_path / "mask.png", 8)
    assert mask.shape == (2, 8, 8, 1) and (mask[0] == 0).sum() == 16
    np.testing.assert_array_equal(mask[1, ..., 0], seen)


def test_mask_and_picture_are_cropped_alike(tmp_path):
    picture = np.zeros((8, 16), np.uint8)
    picture[:, 12:] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(255 - picture).save(tmp_path / "mask.png")
    assert open_input(str(tmp_path / "picture.png"), (8, 8, 1)).images.max() == 0
    assert mask_of(tmp_path / "mask.png", 8).min() == 1  # what it hides lies outside the crop


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_mask_that_says_nothing_is_refused(tmp_path, value):
    Image.new("L", (8, 8), value).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="mask.png hides (all|none) of its pixels"):
        mask_of(tmp_path / "mask.png", 8)
