"""Folders and archives as people have them: which pictures are read, and what their classes are."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import unicodedata
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image, features

from ogdm_jax.data import SourceError, identity, listing, open_source
from ogdm_jax.data.prepare import prepare
from tests.support.sets import archive, encoded, folder, pixels

pytestmark = pytest.mark.fast


def _notes(source) -> str:
    return "; ".join(source.notes)


def test_hidden_and_system_files_are_no_images_and_no_classes(tmp_path, caplog):
    name = folder(
        tmp_path,
        [
            *("cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/._1.png"),
            *("cat/._1.png", "cat/.DS_Store", "dog/Thumbs.db", "@eaDir/1.png", "cat/.git/1.png"),
        ],
    )
    source = open_source(name)
    assert source.class_names == ("cat", "dog") and len(source) == 2
    assert "left out 7 hidden or system files" in _notes(source)
    assert f"{name}: left out 7" in caplog.text  # said, not only kept
    names = ["cat/1.png", "dog/1.png", "__MACOSX/cat/._1.png", "cat/.DS_Store", "dog/Thumbs.db"]
    packed = open_source(archive(tmp_path / "a.zip", names))
    assert packed.class_names == ("cat", "dog") and len(packed) == 2
    assert "left out 3 hidden or system files" in _notes(packed)


def test_a_hidden_folder_above_the_set_hides_nothing(tmp_path):
    assert len(open_source(folder(tmp_path / ".cache" / "set", ["a.png", "b.png"]))) == 2


def test_links_are_followed_and_end(tmp_path):
    name = folder(tmp_path / "set", ["dog/1.png", "dog/deep/2.png"])
    folder(tmp_path / "elsewhere", ["1.png", "2.png"])
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "eel").mkdir()
    (tmp_path / "set" / "eel" / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set" / "dog" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "dog" / "deep" / "round").symlink_to(tmp_path / "set" / "dog")
    (tmp_path / "set" / "dog" / "self.png").symlink_to("self.png")
    (tmp_path / "set" / "dog" / "lost.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "set" / "dog" / "pipe.png")
    source = open_source(name)
    assert source.class_names == ("cat", "dog", "eel")
    assert source.labels is not None and np.bincount(source.labels).tolist() == [2, 2, 1]
    assert "2 links to folders that are read already" in _notes(source)
    assert "3 links that lead nowhere" in _notes(source)


def test_folders_that_link_to_each_other_often_end_soon(tmp_path):
    """2^40 ways through 40 folders."""
    for k in range(40):
        (tmp_path / f"{k}").mkdir()
        for name in "ab":
            (tmp_path / f"{k}" / name).symlink_to(tmp_path / f"{k + 1}")
    folder(tmp_path / "40", ["1.png"])
    assert len(open_source(f"folder:{tmp_path}/0")) == 2  # once for each class, a and b


def test_every_picture_that_is_safely_read_is_read(tmp_path):
    kinds = "PNG JPEG WEBP BMP GIF TIFF PPM TGA ICO JPEG2000 PCX SGI".split()
    kinds += ["AVIF"] if features.check("avif") else []
    endings = {"JPEG": "jfif", "TIFF": "tif", "JPEG2000": "jp2"}
    files = {f"{k}.{endings.get(k, k)}": encoded(pixels(16, 16, 3), k) for k in kinds}
    files |= {"UPPER.JPG": encoded(kind="JPEG"), "wrong.png": encoded(kind="JPEG")}
    files |= {"none": encoded(), "odd.dat": encoded(kind="WEBP"), "words.txt": b"x" * 64}
    files |= {"old.png.bak": encoded(), "a.png~": encoded(), "x.heic": b"\0\0\0\x20ftypheic" * 9}
    source = open_source(folder(tmp_path / "set", files), resolution=8, channels=3)
    assert len(source) == len(kinds) + 4
    assert "left out 4 files that are no pictures" in _notes(source)
    assert "1 .bak" in _notes(source) and "1 .heic" in _notes(source)
    assert "reads 2 pictures of other endings ('none' first)" in _notes(source)
    packed = open_source(archive(tmp_path / "a.zip", files), resolution=8, channels=3)
    np.testing.assert_array_equal(packed.images, source.images)


def test_of_many_files_of_another_ending_few_are_looked_into(tmp_path, monkeypatch):
    name = folder(tmp_path, {"a.png": encoded()} | {f"{i}.txt": b"caption" for i in range(99)})
    looked = []
    monkeypatch.setattr("ogdm_jax.data.listing.is_picture", lambda head: looked.append(head))
    assert len(open_source(name)) == 1 and len(looked) == 16


def test_postscript_is_not_run(tmp_path):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(SourceError, match="a.png is no readable image \\(a PostScript file\\)"):
        open_source(folder(tmp_path, {"a.png": script}))
    assert len(open_source(folder(tmp_path / "b", {"a.eps": script, "b.png": encoded()}))) == 1


@pytest.mark.parametrize(
    "splits",
    [
        ("train", "val"),
        ("train", "test", "valid"),
        ("Test", "Train"),
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("train", "val", "cat"),
    ],
)
def test_splits_are_no_classes(tmp_path, splits):
    name = folder(tmp_path / "set", [f"{split}/{c}/1.png" for split in splits for c in ("a", "b")])
    train = next(split for split in splits if split.lower().startswith("train"))
    with pytest.raises(SourceError, match="splits.*no classes") as caught:
        open_source(name)
    shown = str(caught.value).split("open one of them: ")[1]
    assert shown == f"folder:{tmp_path}/set/{train}"
    assert open_source(shown).class_names == ("a", "b")  # the advice works
    with pytest.raises(SourceError, match="unpack it and open one of them"):
        open_source(archive(tmp_path / "a.zip", [f"top/{s}/a/1.png" for s in splits]))


def test_one_folder_is_one_class_and_said(tmp_path):
    source = open_source(folder(tmp_path, ["train/1.png", "train/2.png"]))
    assert source.notes == ("has one class only, the folder 'train'",)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    """A shell expands ~ at the beginning of a word only."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder(tmp_path / "images", ["a.png"])
    assert len(open_source("folder:~/images")) == 1


