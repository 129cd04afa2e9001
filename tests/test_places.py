"""Paths in buckets: the same run, samples and figures as in a local folder; a place that cannot be
used is refused.
"""

import errno
import json
import os
import subprocess
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from ogdm_jax import data, places
from ogdm_jax.cli import evaluate as scoring
from ogdm_jax.data import SourceError, files, pictures
from ogdm_jax.data.base import read_many
from ogdm_jax.data.prepare import prepare
from ogdm_jax.data.sources import source_name
from ogdm_jax.interop import export
from ogdm_jax.interop.torch_state import read_torch
from ogdm_jax.metrics.statistics import load_statistics
from ogdm_jax.training import evaluations, logs, loop
from ogdm_jax.training.checkpoint import complete
from ogdm_jax.training.workdir import open_workdir
from tests.support import bucket as buckets
from tests.support import tiny
from tests.support.commands import entry


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    return buckets.install(tmp_path, monkeypatch)


def settings(steps: int):
    more = (
        f"train.duration={steps} steps",
        "train.save_every=2 steps",
        "sample.every=2 steps",
        "log.every=2 steps",
    )
    more += (
        "methods=",
        "evaluate.features=digits",
        "evaluate.num=40",
        "log.tensorboard=true",
        "train.keep=2",
    )
    more += (
        "parallel.devices=1",
    )  # among several, the order of sums is not fixed, and equal would not be equal
    return tiny.config(*tiny.SMALLEST, *more)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_in_a_folder(bucket, tmp_path):
    """Trained, resumed, evaluated, sampled and profiled, number for number; nothing lands in a
    local folder gs:.
    """
    uri, folder = "gs://bucket/runs/tiny", str(tmp_path / "local")
    loop.train(settings(4), uri, log=lambda _: None, profile=(2, 3))
    loop.train(settings(6), uri, log=lambda _: None)
    loop.train(settings(6), folder, log=lambda _: None)
    there, here = (open_workdir(where) for where in (uri, folder))
    assert there.step == here.step == 6
    tiny.assert_trees(there.params, here.params)
    assert complete(uri) == complete(folder) == [4, 6]  # train.keep=2: removed there, too
    assert evaluations.read(uri)[6] == evaluations.read(folder)[6]
    names = lambda root: {
        str(p.relative_to(root)).split("events")[0] for p in Path(root).rglob("*.*")
    }
    mine = {
        name
        for name in names(bucket / "runs" / "tiny")
        if "checkpoints" not in name and "profile" not in name
    }
    assert mine == {
        name for name in names(folder) if "checkpoints" not in name and "profile" not in name
    }
    assert list((bucket / "runs" / "tiny" / "profile").rglob("*.xplane.pb"))
    lines = (bucket / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [
        2,
        4,
        4,
        6,
        6,
    ]  # each end has the evaluation's line, too
    assert not Path("gs:").exists()

    done = entry(
        tmp_path,
        "sample.py",
        "--workdir",
        uri,
        "--num",
        "3",
        "--steps",
        "2",
        "--out",
        "gs://bucket/a/b.npz",
    )
    assert done.returncode == 0 and "to gs://bucket/a/b.npz" in done.stdout, done.stderr
    with np.load(bucket / "a" / "b.npz") as archive:
        assert archive["images"].shape == (3, 8, 8, 1)


def test_a_log_in_a_bucket_is_copied_again_after_a_failure_and_seldom_where_that_takes_long(
    bucket, monkeypatch, caplog
):
    clock, copies = [0.0], []

    def mirror(*_):
        copies.append(clock[0])
        clock[0] += 2.0
        if len(copies) == 1:
            raise OSError("503")

    monkeypatch.setattr(places, "mirror", mirror)
    monkeypatch.setattr(logs.time, "monotonic", lambda: clock[0])
    with logs.Writer(places.place("gs://bucket/run"), False, True) as writer:
        for step in range(400):
            clock[0] += 1
            writer.write(step, {"loss": 1.0})
        assert 3 <= len(copies) <= 5  # 2 % of 400 seconds are four
    assert "is not copied to gs://bucket/run" in caplog.text and "503" in caplog.text


def test_images_of_an_archive_in_a_bucket_are_read_at_once_by_one_request_each(bucket, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    with zipfile.ZipFile(bucket / "set.zip", "w") as archive:
        for i, image in enumerate(images):
            archive.writestr(f"{i}.png", pictures.encode(image))
    reader = files.open_zip("zip:gs://bucket/set.zip", "gs://bucket/set.zip").reader
    real, asked, all_asked = LocalFileSystem.cat_file, [], threading.Barrier(4, timeout=30)

    def cat_file(self, path, start=None, end=None, **more):
        asked.append((start, end))
        all_asked.wait()
        return real(self, path, start, end, **more)

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    found = [image for image, _ in read_many(reader, [3, 1, 0, 2])]
    np.testing.assert_array_equal(found, images[[3, 1, 0, 2]])
    assert len(asked) == 4


def test_sources_and_reports_in_a_bucket(bucket, tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 1), np.uint8)
    labels = np.arange(12) % 2
    np.savez(bucket / "set.npz", image=images, label=labels)
    for i, image in enumerate(images):
        pictures.save_png(places.place(f"gs://bucket/folder/{labels[i]}/{i:06d}.png"), image)
    pictures.save_png(places.place("gs://bucket/grids/grid.png"), pictures.sheet(images))
    with Image.open(bucket / "grids" / "grid.png") as picture:
        assert picture.size[0] > 4 * 8
    prepare(data.open_source("npz:gs://bucket/set.npz"), tmp_path / "set.zip")
    (bucket / "set.zip").write_bytes((tmp_path / "set.zip").read_bytes())
    for name in ("npz:gs://bucket/set.npz", "zip:gs://bucket/set.zip"):
        source = data.open_source(name)
        np.testing.assert_array_equal(source.take(np.arange(12))["image"], images)
        np.testing.assert_array_equal(source.take(np.arange(12))["label"], labels)
    folder = data.open_source("folder:gs://bucket/folder")
    assert len(folder) == 12 and folder.class_names == ("0", "1")
    np.testing.assert_array_equal(folder.take([0])["image"][0], images[0])
    assert len(data.open_source("npz:set.npz", "gs://bucket")) == 12  # below data_dir
    assert source_name("gs://bucket/set.npz") == "npz:gs://bucket/set.npz"
    assert source_name("gs://bucket/folder") == "folder:gs://bucket/folder"
    assert source_name("folder:gs://bucket/folder") == "folder:gs://bucket/folder"

    words = [
        "--samples",
        "gs://bucket/set.npz",
        "--reference",
        "gs://bucket/folder",
        "--features",
        "digits",
    ]
    words += [
        "--out",
        "gs://bucket/reports/report.json",
        "--save-statistics",
        "gs://bucket/reports/digits.npz",
    ]
    scoring.main([*words, "--k", "2"])
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((bucket / "reports" / "report.json").read_text()) == printed
    assert (
        printed["n_samples"] == printed["n_reference"] == 12 and abs(printed["fd_all"]) < 1e-3
    )  # the same images
    assert load_statistics("gs://bucket/reports/digits.npz").count == 12

    export.write("gs://bucket/w.safetensors", {"w": np.ones(3, np.float32)}, {"kind": "edm"})
    assert (bucket / "w.json").is_file()
    with places.fetched(places.place("gs://bucket/w.safetensors")) as (file,):
        np.testing.assert_array_equal(read_torch(file)["w"], np.ones(3))


@pytest.mark.parametrize(
    "words,sentence",
    [
        (
            "foo://bucket/x",
            "--workdir: 'foo://bucket/x' has an unknown scheme; expected a local path or gs://",
        ),
        (
            "s3://bucket/x",
            "--workdir: 's3://bucket/x' cannot hold checkpoints (orbax has no s3://)",
        ),
        (
            "gs:/bucket/x",
            "--workdir: 'gs:/bucket/x' has one slash (pathlib.Path takes the other away)",
        ),
        ("gs:bucket/x", "--workdir: 'gs:bucket/x' has no slash; expected gs://"),
        ("runs/\0x", "has a zero in it; expected a path"),
        ("gs:///x", "--workdir: 'gs:///x' names no bucket; expected gs://BUCKET/FOLDER"),
    ],
)
def test_words_that_are_no_place(words, sentence, bucket):
    with pytest.raises(places.PlaceError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        places.workdir(words)


def test_a_bucket_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(places.LIBRARIES, "gs", ("no_such_library", "pip install 'ogdm_jax[gcs]'"))
    monkeypatch.setenv("EPATH_USE_TF", "0")
    with pytest.raises(
        places.PlaceError, match="needs the package no_such_library.* pip install 'ogdm_jax.gcs.'"
    ):
        places.place("gs://bucket/run", "--workdir")


@pytest.mark.parametrize(
    "where,file,sentence",
    [
        ("FILE", False, "is a file, or lies below one; expected a folder"),
        ("FILE/run", False, "is a file, or lies below one; expected a folder"),
        (
            "/proc/ogdm_jax",
            False,
            "cannot be written .No such file or directory.; expected a folder",
        ),
        ("/proc/ogdm_jax/out.npz", True, "cannot be written .*; expected a file"),
        ("FOLDER", True, "is a folder; expected a file"),
    ],
)
def test_places_that_cannot_be_written(where, file, sentence, tmp_path):
    (tmp_path / "file").write_text("kept")
    where = where.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path))
    with pytest.raises(places.PlaceError, match=f"--workdir: '{where}' {sentence}"):
        places.writable(places.place(where), "--workdir", file=file)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_text() == "kept"


