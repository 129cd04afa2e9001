"""Image sets that are arrays: what is read, and what is refused with what makes it readable."""

import io
import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest

from ogdm_jax import pixels as ranges
from ogdm_jax.data import SourceError, from_arrays, open_source
from tests.support.sets import encoded, pixels

pytestmark = pytest.mark.fast

GOOD = pixels(4, 6, 6, 3)
REFUSED = {
    "float01": (GOOD / 255, "float64", "np.rint(x * 255).astype(np.uint8)"),
    "float11": (GOOD / 127.5 - 1, "float64", "np.rint((x + 1) * 127.5).astype(np.uint8)"),
    "float255": (GOOD.astype(np.float32), "float32", "np.rint(x).astype(np.uint8)"),
    "half": ((GOOD / 255).astype(np.float16), "float16", "np.rint(x * 255)"),
    "uint16": (GOOD.astype(np.uint16) * 257, "uint16", "// 257).astype(np.uint8)"),
    "int64": (GOOD.astype(np.int64), "int64", "np.rint(x).astype(np.uint8)"),
    "bool": (GOOD > 127, "bool", "np.rint(x * 255).astype(np.uint8)"),
    "far": (GOOD.astype(np.int64) - 1000, "int64", "numbers from -1000 to "),
    "NaN": (np.full(GOOD.shape, np.nan), "float64", "numbers from nan to nan"),
    "first": (np.moveaxis(GOOD, -1, 1), "channels first", "np.moveaxis(x, 1, -1)"),
    "four": (pixels(4, 6, 6, 4), "(4, 6, 6, 4)", "with transparency"),
    "one": (GOOD[0], "(6, 6, 3)", "x[None]"),
    "five axes": (GOOD[None], "(1, 4, 6, 6, 3)", "expected [N,H,W,C]"),
    "flat": (GOOD.reshape(4, -1), "(4, 108)", "expected [N,H,W,C]"),
    "none": (GOOD[:0], "holds no images", ""),
    "no pixels": (GOOD[:, :0], "holds no images", ""),
    "texts": (np.array(["a.png", "b.png"]), "shape (2,)", ""),
    "objects": (np.array([None, {}], object), "array 'image' holds Python objects", ""),
}


@pytest.mark.parametrize("key", REFUSED)
def test_arrays_that_are_refused_say_what_to_do(tmp_path, key):
    images, words, remedy = REFUSED[key]
    with warnings.catch_warnings():
        np.savez(tmp_path / "a.npz", image=images)
    with pytest.raises(SourceError) as caught:
        open_source(f"npz:{tmp_path}/a.npz")
    assert words in str(caught.value) and remedy in str(caught.value), str(caught.value)


@pytest.mark.parametrize("key", ["float01", "float11", "float255", "uint16", "int64", "first"])
def test_what_is_advised_gives_the_images(key):
    x, _, _ = REFUSED[key]
    with pytest.raises(SourceError) as caught:
        from_arrays("x", x)
    recipe = str(caught.value).split("save ")[1].rpartition(")")[0]
    np.testing.assert_array_equal(from_arrays("x", eval(recipe, {"np": np, "x": x})).images, GOOD)


def test_arrays_that_are_read():
    assert from_arrays("x", GOOD[..., 0]).shape == (6, 6, 1)
    assert from_arrays("x", GOOD[..., :1]).shape == (6, 6, 1)
    assert len(from_arrays("x", GOOD[:1])) == 1
    grey = np.repeat(GOOD[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(from_arrays("x", grey, channels=1).images, GOOD[..., :1])
    big = np.asfortranarray(GOOD)
    np.testing.assert_array_equal(from_arrays("x", big).images, GOOD)


def test_other_arrays_of_a_file_are_named_and_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", image=GOOD, images=GOOD, extra=np.array([{}], object), seeds=[1])
    source = open_source(f"npz:{tmp_path}/a.npz")
    assert source.notes == ("reads no other arrays than 'image': images, extra",)


@pytest.mark.parametrize("content", [encoded(), pickle.dumps([1]), b"words " * 20])
def test_other_files_are_no_arrays(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(SourceError, match="no readable .npz of plain arrays \\(it does not begin"):
        open_source(f"npz:{tmp_path}/a.npz")


class _Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_pickles_are_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = np.array([_Evil()], object)
    for key in ("image", "label", "label_names"):
        np.savez(tmp_path / "a.npz", **({"image": GOOD} | {key: evil}))
        with pytest.raises(SourceError, match=f"array '{key}' holds Python objects"):
            open_source("npz:a.npz")
    np.save(tmp_path / "b.npy", evil, allow_pickle=True)
    with pytest.raises(SourceError, match="holds Python objects"):
        open_source("npz:b.npy")
    assert not (tmp_path / "executed").exists()


def _member(shape: str, data: bytes = b"") -> bytes:
    """An npz with one array whose header says of this shape."""
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    whole, array = io.BytesIO(), b"\x93NUMPY\x01\x00\x76\x00" + head.encode() + data
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr("image.npy", array)
    return whole.getvalue()


@pytest.mark.parametrize(
    "shape", ["(1000000000, 64, 64, 3)", "(4, -6, 6, 3)", "(4.5, 6, 6, 3)", "(1,) * 9", "None"]
)
def test_headers_that_lie_are_refused(tmp_path, shape):
    (tmp_path / "a.npz").write_bytes(_member(shape, bytes(432)))
    with pytest.raises(SourceError, match="is no readable .npz of plain arrays|expected"):
        open_source(f"npz:{tmp_path}/a.npz")
    (tmp_path / "a.npz").write_bytes(_member("(4, 6, 6, 3)", bytes(432)))
    assert len(open_source(f"npz:{tmp_path}/a.npz")) == 4


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 2), np.int32), np.ones((2, 2), bool), np.zeros((2, 2), np.uint16)],
    ids=["int32", "bool", "uint16"],
)
def test_numbers_of_an_unknown_range_are_no_images(images):
    for change in (ranges.to_uint8, ranges.to_float):
        with pytest.raises(ValueError, match=f"type {images.dtype}; expected uint8"):
            change(images)


def test_levels_as_floats_are_refused_and_samples_that_overshoot_are_clipped():
    with pytest.raises(ValueError, match="whole numbers from 0 to 255"):
        ranges.to_uint8(np.float32([0, 7, 255]))
    assert ranges.to_uint8(np.float32([-40.5, 0, 40.5])).tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="NaN"):
        ranges.to_uint8(np.float32([np.nan, 0]))
