"""Masks and kernels as people have them: read, fitted like the picture, or refused in a sentence."""

import io

import numpy as np
import pytest
from PIL import Image

from ogdm_jax.config import ConfigError
from ogdm_jax.data.pictures import fit
from ogdm_jax.inverse import given, operators, tasks

pytestmark = pytest.mark.fast

HOLE = np.ones((8, 8), np.uint8)
HOLE[2:6, 3:7] = 0


def _palette(path, colours):
    image = Image.fromarray(HOLE).convert("P")
    image.putpalette(colours)
    image.save(path)


def _with_alpha(path, grey, alpha):
    Image.merge("LA", [Image.fromarray(np.uint8(v)) for v in (grey, alpha)]).save(path)


GOOD = {
    "0 and 1.png": lambda path: Image.fromarray(HOLE).save(path),
    "0 and 255.png": lambda path: Image.fromarray(HOLE * 255).save(path),
    "16 bits.png": lambda path: Image.fromarray(HOLE.astype("u2") * 65535).save(path),
    "one bit.png": lambda path: Image.fromarray(HOLE * 255).convert("1").save(path),
    "palette.png": lambda path: _palette(path, [0, 0, 0, 255, 255, 255]),
    "grey palette.gif": lambda path: _palette(path, [9, 9, 9, 200, 200, 200]),
    "rgb.png": lambda path: Image.fromarray(HOLE * 255).convert("RGB").save(path),
    "lossy.jpg": lambda path: Image.fromarray(HOLE * 255).convert("RGB").save(path, quality=90),
    "opaque alpha.png": lambda path: _with_alpha(path, HOLE * 255, np.full((8, 8), 255)),
    "bool.npy": lambda path: np.save(path, HOLE.astype(bool)),
    "float.npy": lambda path: np.save(path, HOLE.astype(np.float64)),
    "half.npy": lambda path: np.save(path, HOLE.astype(np.float16)),
    "int64 0 and 255.npy": lambda path: np.save(path, HOLE.astype(np.int64) * 255),
    "minus one and one.npy": lambda path: np.save(path, HOLE * 2.0 - 1),
    "channel last.npy": lambda path: np.save(path, HOLE[..., None]),
    "channel first.npy": lambda path: np.save(path, HOLE[None]),
    "batch.npy": lambda path: np.save(path, HOLE[None, ..., None]),
    "three channels.npy": lambda path: np.save(path, np.repeat(HOLE[..., None], 3, -1)),
    "one array.npz": lambda path: np.savez(path, mask=HOLE),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_mask_hides_what_is_black(tmp_path, name):
    GOOD[name](tmp_path / name)
    task = tasks.make_task("inpaint", tasks.Settings(mask=str(tmp_path / name)), (8, 8, 1))
    mask = task.draw(np.arange(2))["mask"]
    assert mask.shape == (2, 8, 8, 1) and mask.dtype == np.float32
    np.testing.assert_array_equal(mask[0, ..., 0], HOLE)
    assert (mask[1] == 0).sum() == 16


def _colours(path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def _photo(path):
    pixels = np.linspace(60, 200, 64).reshape(8, 8)
    Image.fromarray(np.uint8(pixels)).save(path)


def _bytes(content: bytes):
    return lambda path: path.write_bytes(content)


def _png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(HOLE * 255).save(file, "PNG")
    return file.getvalue()


BAD = {
    "black.png": (lambda p: Image.new("L", (8, 8), 0).save(p), "hides all of its pixels"),
    "white.png": (lambda p: Image.new("L", (8, 8), 255).save(p), "hides none of its pixels"),
    "ones.png": (lambda p: Image.new("L", (8, 8), 1).save(p), "hides none of its pixels"),
    "zeros.npy": (lambda p: np.save(p, np.zeros((8, 8))), "hides all of its pixels"),
    "negative.npy": (lambda p: np.save(p, HOLE * 1.0 - 1), "hides all of its pixels"),
    "outside.png": (
        lambda p: Image.fromarray(np.repeat(np.uint8([255, 0, 0, 255]), 4)[None].repeat(8, 0)).save(
            p
        ),
        "hides all of its pixels inside the square",
    ),
    "alpha.png": (lambda p: _with_alpha(p, np.zeros((8, 8)), HOLE * 255), "transparent parts"),
    "white alpha.png": (lambda p: _with_alpha(p, HOLE * 255, HOLE * 255), "transparent parts"),
    "clear palette.png": (
        lambda p: Image.fromarray(HOLE).convert("P").save(p, transparency=0),
        "transparent parts",
    ),
    "colours.png": (_colours, "has colours"),
    "photo.png": (_photo, "has many greys"),
    "nan.npy": (lambda p: np.save(p, np.where(HOLE, 1.0, np.nan)), "NaN"),
    "words.npy": (lambda p: np.save(p, HOLE.astype(str)), "expected an array of numbers"),
    "objects.npy": (lambda p: np.save(p, HOLE.astype(object)), "no readable array"),
    "complex.npy": (lambda p: np.save(p, HOLE * 1j), "expected an array of numbers"),
    "empty.npy": (lambda p: np.save(p, HOLE[:0]), "expected an array of numbers"),
    "flat.npy": (lambda p: np.save(p, HOLE.ravel()), "has shape"),
    "channels first.npy": (lambda p: np.save(p, np.stack([HOLE] * 3)), "has shape"),
    "two masks.npy": (lambda p: np.save(p, np.stack([HOLE] * 2)[..., None]), "has shape"),
    "four channels.npy": (lambda p: np.save(p, np.stack([HOLE] * 4, -1)), "has shape"),
    "several.npz": (lambda p: np.savez(p, a=HOLE, b=HOLE), "holds the arrays a, b"),
    "text.npy": (_bytes(b"hello"), "no readable array"),
    "text.npz": (_bytes(b"hello"), "no readable array"),
    "cut.png": (_bytes(_png()[:50]), "no readable image"),
    "page.png": (_bytes(b"<!DOCTYPE html><html></html>"), "no readable image"),
    "nothing.png": (_bytes(b""), "no readable image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mask_that_says_nothing_clear_is_refused(tmp_path, name):
    write, words = BAD[name]
    write(tmp_path / name)
    with pytest.raises(ConfigError, match=f"^--task.mask: .*{words}"):
        tasks.make_task("inpaint", tasks.Settings(mask=str(tmp_path / name)), (8, 8, 1))


def test_a_mask_that_is_not_there_is_refused(tmp_path):
    for name in (tmp_path / "none.png", tmp_path, "ramdom"):
        with pytest.raises(ConfigError, match="--task.mask: .* given; expected random, box or"):
            tasks.make_task("inpaint", tasks.Settings(mask=str(name)), (8, 8, 1))


def test_a_mask_is_cropped_as_the_picture_is(tmp_path):
    path, seen = tmp_path / "mask.png", np.full((8, 16), 255, np.uint8)
    seen[:, 12:] = 0  # right of the square in the middle
    Image.fromarray(seen).save(path)
    assert given.mask(str(path), 8).min() == 1
    seen[:, 10:] = 0
    Image.fromarray(seen).save(path)
    for side in (4, 8, 16):
        mask = given.mask(str(path), side)
        np.testing.assert_array_equal(mask, fit(seen[..., None], side, nearest=True) / 255)
        assert mask.sum() == side * side * 6 / 8


def test_a_mask_is_turned_as_the_picture_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned clockwise
    upright = np.ones((8, 8), np.uint8)
    upright[:2] = 0
    Image.fromarray(np.rot90(upright) * 255).save(tmp_path / "mask.png", exif=exif)
    np.testing.assert_array_equal(given.mask(str(tmp_path / "mask.png"), 8)[..., 0], upright)


KERNEL = np.zeros((5, 5))
KERNEL[2] = [0, 51, 102, 51, 0]


@pytest.mark.parametrize("name", ["kernel.png", "kernel.npy", "kernel.npz"])
def test_a_kernel_of_a_file_blurs(tmp_path, name):
    path = tmp_path / name
    if name.endswith("png"):
        Image.fromarray(np.uint8(KERNEL)).save(path)
    else:
        (np.save if name.endswith("npy") else np.savez)(path, KERNEL)
    np.testing.assert_allclose(given.kernel(str(path)), KERNEL / 204)
    task = tasks.make_task("motion_deblur", tasks.Settings(kernel=str(path)), (8, 8, 1))
    drawn = task.draw(np.arange(2))  # the kernel is part of what was measured
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    truth = operators.motion_blur(KERNEL / 204).forward(x)
    np.testing.assert_allclose(task.operator(drawn).forward(x), truth, atol=1e-6)


@pytest.mark.parametrize(
    "values,words",
    [
        (np.ones((4, 4)), "4 x 4 x 1; expected a grey square with an odd side"),
        (np.ones((3, 5)), "3 x 5"),
        (np.zeros((3, 3)), "some of them positive"),
        (-KERNEL, "numbers from 0 up"),
        (np.random.default_rng(0).uniform(size=(3, 3, 3)), "expected a grey square"),
        (np.full((3, 3), np.nan), "NaN"),
    ],
)
def test_a_kernel_that_is_none_is_refused(tmp_path, values, words):
    np.save(tmp_path / "kernel.npy", values)
    with pytest.raises(ConfigError, match=f"^--task.kernel: .*{words}"):
        given.kernel(str(tmp_path / "kernel.npy"))


@pytest.mark.parametrize("task", ["motion_deblur", "nonlinear_deblur"])
def test_what_a_kernel_would_hide_is_refused(tmp_path, task):
    np.save(tmp_path / "kernel.npy", KERNEL)
    (tmp_path / "net.py").write_text("def f(x):\n    return x\n")
    both = {"kernel": str(tmp_path / "kernel.npy"), "blur": 5.0}
    with pytest.raises(ConfigError, match="^--task.blur: 5 given with --task.kernel"):
        tasks.make_task(task, tasks.Settings(**both), (8, 8, 1))
    if task == "nonlinear_deblur":
        for name in both:
            settings = tasks.Settings(network=f"{tmp_path}/net.py:f", **{name: both[name]})
            with pytest.raises(ConfigError, match=f"^--task.{name}: given with --task.network"):
                tasks.make_task(task, settings, (8, 8, 1))
