"""`ogdm data prepare` that meets a bad file, is interrupted, or has no place to write."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ogdm_jax.cli import data as command
from ogdm_jax.data import Source, SourceError, open_source, prepare
from tests.support.sets import encoded, folder

pytestmark = pytest.mark.fast


def _set(root, count: int = 10) -> str:
    return folder(root, {f"{'ab'[k % 2]}/{k}.png": encoded() for k in range(count)})


def _out(root, kind: str) -> tuple[str, str, str | None]:
    """What --out is given, the name of the result, and its data_dir."""
    if kind == "zip":
        return f"{root}/out.zip", f"zip:{root}/out.zip", None
    return f"{root}/out", "tfds:set", f"{root}/out"


@pytest.mark.parametrize("kind", ["zip", "records"])
def test_a_bad_file_leaves_nothing_that_is_read(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 600)  # three images
    name, (out, result, place) = _set(tmp_path / "set"), _out(tmp_path, kind)
    bad = tmp_path / "set" / "b" / "7.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    for _ in range(2):
        assert command.main(["prepare", name, "--out", out]) == 1
        error = capsys.readouterr().err
        assert "b/7.png is no readable image" in error and error.count("error: ") == 1
        with pytest.raises(SourceError):
            open_source(result, place)
    bad.write_bytes(good)
    assert command.main(["prepare", name, "--out", out]) == 0
    np.testing.assert_array_equal(open_source(result, place).images, open_source(name).images)


@pytest.mark.parametrize("kind", ["zip", "records"])
def test_another_content_is_not_mixed_with_what_was_begun(tmp_path, monkeypatch, capsys, kind):
    """Interrupted, then every picture of the source is another one: none of the first ones stays."""
    monkeypatch.setattr(prepare, "SHARD_BYTES", 600)
    name, (out, result, place) = _set(tmp_path / "set"), _out(tmp_path, kind)
    item = Source.__getitem__

    def stop(self, i):
        if i == 8:
            raise KeyboardInterrupt
        return item(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "__getitem__", stop)
        assert command.main(["prepare", name, "--out", out]) == 130
    assert "the same command continues" in capsys.readouterr().err
    with pytest.raises(SourceError):
        open_source(result, place)
    for k, path in enumerate((tmp_path / "set").rglob("*.png")):
        path.write_bytes(encoded(np.full((8, 8, 3), k, np.uint8)))
    assert command.main(["prepare", name, "--out", out]) == 0
    np.testing.assert_array_equal(open_source(result, place).images, open_source(name).images)


def test_the_place_is_tried_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder.zip").mkdir()

    def never(*_args, **_more):
        raise AssertionError("the source was opened first")

    monkeypatch.setattr(command, "open_source", never)
    places = [f"{tmp_path}/file", f"{tmp_path}/file/x.zip", f"{tmp_path}/folder.zip", "s4://x/y"]
    places += ["/proc/nothing/x", "/proc/nothing/x.zip"] if os.path.isdir("/proc") else []
    for out in places:
        assert command.main(["prepare", "digits", "--out", out]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: --out: ") and error.count("\n") == 1, error


def test_a_plan_that_is_torn_is_one_sentence(tmp_path, capsys):
    parts = tmp_path / "out.zip.parts"
    parts.mkdir()
    (parts / "plan.json").write_text('{"source": "dig')
    assert command.main(["prepare", "digits", "--out", f"{tmp_path}/out.zip"]) == 1
    error = capsys.readouterr().err
    assert f"{parts} holds the unfinished work of another call; remove it" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["zip", "records"])
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tmp_path, capsys, kind):
    """A file system of 220 KB, then one with room."""
    room = tmp_path / "room"
    room.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220k", "tmpfs", room]).returncode:
        pytest.skip("needs the right to mount")
    try:
        out, result, place = _out(room, kind)
        words = ["prepare", "digits", "--out", out, *(["--name", "set"] if kind != "zip" else [])]
        assert command.main(words) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "no space left" in error.lower() and out in error, error
        with pytest.raises(SourceError):
            open_source(result, place)
        subprocess.run(["mount", "-o", "remount,size=9m", room], check=True)
        assert command.main(words) == 0
        assert len(open_source(result, place)) == 1797
    finally:
        subprocess.run(["umount", "-l", room], check=True)


def test_a_set_of_tfds_says_what_is_missing_where_it_was_uninstalled(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(SourceError, match="pip install tensorflow-datasets"):
        open_source("tfds:mnist/train")
