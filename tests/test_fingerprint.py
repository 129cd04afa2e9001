"""What a set is known again by: its images, classes and labels, not its place."""

import json
import shutil
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ogdm_jax.data import fingerprint, identity, open_source
from ogdm_jax.data.pictures import encode
from ogdm_jax.data.prepare import prepare

pytestmark = pytest.mark.fast


def _folder(root: Path, names: list[str]) -> Path:
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(np.full((4, 4, 1), k, np.uint8)))
    return root


def _marks(name: str, **more) -> dict:
    marks = fingerprint(open_source(name, **more))
    assert json.loads(json.dumps(marks)) == marks
    return marks


def test_place_and_memory_change_nothing(tmp_path):
    names = ["a/1.png", "a/2.png", "b/3.png"]
    first = _marks(f"folder:{_folder(tmp_path / 'x', names)}")
    assert first["images"] == 3 and first["class_names"] == ["a", "b"]
    assert first["contents"] and first["labels"]
    shutil.move(tmp_path / "x", tmp_path / "y")
    assert _marks(f"folder:{tmp_path}/y", memory_limit=0) == first
    assert identity.difference(first, first) == ""


def test_a_renamed_class_is_another_set(tmp_path):
    root = _folder(tmp_path, ["a/1.png", "b/2.png"])
    before = _marks(f"folder:{root}")
    (root / "b").rename(root / "0first")
    now = _marks(f"folder:{root}")
    assert "class 0 was 'a' and is '0first'" in identity.difference(before, now)
    (root / "0first").rename(root / "b")
    (root / "b" / "3.png").write_bytes((root / "b" / "2.png").read_bytes())
    assert "2 images, now 3" in identity.difference(before, _marks(f"folder:{root}"))


def test_the_form_of_unicode_changes_nothing(tmp_path):
    marks = []
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é/1.png")
        marks.append(_marks(f"folder:{_folder(tmp_path / form, [name])}")["contents"])
    assert marks[0] == marks[1]


def test_pixels_labels_and_members_are_told_apart(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 4, 4, 3), np.uint8), np.arange(6) % 3
    seen = []
    for k, (x, y) in enumerate([(images, labels), (images + 1, labels), (images, labels[::-1])]):
        np.savez(tmp_path / f"{k}.npz", image=x, label=y)
        seen.append(_marks(f"npz:{tmp_path}/{k}.npz"))
    assert identity.difference(seen[0], seen[1]) == "other files or pixels"
    assert identity.difference(seen[0], seen[2]) == "other labels"
    for k in range(2):
        with zipfile.ZipFile(tmp_path / f"{k}.zip", "w") as archive:
            archive.writestr("a.png", encode(images[k]))
    one, other = (_marks(f"zip:{tmp_path}/{k}.zip") for k in range(2))
    assert identity.difference(one, other) == "other files or pixels"


def test_records_are_known_by_their_files(tmp_path):
    name = prepare(open_source("digits"), tmp_path, shard_images=700)
    whole = _marks(name, data_dir=tmp_path)
    assert whole == _marks(name, data_dir=tmp_path, memory_limit=0) and whole["contents"]
    part = _marks(f"{name}/train[:10%]", data_dir=tmp_path)
    assert "1797 images, now 180" in identity.difference(whole, part)


def test_what_was_not_kept_is_no_difference():
    now = {"images": 3, "class_names": ["a"], "contents": "x", "labels": "y"}
    assert identity.difference({}, now) == ""
    assert identity.difference(now | {"contents": ""}, now) == ""
