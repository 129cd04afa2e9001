"""Pictures: what the one reader makes of people's files, rounding, grids, and what is written."""

import io

import numpy as np
import pytest
from PIL import Image

from ogdm_jax import pixels
from ogdm_jax.data import SourceError, open_pictures, open_source, pictures
from ogdm_jax.data.labels import class_words
from ogdm_jax.data.pictures import PictureError, decode, read, with_channels

pytestmark = pytest.mark.fast


def test_rounding_is_edms_and_inverts_the_way_images_enter():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pixels.to_uint8(levels.astype(np.float32) / 127.5 - 1), levels)
    x = np.float32([-7, -1, -0.001, 0, 0.0039, 0.004, 1, 7])
    np.testing.assert_array_equal(pixels.to_uint8(x), np.clip(np.floor(x * 127.5 + 128), 0, 255))
    assert pixels.to_uint8(levels) is levels
    with pytest.raises(ValueError, match="NaN"):
        pixels.to_uint8(np.float32([np.nan]))


def test_grid_places_image_i_at_row_and_column():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    page = pictures.grid(images, columns=2)
    assert page.shape == (6, 6, 3) and page.dtype == np.uint8
    for i in range(5):
        row, column = divmod(i, 2)
        assert (page[2 * row : 2 * row + 2, 3 * column : 3 * column + 3] == i).all()
    assert (page[4:, 3:] == 255).all()
    assert pictures.grid(images).shape == (4, 9, 3)
    padded = pictures.grid(images, columns=2, padding=1, scale=2)
    assert padded.shape == (3 * 4 + 2, 2 * 6 + 1, 3)
    assert (
        (padded[5:9, 7:13] == 3).all() and (padded[4] == 255).all() and (padded[:, 6] == 255).all()
    )


@pytest.mark.parametrize(
    "images", [np.zeros((0, 2, 2, 1)), np.zeros((2, 2, 2)), np.zeros((2, 2, 2, 2))]
)
def test_grid_refuses_what_is_no_batch_of_images(images):
    with pytest.raises(ValueError, match="expected \\[n, h, w, c\\]"):
        pictures.grid(images)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_comes_back_bit_equal_and_the_folder_is_made(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    path = tmp_path / "new" / "image.png"
    pictures.save_png(path, image)
    with Image.open(path) as file:
        np.testing.assert_array_equal(np.asarray(file).reshape(image.shape), image)


def test_animation_holds_every_frame(tmp_path):
    frames = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(4)]
    for ending in ("webp", "gif"):
        pictures.save_animation(tmp_path / f"a.{ending}", frames)
        with Image.open(tmp_path / f"a.{ending}") as file:
            assert file.n_frames == 4
    with pytest.raises(ValueError, match="expected .webp, .gif or .png"):
        pictures.save_animation(tmp_path / "a.mp4", frames)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_decode_modes():
    rgba = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    on_white = np.full((2, 2, 3), 255)
    np.testing.assert_array_equal(decode(encoded(rgba)), on_white)
    np.testing.assert_array_equal(decode(encoded(rgba.convert("LA"))), on_white)
    half = decode(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    np.testing.assert_array_equal(half, np.full((1, 1, 3), 127))
    grey = decode(encoded(Image.new("L", (3, 2), 7)))
    np.testing.assert_array_equal(grey, np.full((2, 3, 1), 7))
    np.testing.assert_array_equal(
        decode(encoded(Image.new("1", (3, 2), 1))), np.full((2, 3, 1), 255)
    )
    palette = Image.new("RGB", (2, 2), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(decode(encoded(palette)), np.broadcast_to([9, 8, 7], (2, 2, 3)))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    assert decode(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).shape == (4, 2, 3)


def test_what_turns_or_clears_a_picture_is_seen_wherever_it_stands():
    """The quick way past Pillow's copies is taken by plain pictures only."""
    image, exif, turned = random(4, 2, 3), Image.Exif(), {}
    exif[0x0112] = 6
    for kind in ("PNG", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(image).save(
            buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})
        )
        turned[kind] = buffer.getvalue()
    png = turned["PNG"]
    start = png.index(b"eXIf") - 4
    end = (
        start + 12 + int.from_bytes(png[start : start + 4])
    )  # length, name and checksum around the data
    rest = png[:start] + png[end:]
    for name in (b"IDAT", b"IEND"):  # before and behind the pixels
        at = rest.index(name) - 4
        turned[name] = rest[:at] + png[start:end] + rest[at:]
    for name, content in turned.items():
        np.testing.assert_array_equal(decode(content), np.rot90(image, -1), err_msg=str(name))
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2, 3), 7, np.uint8)).save(buffer, "PNG", transparency=(7, 7, 7))
    assert decode(buffer.getvalue()).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_to_eight(kind):
    wide = (np.arange(256, dtype="u2") * 257).reshape(16, 16)
    found = decode(encoded(Image.fromarray(wide), kind))
    np.testing.assert_array_equal(found[..., 0], np.arange(256).reshape(16, 16))
    between = np.array([[0, 128, 129, 32768, 65535]], "u2")  # rounded, not cut
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(between), kind))[..., 0], [[0, 0, 1, 128, 255]]
    )


def test_sixteen_bits_are_turned_and_cleared():
    wide, exif = np.array([[0, 257], [514, 771], [1028, 1285]], "u2"), Image.Exif()
    exif[0x0112] = 6
    found = decode(encoded(Image.fromarray(wide), exif=exif))[..., 0]
    np.testing.assert_array_equal(found, np.rot90([[0, 1], [2, 3], [4, 5]], -1))
    cleared = decode(encoded(Image.fromarray(wide), transparency=514))[..., 0]
    np.testing.assert_array_equal(cleared, [[0, 1], [255, 3], [4, 5]])


