"""Sets of latents: encoded, resumed, refused, read as others wrote them, drawn in the step."""

import json
import pickle

import jax
import numpy as np
import pytest

from ogdm_jax.cli import data as command
from ogdm_jax.data import SourceError, batches, moments, open_source, prepare
from ogdm_jax.data.check import check
from ogdm_jax.data.describe import describe
from ogdm_jax.data.latents import SIDECAR
from ogdm_jax.interop.autoencoder import open_autoencoder
from ogdm_jax.latents import Latents
from ogdm_jax.training.workdir import open_source as source_of
from tests.support import latents as support
from tests.support import sets, tiny

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return support.autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def encoded(vae):
    out = vae.parent / "latents"
    assert command.main(["encode", "digits/test", "--vae", str(vae), "--out", str(out)]) == 0
    return out


def run(*words) -> int:
    return command.main(["encode", *map(str, words)])


def test_moments_are_the_autoencoders(vae, encoded):
    source, pixels = open_source(f"latents:{encoded}"), open_source("digits/test")
    assert (source.shape, source.item_shape) == ((4, 4, 2), (2, 4, 4, 4))
    assert source.dtype == np.float16 and source.in_memory and len(source) == len(pixels)
    np.testing.assert_array_equal(source.labels, pixels.labels)
    assert source.class_names == pixels.class_names
    images = pixels.images[:5]
    for view, shown in enumerate((images, images[:, :, ::-1])):
        expected = np.concatenate(open_autoencoder(vae).encode(shown), axis=-1)
        np.testing.assert_allclose(source.images[:5, view], expected, atol=2e-3)
    about = json.loads((encoded / SIDECAR).read_text())
    assert (about["scale"], about["shift"], about["scaled"]) == (0.6, 0.2, False)
    assert about["pixels"]["name"] == "digits/test" and len(about["vae"]["sha256"]) == 64
    read = open_source(f"latents:{encoded}", memory_limit=0)
    np.testing.assert_array_equal(read.take([7, 3])["image"], source.images[[7, 3]])


@pytest.mark.default
def test_an_interrupted_call_goes_on(tmp_path, vae, encoded, monkeypatch, capsys):
    """Byte for byte what a call without interruption writes; not with another autoencoder."""
    monkeypatch.setattr(prepare, "SHARD_BYTES", 128 * 64)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("digits/test", "--vae", vae, "--out", one, "--batch", 48) == 0
    calls = []

    def stop(self, images):
        calls.append(len(images))
        if len(calls) > 7:
            raise KeyboardInterrupt
        return whole(self, images)

    owner = type(open_autoencoder(vae))
    whole = owner.encode
    with monkeypatch.context() as patch:
        patch.setattr(owner, "encode", stop)
        assert run("digits/test", "--vae", vae, "--out", two, "--batch", 48) == 130
    other = support.autoencoder(tmp_path / "other", 1)
    assert not two.exists()
    capsys.readouterr()
    assert run("digits/test", "--vae", other, "--out", two) == 1
    assert "unfinished work encoded with the autoencoder" in capsys.readouterr().err
    assert run("digits/train", "--vae", vae, "--out", two) == 1
    assert run("digits/test", "--vae", vae, "--out", two, "--batch", 48) == 0
    names = sorted(file.name for file in one.iterdir())
    assert len(names) > 4 and names == sorted(file.name for file in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert run("digits/test", "--vae", other, "--out", two) == 1  # complete: nothing is replaced
    assert "exists already" in capsys.readouterr().err


def test_what_cannot_be_encoded_is_refused(tmp_path, vae, monkeypatch, capsys):
    grey = sets.encoded(np.arange(64, dtype=np.uint8).reshape(8, 8))
    name = sets.folder(tmp_path / "set", {f"{k}.png": grey for k in range(3)})
    owner = type(open_autoencoder(vae))
    whole = owner.encode

    def bad(self, images):
        mean, std = whole(self, images)
        mean = np.where(np.arange(len(mean))[:, None, None, None] == 1, np.nan, mean)
        return mean, std

    monkeypatch.setattr(owner, "encode", bad)
    line = (name, "--vae", vae, "--out", tmp_path / "out")
    assert run(*line, "--channels", 1) == 1
    error = capsys.readouterr().err
    assert "1.png holds NaN or infinity" in error and error.count("error: ") == 1
    for words, expected in (
        ((name, "--vae", vae, "--out", tmp_path / "out", "--resolution", 9), "--resolution 8"),
        ((name, "--vae", tmp_path / "none", "--out", tmp_path / "out"), "--vae"),
    ):
        assert run(*words) == 1
        assert expected in capsys.readouterr().err


def test_latents_of_others_need_a_statement(tmp_path):
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(6, 4, 5, 3)).astype(np.float32)
    np.savez(tmp_path / "all.npz", samples=samples, label=np.arange(6) % 2)
    with pytest.raises(SourceError, match="state it in a file such as"):
        open_source(f"latents:{tmp_path}")
    told = {"layout": "chw", "stored": "samples", "scaled": True, "scale": 0.18215}
    for name, value in (
        *(("scaled", "yes"), ("scale", None), ("layout", "nchw"), ("scale", True)),
        *(("shift", "none"), ("vae", "sd-vae-ft-ema"), ("pixels", ["digits"])),
    ):
        (tmp_path / SIDECAR).write_text(json.dumps(told | {name: value}))
        with pytest.raises(SourceError, match=f"{SIDECAR} has {name}"):
            open_source(f"latents:{tmp_path}")
    (tmp_path / SIDECAR).write_text(json.dumps(told))
    source = open_source(f"latents:{tmp_path}")
    assert source.shape == (5, 3, 4) and source.num_classes == 2
    keys = jax.random.split(jax.random.key(0), 6)
    z = moments.draw(source.latents, source.images, keys)
    np.testing.assert_array_equal(z, np.moveaxis(samples, 1, -1))