def test_number_folders_have_the_order_of_numbers(tmp_path):
    source = open_source(folder(tmp_path / "a", [f"{k}/x.png" for k in range(12)]))
    assert source.class_names == tuple(str(k) for k in range(12))
    assert source.labels is not None and sorted(source.labels.tolist()) == list(range(12))
    assert open_source(f"folder:{tmp_path}/a")[11]["label"] == 9  # files stay in their own order
    assert not source.notes
    gap = open_source(folder(tmp_path / "b", ["1/x.png", "3/x.png", "10/x.png"]))
    assert gap.class_names == ("1", "3", "10")
    assert "folder '1' is class 0" in _notes(gap)


def test_an_empty_class_folder_is_said(tmp_path):
    name = folder(tmp_path, ["ant/1.png", "cat/1.png"])
    folder(tmp_path, {"eel/words.txt": b"words"})
    (tmp_path / "bee").mkdir()
    source = open_source(name)
    assert source.class_names == ("ant", "cat")
    assert "2 sub-folders without pictures: no classes ('bee' first)" in _notes(source)


def test_one_folder_around_everything_is_no_class(tmp_path):
    files = ["top/set/cat/1.png", "top/set/dog/1.png", "top/set/dog/deep/2.png"]
    for source in (
        open_source(archive(tmp_path / "a.zip", files)),
        open_source(folder(tmp_path / "a", files)),
    ):
        assert source.class_names == ("cat", "dog") and source.labels is not None
        assert source.labels.tolist() == [0, 1, 1]
        assert "everything lies in 'top/set/'" in _notes(source)
        assert "1 pictures lie deeper" in _notes(source)


@pytest.mark.parametrize("above", ["a//", "/a/"])
def test_names_that_only_an_archive_has(above):
    """What all lie in is cut off by its own letters; an absolute name has no first folder."""
    names = [f"{above}{name}/1.png" for name in ("cat", "dog")]
    labels, found, _ = listing.classes("zip:x.zip", names, ())
    assert found == ("cat", "dog") and labels.tolist() == [0, 1]
    with pytest.raises(SourceError, match="both at its top"):
        listing.classes("zip:x.zip", ["/a/1.png", "b/2.png"], ())


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_classes_are_the_same_in_every_form_of_unicode(form):
    """Sorted as they are spelled, "kä" is behind "kz" in one form and before it in the other."""
    names = [unicodedata.normalize(form, f"{name}/1.png") for name in ("kz", "k\u00e4")]
    labels, found, notes = listing.classes("folder:x", names, [n.split("/")[0] for n in names])
    assert found == ("kz", "k\u00e4") and labels.tolist() == [0, 1] and not notes
    other = [unicodedata.normalize("NFD", name) for name in found]
    then, now = ({"images": 2, "class_names": [*names]} for names in (found, other))
    assert not identity.difference(then, now)