def test_what_is_no_picture_says_why(tmp_path):
    floats = Image.fromarray(np.zeros((2, 2), np.float32))
    for content, words in (
        (encoded(floats, "TIFF"), "holds floating-point numbers, expected 8 or 16 bits"),
        (encoded(Image.fromarray(np.zeros((2, 2), np.int32)), "TIFF"), "holds 32-bit integers"),
        (b"no picture", "is no readable image"),
        (encoded(Image.fromarray(random(9, 9, 3)))[:60], "is no readable image"),
    ):
        (tmp_path / "a.tif").write_bytes(content)
        with pytest.raises(PictureError, match=words):
            decode(content)
        with pytest.raises(PictureError, match=f"a.tif {words}"):
            read(tmp_path / "a.tif")
        with pytest.raises(SourceError, match=f"a.tif {words}.*; replace or remove it"):
            open_source(f"folder:{tmp_path}")
    with pytest.raises(PictureError, match="none.png is no readable image \\(No such file"):
        read(tmp_path / "none.png")


def test_a_picture_by_name_is_the_folder_of_that_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray((np.arange(256, dtype="u2") * 257).reshape(16, 16))
    hole = Image.fromarray(random(6, 6, 4))
    files = {
        "wide.png": (encoded(wide), 1),
        "turned.jpg": (encoded(Image.fromarray(random(8, 4, 3)), "JPEG", exif=exif), 3),
        "hole.png": (encoded(hole), 3),
        "grey.png": (encoded(Image.new("RGB", (4, 4), (9, 9, 9))), 1),
    }
    for name, (content, channels) in files.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(content)
        for resolution in (None, 3, 16):
            one = open_pictures(str(folder / name), resolution, channels)
            many = open_pictures(str(folder), resolution, channels)
            direct = open_source(f"folder:{folder}", None, resolution, channels)
            np.testing.assert_array_equal(one.images, many.images)
            np.testing.assert_array_equal(one.images, direct.images)
    assert open_pictures(str(tmp_path / "wide" / "wide.png")).images[0, 8, 8].tolist() == [136]
    with pytest.raises(SourceError, match="hole.png: has colour where grey"):
        open_pictures(str(tmp_path / "hole" / "hole.png"), channels=1)
    (tmp_path / "hole" / "hole.png").rename(tmp_path / "picture")  # no ending: it is a file
    assert open_pictures(str(tmp_path / "picture")).shape == (6, 6, 3)
    with pytest.raises(SourceError, match="is no file, folder or data source"):
        open_pictures(str(tmp_path / "nothing.png"))
    assert open_pictures("digits", 16).shape == (16, 16, 1)


def test_equal_channels_are_grey_and_colour_is_not():
    grey = random(4, 4, 1)
    np.testing.assert_array_equal(with_channels(np.repeat(grey, 3, -1), 1), grey)
    np.testing.assert_array_equal(with_channels(grey, 3), np.repeat(grey, 3, -1))
    with pytest.raises(PictureError, match="channels=3"):
        with_channels(random(4, 4, 3), 1)


def test_a_notebook_displays_what_show_returns():
    images = random(5, 8, 6, 3)
    shown = pictures.show(images, columns=2)
    np.testing.assert_array_equal(decode(shown._repr_png_()), pictures.sheet(images, 2))
    assert repr(shown) == f"<picture of {shown.pixels.shape[1]} x {shown.pixels.shape[0]} pixels>"
    for one in (images[0], images[0][..., :1], images[0][..., 0], images[0] / 127.5 - 1):
        assert pictures.show(one).pixels.shape[:2] == (8 * 8, 6 * 8)


def test_a_sheet_has_whole_pixels_words_and_space():
    images = random(12, 8, 8, 1)
    page = pictures.sheet(images, columns=6, captions=["7"] * 12, headings=["a", "b"], group=3)
    assert page.shape == (18 + 2 * (64 + 18) + 1, 6 * 65 - 1 + 14, 1)
    for number, at in ((0, 0), (3, 3 * 65 + 14), (8, 2 * 65)):
        top = 18 + (number // 6) * 83
        block = page[top : top + 64, at : at + 64, 0]
        np.testing.assert_array_equal(block, images[number, ..., 0].repeat(8, 0).repeat(8, 1))
    caption, gap = page[18 + 64 : 18 + 82, :64], page[:, 3 * 65 : 3 * 65 + 14]
    assert caption.min() < 100 and (gap == 255).all() and page[:18, 3 * 65 + 14 :].min() < 100


def test_words_fit_their_place():
    short, long = (
        pictures.sheet(random(1, 8, 8, 3), captions=[words])[64:] for words in ("cat", "cat" * 40)
    )
    for strip in (short, long):  # nothing of a letter is cut off by an edge
        assert strip.shape == (18, 64, 3) and (strip[:, 0] == 255).all() and (strip[0] == 255).all()
    assert (pictures.sheet(random(1, 8, 8, 4), captions=["a"])[64:, :, 3] == 255).all()
    with pytest.raises(ValueError, match="columns"):
        pictures.sheet(random(4, 8, 8, 1), columns=4, group=3)


def test_classes_have_their_names_or_numbers():
    labels = np.array([1, -1, 4])
    assert class_words(labels, ("cat", "dog")) == ["dog", "no class", "4"]
    assert class_words(labels) == ["1", "no class", "4"] and class_words(None) == []