@pytest.mark.parametrize(
    "error,sentence",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is on a full disk"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            r"cannot be written \(Permission denied\)",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            r"cannot be written \(Read-only file system\)",
        ),
        (
            KeyError("bucket libraries\nraise anything"),
            r"cannot be written \(KeyError: 'bucket libraries.*",
        ),
    ],
)
def test_a_write_that_fails_is_one_sentence(error, sentence, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(epath.Path, "write_bytes", fail)
    with pytest.raises(places.PlaceError, match=sentence) as found:
        places.writable(places.place(tmp_path / "a" / "b"), "--workdir")
    assert "\n" not in str(found.value) and not (tmp_path / "a").exists()


def test_trying_leaves_nothing_behind(tmp_path, bucket):
    places.writable(places.place(tmp_path / "a" / "b"), "--workdir")
    places.writable(places.place("gs://bucket/a/b"), "--workdir")
    assert not (tmp_path / "a").exists() and not [p for p in bucket.rglob("*") if p.is_file()]


def test_a_half_written_file_never_takes_the_name(tmp_path, bucket):
    for path in (places.place(tmp_path / "x.json"), places.place("gs://bucket/x.json")):
        path.write_text("old")
        with pytest.raises(RuntimeError), places.written(path) as new:
            new.write_text("ne")
            raise RuntimeError
        assert path.read_text() == "old"
        with places.written(path) as new:
            new.write_text("new")
        assert path.read_text() == "new"


def test_no_file_of_the_users_is_taken_for_a_half_written_one(tmp_path):
    """a.new.npz was, beside --out a.npz, and was gone afterwards."""
    for name in ("a.new.npz", ".a.npz", "a.npz.new"):
        (tmp_path / name).write_text("mine")
    with places.written(places.place(tmp_path / "a.npz")) as new:
        assert new.parent == tmp_path and new.suffix == ".npz"
        new.write_text("new")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found.pop("a.npz") == "new" and set(found.values()) == {"mine"} and len(found) == 3


def test_train_refuses_a_place_before_anything_is_built(tmp_path):
    (tmp_path / "file").touch()
    for workdir in (str(tmp_path / "file"), "/proc/run", "gs:/bucket/run"):
        done = entry(
            tmp_path, "train.py", "--workdir", workdir, *tiny.flags("data.source=npz:missing")
        )
        assert done.returncode == 1 and done.stdout == "", done
        assert (
            done.stderr.startswith(f"error: --workdir: '{workdir}' ")
            and done.stderr.count("\n") == 1
        )


def test_what_only_reads_local_files_says_so(tmp_path, bucket):
    with pytest.raises(
        SourceError, match="data_dir: 'gs://bucket' is read on this machine only.*mounted"
    ):
        data.open_source("tfds:mnist", "gs://bucket")
    with pytest.raises(
        places.PlaceError, match="checkpoint: 'gs://bucket/x.pt' is read on this machine only"
    ):
        read_torch("gs://bucket/x.pt")
    with pytest.raises(SourceError, match="npz:foo://x: 'foo://x' has an unknown scheme"):
        data.open_source("npz:foo://x")


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize(
    "where",
    [
        *(
            "/proc/runs/x",
            "/proc/self/x",
            "/proc/1/task/x",
            "/sys/x",
            "/sys/kernel/x",
            "/dev/null/x",
        ),
        *("FILE/x", "LOOP/x", "BROKEN/x/y", f"{'n' * 300}/x", "READONLY/x", "READONLY/y/x"),
    ],
)
def test_destinations_are_tried_and_refused_in_one_sentence(where, file, tmp_path):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "LOOP").symlink_to(tmp_path / "LOOP")
    (tmp_path / "BROKEN").symlink_to("/proc/no such place")
    (tmp_path / "READONLY").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(tmp_path / "READONLY")]
    if "READONLY" in where and subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        path = tmp_path / where  # what begins with a slash stays as it is
        with pytest.raises(places.PlaceError, match="^--out: ") as caught:
            places.writable(places.place(path), "--out", file=file)
        assert str(path) in str(caught.value) and "expected" in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        subprocess.run(["umount", "-l", mount[-1]], check=False, capture_output=True)


