"""Evaluations of the wrong thing: refused in a sentence, or said in the JSON."""

import json

import numpy as np
import pytest

from ogdm_jax import startup
from ogdm_jax.cli import evaluate, measuring
from ogdm_jax.data import open_source
from ogdm_jax.data.pictures import save_png
from ogdm_jax.metrics import Moments, feature_space, load_statistics, protocol, save_statistics
from ogdm_jax.metrics.networks import NetworkFeatures
from ogdm_jax.metrics.trained import TrainedFeatures

pytestmark = pytest.mark.fast


class Pixels:
    """Features of an image: eight of its pixels. Knows what a trained space knows."""

    name, dim = "fd_pixels", 8

    def __call__(self, images):
        assert images.dtype == np.uint8
        return images.reshape(len(images), -1)[:, 20:28].astype(np.float32)

    def both(self, images):
        return self(images), None


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """ogdm evaluate in a folder: its JSON, or its one sentence."""
    monkeypatch.setattr(startup, "prepare", lambda: None)
    monkeypatch.setattr(measuring, "open_space", lambda *_, **__: Pixels())
    monkeypatch.chdir(tmp_path)

    def call(text: str):
        try:
            evaluate.main(text.split())
        except SystemExit as stop:
            error = capsys.readouterr().err.strip()
            assert stop.code == 1 and error.startswith("error: ") and "\n" not in error
            return error
        return json.loads(capsys.readouterr().out)

    return call


def images(n: int = 40, side: int = 8, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), np.uint8)


def test_another_size_is_refused_or_said(command, tmp_path):
    np.savez("big.npz", images=images(side=16))
    np.savez("colour.npz", images=images(channels=3))
    np.savez("wide.npz", images=np.zeros((40, 8, 12, 1), np.uint8))
    for name, size in (("big", "16x16x1"), ("colour", "8x8x3"), ("wide", "8x12x1")):
        said = command(f"--samples {name}.npz --reference digits")
        assert f"--reference: digits has images of 8x8x1, the samples {size}" in said
        assert "expected one shape; give --resize" in said
    assert "--resize makes squares only" in command(
        "--samples wide.npz --reference digits --resize"
    )
    for name, size in (("big", "16x16x1"), ("colour", "8x8x3")):
        report = command(f"--samples {name}.npz --reference digits --resize")
        assert report["resized"] == {"--reference": f"digits: 8x8x1 to {size}"}
        assert report["n_reference"] == 1797
    np.savez("small.npz", images=images())
    assert "resized" not in command("--samples small.npz --reference digits --resize")


def test_a_reference_of_several_sizes(command, tmp_path):
    np.savez("small.npz", images=images())
    for i in range(20):
        save_png(tmp_path / "mixed" / f"{i}.png", images(1, 8 + i % 3, seed=i)[0])
    said = command("--samples small.npz --reference mixed --k 2")
    assert "where" in said and said.endswith("have it said in the JSON")  # --resize, no other size
    report = command("--samples small.npz --reference mixed --k 2 --resize")
    assert report["resized"] == {"--reference": "mixed: several sizes to 8x8x1"}


