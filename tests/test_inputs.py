"""What sampling measures and hides is read by the one reader of pictures, from files as they are."""

import shutil

import numpy as np
import pytest
from PIL import Image

from ogdm_jax.data import open_source
from ogdm_jax.inverse import tasks
from ogdm_jax.inverse.files import Classes, open_input, read_input

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


def test_mask_and_picture_are_cropped_alike(tmp_path):
    picture = np.zeros((8, 16), np.uint8)
    picture[:, 12:] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(255 - picture).save(tmp_path / "mask.png")
    assert open_input(str(tmp_path / "picture.png"), (8, 8, 1)).images.max() == 0
    assert mask_of(tmp_path / "mask.png", 8).min() == 1  # what it hides lies outside the crop


def test_a_mask_lies_as_its_picture_does(tmp_path):
    """One that was drawn over a picture on its side says nothing about the upright one."""
    Image.new("L", (16, 8), 9).save(tmp_path / "wide.png")
    for size, fits in (((16, 8), True), ((32, 16), True), ((8, 8), True), ((8, 16), False)):
        mask = np.full(size[::-1], 255, np.uint8)
        mask[: len(mask) // 2] = 0
        Image.fromarray(mask).save(tmp_path / "mask.png")
        read = lambda: read_input(
            str(tmp_path / "wide.png"), (8, 8, 1), 4, Classes(0), str(tmp_path / "mask.png")
        )
        if fits:
            assert len(read().values) == 1
        else:
            with pytest.raises(ValueError, match="mask.png' is 16 x 8 where a picture is 8 x 16"):
                read()


def test_classes_of_pictures_are_the_models_by_name(tmp_path):
    """The same number of classes, or fewer, says nothing of which they are."""
    model = Classes(3, ("ant", "bee", "cat"))
    for folders, expected in ((("bee", "cat"), [1, 2]), (("bee", "dog", "eel"), None)):
        for name in folders:
            (tmp_path / "x" / name).mkdir(parents=True)
            Image.new("L", (8, 8), 9).save(tmp_path / "x" / name / "1.png")
        labels = read_input(str(tmp_path / "x"), (8, 8, 1), 4, model).labels
        assert (None if labels is None else labels.tolist()) == expected
        shutil.rmtree(tmp_path / "x")
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8, 1), np.uint8), labels=np.arange(3))
    numbered = read_input(str(tmp_path / "x.npz"), (8, 8, 1), 4, model).labels
    assert numbered is not None and numbered.tolist() == [0, 1, 2]  # nameless: by number


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _rgba() -> Image.Image:
    pixels = np.full((8, 8, 4), (40, 40, 40, 255), np.uint8)
    pixels[:2, :2] = (200, 10, 10, 0)  # a colour under a transparent corner
    return Image.fromarray(pixels)


def _gradient() -> np.ndarray:
    return np.arange(64, dtype=np.uint8).reshape(8, 8) * 3


AS_PEOPLE_HAVE_THEM = {
    "turned.jpg": lambda path: Image.fromarray(_gradient()).save(path, quality=100, exif=_exif(6)),
    "mirrored.png": lambda path: Image.fromarray(_gradient()).save(path, exif=_exif(2)),
    "corner.png": lambda path: _rgba().save(path),
    "deep.png": lambda path: Image.fromarray(_gradient().astype("u2") * 257).save(path),
    "deep.tif": lambda path: Image.fromarray(_gradient().astype("u2") * 257).save(path),
    "palette.gif": lambda path: Image.fromarray(_gradient()).convert("P").save(path),
    "bit.png": lambda path: Image.fromarray(_gradient()).convert("1").save(path),
    "grey.png": lambda path: Image.fromarray(_gradient()).convert("LA").save(path),
    "colour.bmp": lambda path: Image.fromarray(_gradient()).convert("RGB").save(path),
    "print.jpg": lambda path: Image.fromarray(_gradient()).convert("CMYK").save(path),
    "wide.png": lambda path: Image.fromarray(np.hstack([_gradient()] * 2)).save(path),
}


@pytest.mark.parametrize("name", AS_PEOPLE_HAVE_THEM)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_that_of_its_folder(tmp_path, name, channels):
    folder = tmp_path / "folder"
    folder.mkdir()
    AS_PEOPLE_HAVE_THEM[name](folder / name)
    shape = (8, 8, channels)
    try:
        truth = open_source(f"folder:{folder}", None, 8, channels).images
    except ValueError as error:
        with pytest.raises(ValueError) as refused:
            open_input(str(folder / name), shape)
        for other in (refused.value, error):
            assert "has colour where grey images are expected; make it grey" in str(other)
        assert str(refused.value).endswith("make it grey")  # --channels is no option of sampling
        return
    assert truth.shape == (1, *shape)
    for where in (folder, folder / name):
        np.testing.assert_array_equal(open_input(str(where), shape).images, truth)


def test_upright_and_on_white(tmp_path):
    AS_PEOPLE_HAVE_THEM["turned.jpg"](tmp_path / "turned.jpg")
    found = open_input(str(tmp_path / "turned.jpg"), (8, 8, 1)).images[0, ..., 0].astype(int)
    assert abs(found - np.rot90(_gradient(), -1)).max() < 12
    AS_PEOPLE_HAVE_THEM["corner.png"](tmp_path / "corner.png")
    found = open_input(str(tmp_path / "corner.png"), (8, 8, 3)).images[0]
    assert (found[:2, :2] == 255).all() and (found[2:] == 40).all()