def test_files_have_one_order_in_every_form_of_unicode():
    """A Mac's copy of a folder was another data set: "f" is before "é" in one form alone."""
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, f"{name}.png") for name in ("é", "f", "e")]
        kept, _ = listing.pictures(names, lambda name: b"")
        found = [unicodedata.normalize("NFC", name) for name in kept]
        assert found == ["e.png", "f.png", "é.png"]


def test_an_archive_gives_what_its_folder_gives(tmp_path):
    files = {f"{c}/{k}.png": encoded() for c in ("b", "a") for k in range(3)}
    one, other = (
        open_source(folder(tmp_path / "x", files)),
        open_source(archive(tmp_path / "x.zip", files)),
    )
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.class_names == other.class_names == ("a", "b")


def test_pictures_at_the_top_and_in_folders_are_refused(tmp_path):
    for name in (
        folder(tmp_path / "x", ["a.png", "c/b.png"]),
        archive(tmp_path / "x.zip", ["a.png", "c/b.png"]),
    ):
        with pytest.raises(SourceError, match=r"both at its top \(a.png\) and in sub-folders"):
            open_source(name)


def test_names_are_matched_whatever_form_they_have(tmp_path):
    """./a.png, back slashes, absolute names, two forms of é; in the archive and in its table."""
    stored = ["./a.png", "b\\c.png", "/d.png", "../e.png", unicodedata.normalize("NFD", "é.png")]
    table = ["a.png", "b/c.png", "d.png", "./e.png", unicodedata.normalize("NFC", "é.png")]
    files = {name: encoded(np.full((4, 4), k, np.uint8)) for k, name in enumerate(stored)}
    name = archive(tmp_path / "a.zip", files, [[n, 10 + k] for k, n in enumerate(table)])
    for limit in (0, 1 << 20):
        source = pickle.loads(pickle.dumps(open_source(name, memory_limit=limit)))
        for item in (source[i] for i in range(5)):
            assert item["label"] == 10 + item["image"][0, 0, 0]


def test_a_table_in_the_folder_around_everything_is_read(tmp_path):
    table = json.dumps({"labels": [["00000/a.png", 1], ["00000/b.png", 0]]}).encode()
    files = {"data/00000/a.png": encoded(), "data/00000/b.png": encoded()}
    files |= {"data/dataset.json": table}
    for name in (archive(tmp_path / "a.zip", files), folder(tmp_path / "a", files)):
        source = open_source(name)
        assert source.labels is not None and source.labels.tolist() == [1, 0]


def test_edms_folders_without_a_table_are_no_classes(tmp_path):
    names = [f"{k // 2:05d}/img{k:08d}.png" for k in range(4)]
    for name in (archive(tmp_path / "a.zip", names), folder(tmp_path / "a", names)):
        source = open_source(name)
        assert source.num_classes == 0 and "no dataset.json" in _notes(source)


def test_prepare_keeps_the_names_of_classes(tmp_path):
    source = open_source(folder(tmp_path / "a", ["10/1.png", "9/1.png", "x y/1.png"]))
    for out in (tmp_path / "a.zip", tmp_path / "records"):
        name = prepare(source, out)
        again = open_source(name, data_dir=None if out.suffix else out)
        assert again.class_names == source.class_names == ("10", "9", "x y")
        np.testing.assert_array_equal(again.labels, source.labels)


def _twice(path, *contents: bytes) -> str:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        warnings.simplefilter("ignore")
        for content in contents:
            file.writestr("a.png", content)
    return f"zip:{path}"


def test_members_that_lie_twice(tmp_path):
    image = encoded()
    source = open_source(_twice(tmp_path / "a.zip", image, image))
    assert len(source) == 1 and "1 members lie twice" in _notes(source)
    with pytest.raises(SourceError, match="two different members a.png"):
        open_source(_twice(tmp_path / "b.zip", image, encoded()))


