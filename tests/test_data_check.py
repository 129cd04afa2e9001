"""`ogdm data check`, and what the other commands say of sets that are missing, broken or odd."""

import json
import struct
import zipfile
import zlib
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from ogdm_jax import config as configs
from ogdm_jax import models
from ogdm_jax.cli.data import main
from ogdm_jax.data import SourceError, batches, open_source
from ogdm_jax.data.prepare import prepare
from tests.support import tiny
from tests.support.sets import archive, encoded, folder, pixels

pytestmark = pytest.mark.fast


def _check(capsys, *words: str) -> tuple[int, dict]:
    code = main(["check", *words, "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def test_a_good_set(tmp_path, capsys):
    name = folder(tmp_path, [f"{c}/{k}.png" for c in ("a", "b") for k in range(3)])
    code, report = _check(capsys, name)
    assert code == 0 and not report["bad"] and not report["odd"] and not report["ignored"]
    assert report["images"] == report["readable"] == 6 and report["sizes"] == {"8x8": 6}
    assert report["class_names"] == ["a", "b"] and report["class_counts"] == [3, 3]
    assert main(["check", name]) == 0
    assert "images   6, of which 6 can be read" in capsys.readouterr().out
    assert _check(capsys, "digits")[0] == 0
    named = prepare(open_source("digits"), tmp_path / "records")
    code, report = _check(capsys, named, "--data-dir", str(tmp_path / "records"))
    assert code == 0 and report["class_counts"] == open_source_counts("digits")


def open_source_counts(name: str) -> list[int]:
    labels = open_source(name).labels
    assert labels is not None
    return np.bincount(labels).tolist()


def _odd_files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(pixels()) for _ in range(2)]
    grey16 = Image.fromarray((np.arange(64, dtype="u2") * 1000).reshape(8, 8))
    good = encoded()
    return {
        "a/good.png": good,
        "a/copy.png": good,
        "b/copy.png": good,
        "a/wide.png": encoded(pixels(8, 16, 3)),
        "a/turned.jpg": encoded(pixels(8, 4, 3), "JPEG", exif=exif),
        "a/hole.png": encoded(pixels(8, 8, 4)),
        "a/16.png": encoded(grey16),
        "a/palette.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "a/black.png": encoded(np.zeros((8, 8, 3), np.uint8)),
        "a/cmyk.jpg": encoded(Image.fromarray(pixels()).convert("CMYK"), "JPEG"),
        "a/large.png": encoded(
            np.arange(5000 * 3, dtype=np.uint32).astype(np.uint8).reshape(1, -1, 3)
        ),
        "notes.txt": b"words",
        ".DS_Store": b"x",
    }


def test_what_is_odd_or_left_out_is_counted(tmp_path, capsys):
    code, report = _check(capsys, folder(tmp_path, _odd_files()))
    odd = {row["what"]: (row["count"], row["first"][0]) for row in report["odd"]}
    assert code == 0 and report["readable"] == report["images"] == 11
    assert odd == {
        "copies of earlier ones": (2, "a/good.png"),
        "copies of earlier ones with another label": (1, "b/copy.png"),
        "of other sizes than 8x8: needs a resolution": (3, "a/large.png"),
        "of one colour": (1, "a/black.png"),
        "transparent: laid on white": (1, "a/hole.png"),
        "of 16 bits: scaled to 8": (1, "a/16.png"),
        "of several frames: the first is read": (1, "a/palette.gif"),
        "with a palette: read as RGB": (1, "a/palette.gif"),
        "CMYK: read as RGB without a profile": (1, "a/cmyk.jpg"),
        "turned by their EXIF data": (1, "a/turned.jpg"),
        "larger than 4096 pixels": (1, "a/large.png"),
    }
    assert len(report["ignored"]) == 2
    cropped = {
        row["what"] for row in _check(capsys, f"folder:{tmp_path}", "--resolution", "8")[1]["odd"]
    }
    assert {"not square: cropped", "smaller than 8 pixels: enlarged"} <= cropped
    assert not any("needs a resolution" in what for what in cropped)


def _bad_files() -> dict[str, tuple[bytes, str]]:
    good = encoded(pixels(16, 16, 3))
    return {
        "cut.png": (good[:60], "image file is truncated"),
        "half.jpg": (encoded(pixels(64, 64, 3), "JPEG")[:900], "truncated"),
        "empty.png": (b"", "an empty file"),
        "zeros.png": (bytes(500), "nothing but zeros"),
        "page.png": (b"\n <!DOCTYPE html><html>404</html>", "an HTML page"),
        "vector.png": (b"<svg xmlns='x'></svg>", "SVG pictures are not read"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
        "table.png": (b'{"labels": null}', "JSON"),
        "packed.png": (b"PK\x03\x04" + bytes(60), "a zip archive"),
        "noise.png": (np.random.default_rng(0).bytes(300), "of no format that is read"),
        "huge.png": (encoded(Image.new("1", (14000, 13000))), "182000000 of at most 178956970"),
        "claim.png": (_claim(good), "pixels and has"),
        "float.tif": (encoded(np.zeros((8, 8), np.float32), "TIFF"), "floating-point numbers"),
        "int.tif": (encoded(np.zeros((8, 8), np.int32), "TIFF"), "32-bit integers"),
        "cut.webp": (encoded(kind="WEBP")[:-30], "could not create decoder"),
        "cut.gif": (encoded(pixels(32, 32, 3), "GIF")[:300], "of no format that is read"),
        "cut.jp2": (encoded(pixels(32, 32, 3), "JPEG2000")[:150], "broken data stream"),
        "none.ppm": (b"P6 0 0 255\n", "of no format that is read"),
        "wide.ppm": (b"P6 99999 99999 255\n" + bytes(99), "is too large (9999800001 of"),
        "checksum.png": (good[:20] + b"\1" + good[21:], "of no format that is read"),
        "hole.png": (good[:50] + bytes(40) + good[90:], "broken data stream"),
        "no_pixels.png": (good[:33] + _END, "cannot load this image"),
        "loop.tif": (_LOOP, "of no format that is read"),
        "paper.png": (b"%PDF-1.4\n" + bytes(60), "a PDF document"),
    }


_END = b"\0\0\0\0IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
# A TIFF whose first directory is followed by itself.
_LOOP = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 4, 1, 10, 8)


@pytest.mark.default
def test_blank_pages_are_no_lies(tmp_path):
    """The densest files there are: 20 million white pixels in a few kilobytes."""
    page = Image.new("1", (4000, 5000), 1)
    files = {"a.png": encoded(page), "b.tif": encoded(page, "TIFF", compression="group4")}
    files |= {"c.gif": encoded(page, "GIF"), "d.webp": encoded(page.convert("RGB"), "WEBP")}
    files |= {"e.jpg": encoded(page.convert("L"), "JPEG", progressive=True)}
    assert len(files["b.tif"]) < 20_000_000 / 9000
    source = open_source(folder(tmp_path, files), resolution=4, channels=1)
    assert source.images is not None and source.images.min() == 255


def test_lab_colours_become_the_colours_that_they_are(tmp_path):
    """L 53, a 80, b 67 is the red of sRGB; Pillow holds a and b with 128 added."""
    red = Image.merge("LAB", [Image.new("L", (8, 8), level) for level in (136, 208, 195)])
    source = open_source(folder(tmp_path, {"a.tif": encoded(red, "TIFF")}))
    assert np.abs(source.images[0].astype(int) - (255, 0, 0)).max() < 30


def _claim(png: bytes) -> bytes:
    """A PNG whose header says of 9,000 x 9,000 pixels, with a right checksum."""
    head = png[12:16] + (9000).to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_every_bad_file_is_listed_with_its_reason(tmp_path, capsys, kind):
    bad = _bad_files()
    files = {name: content for name, (content, _) in bad.items()} | {"zz.png": encoded()}
    name = folder(tmp_path / "a", files) if kind == "folder" else archive(tmp_path / "a.zip", files)
    code, report = _check(capsys, name)
    found = {row["file"]: row["reason"] for row in report["bad"]}
    assert code == 1 and set(found) == set(bad) and report["readable"] == 1
    for file, (_, words) in bad.items():
        assert words in found[file], (file, found[file])
    assert main(["check", name]) == 1
    shown = capsys.readouterr().out
    assert all(f"bad      {file}: " in shown for file in sorted(bad)[:20])
    assert f"bad      and {len(bad) - 20} more (--json lists all)" in shown
    with pytest.raises(SourceError, match=r"checksum.png .*replace or remove it \(ogdm data check"):
        open_source(name)  # the first by name


def test_labels_that_are_bad_are_listed_too(tmp_path, capsys):
    name = archive(tmp_path / "a.zip", ["a.png", "b.png"], [["a.png", -5], ["b.png", 0]])
    code, report = _check(capsys, name)
    assert code == 1 and report["bad"][0]["file"] == "labels"
    assert report["bad"][0]["reason"].startswith("labels go from -5 to 0")


def test_colour_where_grey_is_wanted_is_bad(tmp_path, capsys):
    files = {"a.png": encoded(pixels(8, 8)), "b.png": encoded()}
    files["grey.png"] = encoded(np.repeat(pixels(8, 8, 1), 3, -1))
    name = folder(tmp_path, files)
    code, report = _check(capsys, name, "--channels", "1")
    assert code == 1 and [row["file"] for row in report["bad"]] == ["b.png"]
    assert "has colour where grey" in report["bad"][0]["reason"]
    assert _check(capsys, name)[0] == 0


@pytest.mark.parametrize("mode", ["RGB", "LA", "P", "RGBA", "1", "L"])
def test_grey_stored_as_colour_is_grey(tmp_path, mode):
    grey = Image.fromarray(pixels(8, 8))
    name = folder(tmp_path, {"a.png": encoded(grey.convert(mode))})
    source = open_source(name, channels=1)
    expected = np.asarray(grey.convert("1").convert("L") if mode == "1" else grey)
    np.testing.assert_array_equal(source.images[0, ..., 0], expected)
    folder(tmp_path, {"b.png": encoded()})
    with pytest.raises(SourceError, match="b.png.*has colour where grey images are expected"):
        open_source(name, channels=1)


def test_one_bad_file_of_a_streamed_set_is_named_with_what_lists_the_others(tmp_path):
    name = folder(tmp_path, [f"{k:02d}.png" for k in range(64)])
    bad = tmp_path / "40.png"
    bad.write_bytes(bad.read_bytes()[:60])
    stream = batches(open_source(name, memory_limit=0), 8, seed=0)
    with pytest.raises(SourceError, match=f"40.png .*ogdm data check {name} lists"):
        for _ in range(8):
            next(stream)
    stream.close()


@pytest.mark.parametrize(
    "shape, side", [((8, 16), 8), ((16, 8), 8), ((9, 9), 8), ((3, 3), 2), ((10, 30), 8)]
)
def test_a_size_that_does_not_fit_is_refused_with_what_to_give(tmp_path, shape, side):
    name = folder(tmp_path / "a", {"a.png": encoded(pixels(*shape, 3))})
    mult = "network.channel_mult=(1,2)" if side == 2 else "network.channel_mult=(1,1,1,1)"
    config = tiny.config(mult)
    with pytest.raises(configs.ConfigError) as caught:
        models.build(config, open_source(name).shape, 0)
    said = str(caught.value)
    assert "data.resolution" in said and "square images" in said
    assert f"{shape[1]} x {shape[0]}" in said and f"--config.data.resolution={side} " in said
    assert f"ogdm data prepare SOURCE --resolution {side} " in said
    assert ("fewer levels" in said) == (shape[0] == shape[1])
    assert models.build(config, open_source(name, resolution=side).shape, 0)  # the advice works
    assert main(["prepare", name, "--resolution", str(side), "--out", f"{tmp_path}/b.zip"]) == 0
    assert models.build(config, open_source(f"zip:{tmp_path}/b.zip").shape, 0)


def test_images_of_several_sizes_are_refused_with_what_to_give(tmp_path):
    name = folder(tmp_path, {"a.png": encoded(), "b.png": encoded(pixels(9, 12, 3))})
    with pytest.raises(SourceError, match=r"b.png\): is 12x9 where a.png is 8x8; crop and resize"):
        open_source(name)
    assert open_source(name, resolution=8).shape == (8, 8, 3)


def _words(root) -> list[str]:
    """Sources that cannot be opened."""
    (root / "file").write_bytes(b"x")
    (root / "empty").mkdir()
    np.save(root / "numbers.npy", np.arange(3))
    with zipfile.ZipFile(root / "numbers.npz", "w") as file:
        file.writestr("image.npy", b"x")
    np.save(root / "named.npz.npy", pixels(2, 4, 4, 3))
    return [
        "",
        ":",
        "folder",
        "folder:",
        "nothing:x",
        "FOLDER:x",
        f"folder:{root}/none",
        f"folder:{root}/file",
        f"folder:{root}/empty",
        f"folder:{root}/file/below",
        "folder:gs:/bucket/x",
        "folder:gopher://bucket/x",
        "folder:x\0y",
        f"zip:{root}",
        f"zip:{root}/file",
        f"zip:{root}/none.zip",
        f"npz:{root}",
        f"npz:{root}/file",
        f"npz:{root}/numbers.npy",
        f"npz:{root}/numbers.npz",
        f"npz:{root}/numbers.npz?a=1",
        f"cifar10:{root}",
        f"cifar10:{root}/file",
        f"tfds:{root}",
        "tfds:cifar10/x/y/z",
        f"folder:{'x' * 5000}",
    ]


@pytest.mark.parametrize("command", ["check", "describe", "prepare"])
def test_sources_that_cannot_be_opened_are_one_sentence(tmp_path, capsys, command):
    more = ["--out", f"{tmp_path}/out.zip"] if command == "prepare" else []
    for word in _words(tmp_path):
        assert main([command, word, "--data-dir", str(tmp_path), *more]) == 1, word
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error: ") and error.count("\n") == 1, (word, error)
        assert not (tmp_path / "out.zip").exists()


def test_an_npy_is_images(tmp_path):
    images = pixels(3, 4, 4, 3)
    np.save(tmp_path / "a.npy", images)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    np.testing.assert_array_equal(open_source(f"npz:{tmp_path}/a.npz").images, images)


def test_devices_that_do_not_start_are_one_sentence(monkeypatch, capsys):
    """As where a run holds the chips: the proposal is for them."""
    for error in (RuntimeError("the TPU is\nin use"), AssertionError()):
        monkeypatch.setattr("jax.devices", mock.Mock(side_effect=error))
        assert main(["describe", "digits"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: JAX starts no device of this machine: the ")
        assert said.count("\n") == 1 and "JAX_PLATFORMS=cpu" in said


def test_numbers_of_another_range_are_shown(tmp_path, capsys):
    """0 and 1 in uint8 are nearly black pictures; so are 12 bits in 16."""
    np.savez(tmp_path / "u.npz", images=np.eye(8, dtype=np.uint8)[None, :, :, None].repeat(3, 0))
    assert main(["describe", f"npz:{tmp_path / 'u.npz'}"]) == 0
    assert "values      0 to 1 of 0 to 255   nearly black" in capsys.readouterr().out
    np.savez(tmp_path / "flat.npz", images=np.full((3, 8, 8, 1), 128, np.uint8))
    assert main(["describe", f"npz:{tmp_path / 'flat.npz'}"]) == 0
    assert "0.00   all images are of one colour" in capsys.readouterr().out


def test_colours_that_are_grey_on_average_are_what_opening_says(tmp_path, capsys):
    """A check that looked at a small copy would find them grey."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[::2, :, 0] = image[1::2, :, 1:] = 200
    name = folder(tmp_path, {"a.png": encoded(image)})
    with pytest.raises(SourceError, match="has colour where grey images are expected"):
        open_source(name, channels=1)
    assert main(["check", name, "--channels", "1"]) == 1
    assert "has colour where grey" in capsys.readouterr().out