def test_a_device_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(places.PlaceError, match="a device or a pipe, no file"):
            places.writable(places.place(path), "--out", file=True)
        with pytest.raises(OSError, match="a device"), places.written(places.place(path)) as new:
            new.write_text("x")
    assert not os.path.isfile("/dev/null")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.json").symlink_to("disk/b.json")
    for text in ("1", "2"):
        with places.written(places.place(tmp_path / "a.json")) as new:
            new.write_text(text)
    assert (tmp_path / "a.json").is_symlink() and (tmp_path / "disk" / "b.json").read_text() == "2"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    """safetensors 0.8 makes files that their owner alone may read."""
    (tmp_path / "plain").touch()
    with places.written(epath.Path(tmp_path / "x.safetensors")) as new:
        safetensors.numpy.save_file({"a": np.zeros(3)}, new)
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "x.safetensors")}
    assert len(modes) == 1


def test_the_home_folder_is_what_a_shell_would_make_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(places.place("~/runs/x")) == f"{tmp_path}/runs/x"
    assert str(places.place("~nobody-of-that-name/x")) == "~nobody-of-that-name/x"


def test_an_error_while_writing_names_the_file_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError) as caught, places.written(places.place(tmp_path / "a.json")) as new:
        new.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.json") and not list(tmp_path.iterdir())


def test_a_folder_that_is_closed_is_not_left_out_in_silence(tmp_path, monkeypatch):
    """As root nothing is closed: the listing of one folder fails here."""
    for name in ("open/a", "closed/b"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    assert sorted(places.files_below(places.place(tmp_path))) == ["closed/b", "open/a"]
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        places.files_below(places.place(tmp_path))