def test_features_of_another_size_are_refused(tmp_path):
    words = ["--samples", "x", "--reference", "y", "--features", "digits"]
    args = evaluate.parse(words)
    with pytest.raises(ValueError, match="^--features: digits has images of 8x8x1, the samples"):
        measuring.open_space(args, open_source("digits"), (16, 16, 1))
    for more, sentence in (
        (["--weights", "x"], "^--weights: given, but the feature space is digits"),
        (["--route", "pytorch_fid"], "^--route: given, but"),
        (["--size", "64"], "^--size: given, but .* expected --features lite0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            measuring.open_space(evaluate.parse(words + more), open_source("digits"), (8, 8, 1))


def test_copies_and_repeats_are_said(command):
    source = open_source("digits").take(np.arange(30))["image"]
    np.savez("copies.npz", images=np.concatenate([source, images(20)]))
    np.savez("repeated.npz", images=np.repeat(images(20), 3, axis=0))
    np.savez("fresh.npz", images=images(seed=1))
    report = command("--samples copies.npz --reference digits")
    assert report["copies"] == 30 and "repeated" not in report
    assert command("--samples repeated.npz --reference digits")["repeated"] == 40
    report = command("--samples fresh.npz --reference digits")
    assert not {"copies", "repeated", "same_images_as", "singular", "resized"} & set(report)
    report = command("--samples fresh.npz fresh.npz copies.npz --reference digits")
    assert [one.get("same_images_as") for one in report["sets"]] == [None, "fresh.npz", None]
    same = command("--samples fresh.npz --reference fresh.npz")
    assert same["copies"] == 40 and same["fd_all"] < 1e-6


def test_few_images_for_many_features_are_said(command, tmp_path):
    space = Pixels()
    save_statistics(tmp_path / "stats.npz", Moments().update(space(images(90))), space.name)
    np.savez("few.npz", images=images(8))
    np.savez("one.npz", images=images(1))
    report = command("--samples few.npz --reference stats.npz")
    assert report["singular"].startswith("8 images for 8 features: the covariance is singular")
    np.savez("many.npz", images=images(9))
    assert "singular" not in command("--samples many.npz --reference stats.npz")
    assert "expected at least 2" in command("--samples one.npz --reference stats.npz")
    assert "1 and 1797 images; expected more than 5 and 11 for 5 neighbours (--k)" in command(
        "--samples one.npz --reference digits"
    )
    report = command("--samples few.npz --reference digits --k 3")
    assert "8 images for 8 features" in report["singular"]


MU, SIGMA = np.zeros(8), np.eye(8)
SKEW = np.eye(8)
SKEW[0, 1] = 0.5
STATISTICS = {
    "another dimension": ({"mu": np.zeros(4), "sigma": np.eye(4)}, "4 features of an unnamed"),
    "another space": ({"mu": MU, "sigma": SIGMA, "features": "fid"}, "8 features of fid; fd_pix"),
    "NaN in mu": ({"mu": MU * np.nan, "sigma": SIGMA}, "has NaN or infinity in mu or sigma"),
    "infinity": ({"mu": MU, "sigma": np.full((8, 8), np.inf)}, "has NaN or infinity"),
    "not symmetric": ({"mu": MU, "sigma": SKEW}, "sigma that is not symmetric"),
    "negative": ({"mu": MU, "sigma": -SIGMA}, "a negative variance"),
    "indefinite": (
        {"mu": MU, "sigma": SIGMA + 2 * (np.eye(8, k=1) + np.eye(8, k=-1))},
        "smallest eigenvalue",
    ),
    "no matrix": ({"mu": MU, "sigma": np.ones(8)}, r"has mu (8,) and sigma (8,)"),
    "empty": ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, "expected [d] and [d, d]"),
    "complex": ({"mu": MU, "sigma": SIGMA * 1j}, "sigma of complex128"),
    "words": ({"mu": MU.astype(str), "sigma": SIGMA}, "has mu of <U"),
    "objects": ({"mu": MU.astype(object), "sigma": SIGMA}, "expected an .npz"),
    "one image": ({"mu": MU, "sigma": SIGMA, "count": 1}, "says that it is of 1 images"),
    "a count of words": ({"mu": MU, "sigma": SIGMA, "count": "many"}, "expected an .npz"),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_that_are_none_are_refused(command, name):
    arrays, words = STATISTICS[name]
    np.savez("stats.npz", **arrays)
    np.savez("samples.npz", images=images())
    assert words in command("--samples samples.npz --reference stats.npz")


def test_statistics_of_other_types_are_taken(command):
    np.savez("samples.npz", images=images(90))
    np.savez("stats.npz", mu=MU.astype(np.float32), sigma=SIGMA.astype(np.int64) * 7)
    assert load_statistics("stats.npz").cov[0, 0] == 7
    assert command("--samples samples.npz --reference stats.npz")["fd_all"] > 0


SAMPLES = {
    "other keys": ({"x": images()}, "has arrays ['x']; expected the images under"),
    "floats": ({"images": images() / 255.0}, "float64; expected uint8"),
    "uint16": ({"images": images().astype(np.uint16)}, "uint16; expected uint8"),
    "int64": ({"images": images().astype(np.int64)}, "int64; expected uint8"),
    "bool": ({"images": images() > 9}, "bool; expected uint8"),
    "channels first": ({"images": images(channels=3).transpose(0, 3, 1, 2)}, "[N,H,W,C]"),
    "transparent": ({"images": images(channels=4)}, "C = 1 or 3"),
    "flat": ({"images": images().reshape(40, -1)}, "[N,H,W,C]"),
    "no images": ({"images": images()[:0]}, "holds no images"),
    "statistics": ({"mu": MU, "sigma": SIGMA}, "has arrays ['mu', 'sigma']"),
    "too few labels": ({"images": images(), "labels": np.zeros(3, int)}, "3 labels for 40"),
    "objects": ({"images": images().astype(object)}, "no readable .npz"),
}


@pytest.mark.parametrize("side", ["samples", "reference"])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_that_are_none_are_refused(command, name, side):
    arrays, words = SAMPLES[name]
    np.savez("bad.npz", **arrays)
    np.savez("good.npz", images=images(channels=3 if name == "channels first" else 1))
    if side == "reference" and name == "statistics":
        return  # these are a reference
    sides = {"samples": "good.npz", "reference": "good.npz"} | {side: "bad.npz"}
    said = command(" ".join(f"--{option} {file}" for option, file in sides.items()))
    assert words in said and "bad.npz" in said


@pytest.mark.parametrize("content", ["nothing", "empty", "text", "page"])
def test_folders_and_files_without_images_are_refused(command, tmp_path, content):
    np.savez("good.npz", images=images())
    if content == "empty":
        (tmp_path / "bad").mkdir()
    if content in ("text", "page"):
        (tmp_path / "bad.npz").write_text(
            "version https://git-lfs" if content == "text" else "<html>"
        )
    bad = "bad.npz" if content in ("text", "page") else "bad"
    for words in (f"--samples {bad} --reference good.npz", f"--samples good.npz --reference {bad}"):
        said = command(words)
        assert isinstance(said, str) and "bad" in said


def test_pairs_are_checked_before_the_work(command, tmp_path):
    np.savez("a.npz", images=images(20))
    np.savez("b.npz", images=images(30))
    save_statistics(tmp_path / "stats.npz", Moments().update(Pixels()(images(90))), "fd_pixels")
    assert "a.npz has 20 images, b.npz 30" in command("--samples a.npz --reference b.npz --paired")
    assert "--num: 20 given with --paired" in command(
        "--samples b.npz --reference a.npz --paired --num 20"
    )
    assert "mu and sigma" in command("--samples a.npz --reference stats.npz --paired")
    report = command("--samples a.npz --reference a.npz --paired")
    assert report["psnr"] is None and report["identical"] == 20 and report["ssim"] is None


@pytest.mark.parametrize("option", ["--out", "--save-statistics"])
def test_destinations_are_tried_before_the_work(command, tmp_path, monkeypatch, option):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "open_source", lambda *_: pytest.fail("read before it was tried"))
    for place in ("file/x.json", "/proc/x.json", "."):
        said = command(f"--samples a.npz --reference digits {option} {place}")
        assert said.startswith(f"error: {option}: ")


class Judge(TrainedFeatures):
    """A classifier that says a class for each image: its first pixel."""

    def both(self, images):
        one = np.eye(3)[images[:, 0, 0, 0]]
        return images.reshape(len(images), -1)[:, :8].astype(float), one


def judge(names=()) -> Judge:
    space = np.zeros(8), np.ones(8), np.array([2, 5, 7])
    return Judge("fd_x", (8, 8, 1), 3, 1.0, {}, *space, names)


def test_labels_are_those_of_the_classifier():
    pixels = images(30)
    pixels[:, 0, 0, 0] = np.arange(30) % 3
    truth = np.array([2, 5, 7])[np.arange(30) % 3]
    real = judge().both(pixels)[0]

    def score(labels, space=None, names=()):
        samples = {"image": pixels, "label": labels}
        return protocol.score_set(space or judge(), samples, real, class_names=names)[0]

    assert score(truth)["label_agreement"] == 1  # not the numbers of its outputs
    assert score(np.where(np.arange(30) < 15, truth, 2))["label_agreement"] == pytest.approx(2 / 3)
    unknown = score(np.arange(30) % 4)
    assert unknown["label_agreement"] is None
    assert unknown["labels"] == "23 of 30 samples have classes that fd_x has not"
    names = ("a", "b", "cat", "d", "e", "dog", "f", "owl")
    named = judge(names)
    assert score(np.arange(30) % 3, named, ("cat", "dog", "owl"))["label_agreement"] == 1
    assert score(np.arange(30) % 3, named, ("cat", "dog", "cow"))["label_agreement"] is None
    assert "label_agreement" not in score(np.full(30, -1))


def test_the_inception_score_does_not_depend_on_the_order_of_a_folder():
    """Ten parts of a set in the order of its classes held one class each, whose score is 1."""

    class Inception(NetworkFeatures):
        def both(self, images):
            return images.reshape(len(images), -1)[:, :8] / 1, np.eye(3)[images[:, 0, 0, 0]]

    space = Inception("fid", 8, lambda *_: None, {})
    pixels = images(600)
    pixels[:, 0, 0, 0] = np.arange(600) // 200
    samples = {"image": pixels, "label": np.full(600, -1)}
    found, _ = protocol.score_set(space, samples, space.both(pixels)[0])
    assert 2.8 < found["inception_score"] <= 3


def test_the_smallest_of_several_shows_a_nan():
    sets = [{"fd_all": 2.0}, {"fd_all": float("nan")}, {"fd_all": 1.0}]
    assert np.isnan(protocol.smallest(Pixels(), sets)["fd_all_min"])
    assert protocol.smallest(Pixels(), sets[::2])["fd_all_min"] == 1


@pytest.mark.parametrize(
    "content,words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "empty"),
        (b"\x80\x02}q\x00.", "Expected pt_inception-2015-12-05"),
        (None, "is no file; expected pt_inception-2015-12-05"),
    ],
)
def test_weights_that_are_none_say_what_they_are(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^--weights: .*weights.pth.*{words}"):
        feature_space("inception", path)