@pytest.mark.parametrize("stored", ["mean, std", "mean, logvar"])
def test_one_file_for_each_image(tmp_path, stored):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(12, 3, 3, 2)), rng.uniform(0.1, 1, size=(12, 3, 3, 2))
    second = std if stored == "mean, std" else 2 * np.log(std)
    for k in range(12):
        np.save(tmp_path / f"{k}.npy", np.concatenate([mean[k], second[k]], axis=-1)[None])
    np.save(tmp_path / "labels.npy", np.arange(12) % 3)
    told = {"layout": "hwc", "stored": stored, "scaled": False, "scale": 2.0, "shift": 0.5}
    (tmp_path / SIDECAR).write_text(json.dumps(told))
    source = open_source(f"latents:{tmp_path}")
    np.testing.assert_allclose(source.images[:, 0, ..., :2], mean, rtol=1e-6)
    np.testing.assert_allclose(source.images[:, 0, ..., 2:], std, rtol=1e-5)
    np.testing.assert_array_equal(source.labels, np.arange(12) % 3)


@pytest.mark.parametrize("name", ["all.npy", "all.npz"])
def test_a_reading_process_opens_the_one_file_itself(tmp_path, name):
    samples = np.random.default_rng(0).normal(size=(64, 8, 8, 2)).astype(np.float32)
    write = np.save if name.endswith("npy") else np.savez
    write(tmp_path / name, **{"arr" if write is np.save else "samples": samples})
    told = {"layout": "hwc", "stored": "samples", "scaled": True, "scale": 1}
    (tmp_path / SIDECAR).write_text(json.dumps(told))
    reader = open_source(f"latents:{tmp_path}", memory_limit=0).reader
    handed_over = pickle.dumps(reader)
    assert len(handed_over) < samples.nbytes / 10
    other = pickle.loads(handed_over)
    assert len(other) == 64 and isinstance(other._all, np.memmap) == name.endswith("npy")
    np.testing.assert_array_equal(other.read(5)[0], samples[5:6])


def test_a_file_of_several_latents_is_no_image_of_several_files(tmp_path):
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", np.zeros((1 + k, 3, 3, 2), np.float32))
    told = {"layout": "hwc", "stored": "samples", "scaled": True, "scale": 1}
    (tmp_path / SIDECAR).write_text(json.dumps(told))
    with pytest.raises(SourceError, match=r"1.npy holds \(2, 3, 3, 2\); expected one latent"):
        open_source(f"latents:{tmp_path}")


def test_a_set_without_classes_stays_one(tmp_path, vae):
    grey = sets.encoded(np.arange(64, dtype=np.uint8).reshape(8, 8))
    name = sets.folder(tmp_path / "set", {f"{k}.png": grey for k in range(3)})
    assert run(name, "--vae", vae, "--out", tmp_path / "out", "--channels", 1) == 0
    source = open_source(f"latents:{tmp_path / 'out'}")
    assert source.labels is None and source.notes == open_source(name).notes


def test_draws_have_the_posteriors_moments():
    """4,000 draws of one item: mean and spread are those of (N(mean, std) - shift) scale."""
    told = Latents((2, 2, 1), scale=0.5, shift=1.0)
    item = support.moments(1, told)
    n = 4000
    keys = jax.random.split(jax.random.key(1), n)
    for view, mirrored in ((0, None), (1, np.ones(n, bool))):
        z = moments.draw(told, np.repeat(item, n, 0), keys, mirrored)
        mean, std = np.split(item[0, view].astype(np.float32), 2, axis=-1)
        np.testing.assert_allclose(z.mean(0), (mean - 1) * 0.5, atol=4 * std.max() / 2 / n**0.5)
        np.testing.assert_allclose(z.std(0), std * 0.5, rtol=4 / (2 * n) ** 0.5)


def test_describe_and_check(encoded, tmp_path):
    """sigma_data is that of the draws, mean and std per channel, too."""
    source = open_source(f"latents:{encoded}")
    found = describe(source)
    keys = jax.random.split(jax.random.key(0), len(source))
    z = np.asarray(moments.draw(source.latents, source.images, keys))
    np.testing.assert_allclose(found["mean"], z.mean((0, 1, 2)), atol=0.02)
    np.testing.assert_allclose(found["std"], z.std((0, 1, 2)), rtol=0.02)
    assert (found["height"], found["channels"]) == (4, 2)
    assert command._text(found).count("\n") >= 7
    report = check(f"latents:{encoded}")
    assert report["readable"] == report["images"] == len(source) and not report["bad"]
    np.save(tmp_path / "0.npy", np.full((1, 3, 3, 2), np.nan))
    np.save(tmp_path / "1.npy", np.ones((1, 3, 3, 2)))
    told = {"layout": "hwc", "stored": "samples", "scaled": True, "scale": 1}
    (tmp_path / SIDECAR).write_text(json.dumps(told))
    assert [one["file"] for one in check(f"latents:{tmp_path}")["bad"]] == ["0.npy"]


def test_settings_of_pixels_are_refused(encoded):
    told = ("data.augment=0", f"data.source=latents:{encoded}")
    assert source_of(tiny.config(*told)).latents is not None
    for text, words in (
        ("data.augment=0.1", "data.augment"),
        ("data.resolution=8", "resolution 8 given for latents"),
    ):
        with pytest.raises(ValueError, match=words):
            source_of(tiny.config(*told, text))


def test_a_batch_knows_its_rows(encoded):
    source = open_source(f"latents:{encoded}")
    batch = next(batches(source, 8, 0))
    np.testing.assert_array_equal(batch["image"], source.images[batch["row"]])