def _bad_archives(root) -> dict[str, str]:
    good = (root / "good.zip", archive(root / "good.zip", ["a.png", "b.png"]))[0].read_bytes()
    hidden, pages, twice, splits = (root / f"{k}.zip" for k in ("h", "p", "t", "s"))
    archive(hidden, [".DS_Store"])
    archive(pages, {"a.png": b"<html>"})
    _twice(twice, encoded(), encoded())
    archive(splits, ["train/a/1.png", "test/a/1.png"])
    locked = bytearray(good)
    at = locked.index(b"PK\x01\x02")
    locked[at + 8] |= 1
    other = bytearray(good)
    other[at + 10] = 9  # deflate64
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("inner.zip", good)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", encoded() + bytes(200 << 20))
    table = io.BytesIO()
    with zipfile.ZipFile(table, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", encoded())
        file.writestr("dataset.json", b" " * (100 << 20))
    folders = io.BytesIO()
    with zipfile.ZipFile(folders, "w") as file:
        file.mkdir("cat")
        link = zipfile.ZipInfo("cat/1.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "../../etc/passwd")
    lies = {}
    for key, at, value in (("count", 10, 9), ("size", 12, 2**31), ("place", 16, 2**31)):
        lie = bytearray(good)
        end = lie.index(b"PK\5\6")
        lie[end + at : end + at + (2 if at == 10 else 4)] = value.to_bytes(
            2 if at == 10 else 4, "little"
        )
        lies[key] = (bytes(lie), "no readable zip archive (cut short or damaged")
    del lies["count"]  # the directory itself says how many there are
    lies["place"] = (lies["place"][0], "a.png is no readable image (no member begins where")
    stored = bytearray(good)
    at = stored.index(b"PK\1\2")
    stored[at + 20 : at + 28] = b"\xff\xff\xff\x7f" * 2
    return lies | {
        "folders": (folders.getvalue(), "has no images (left out 1 links in the archive)"),
        "hidden": (hidden.read_bytes(), "has no images (left out 1 hidden or system files"),
        "stored": (bytes(stored), "a.png is no readable image"),
        "page in it": (pages.read_bytes(), "a.png is no readable image (an HTML page)"),
        "tar": (b"a.png" + bytes(600), "no readable zip archive (cut short or damaged"),
        "rar": (b"Rar!\x1a\7\0" + bytes(60), "no readable zip archive (cut short or damaged"),
        "zeros": (bytes(1000), "no readable zip archive (nothing but zeros)"),
        "twice": (twice.read_bytes(), "two different members a.png"),
        "splits": (splits.read_bytes(), "its sub-folders are splits"),
        "locked": (bytes(locked), "is encrypted (a.png asks for a password)"),
        "method": (bytes(other), "a.png is no readable image (That compression method"),
        "inner": (inner.getvalue(), "has no images (left out 1 files that are no pictures (1 .zip"),
        "cut": (good[:-30], "no readable zip archive (cut short or damaged: File is not"),
        "empty": (b"", "no readable zip archive (an empty file)"),
        "page": (b"<!DOCTYPE html><html>404</html>", "no readable zip archive (an HTML page)"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        "gzip": (b"\x1f\x8b" + bytes(99), "no readable zip archive (a gzip file)"),
        "bomb": (bomb.getvalue(), "a.png is no readable image (a file of 200 MB"),
        "table": (table.getvalue(), "dataset.json has 104857600 bytes for 1 images"),
    }


def test_archives_that_are_refused_say_why(tmp_path):
    for key, (content, words) in _bad_archives(tmp_path).items():
        (tmp_path / f"{key}.zip").write_bytes(content)
        with pytest.raises(SourceError) as caught:
            open_source(f"zip:{tmp_path}/{key}.zip")
        assert words in str(caught.value), (key, str(caught.value))
        assert f"zip:{tmp_path}/{key}.zip" in str(caught.value)


def test_a_large_archive_of_64_bit_places_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in "ab":
            with file.open(f"{name}.png", "w", force_zip64=True) as member:
                member.write(encoded())
    # the first member's extra field: 16 bytes of 64-bit sizes (what version the header says it
    # needs, Python 3.11 before .4 leaves at 20)
    at = 30 + len("a.png")
    assert (tmp_path / "a.zip").read_bytes()[at : at + 4] == struct.pack("<HH", 1, 16)
    assert len(open_source(f"zip:{tmp_path}/a.zip")) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    folder(tmp_path, ["cat/1.png", "dog/1.png"])
    (tmp_path / "dog").chmod(0)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    code = (
        "import os, sys; from ogdm_jax.data import open_source, SourceError\n"
        "import PIL.PngImagePlugin\n"
        "os.setuid(65534)\n"
        f"try: open_source('folder:{tmp_path}')\n"
        "except SourceError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"the folder '{tmp_path}/dog' cannot be read (Permission denied)" in run.stdout


def test_a_picture_of_several_frames_is_said(tmp_path):
    frames = [Image.fromarray(pixels()) for _ in range(3)]
    files = {"a.png": encoded()}
    for kind in ("GIF", "WEBP", "TIFF"):
        files[f"{kind}.{kind}"] = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    source = open_source(folder(tmp_path, files))
    assert len(source) == 4 and "takes the first of several frames of 3 images" in _notes(source)
    np.testing.assert_array_equal(source.images[1], np.asarray(frames[0]))  # the TIFF
