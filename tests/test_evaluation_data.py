"""What samples are compared with, whose classes they have, and what can be measured at all."""

import types

import numpy as np
import pytest
from PIL import Image

from ogdm_jax import data
from ogdm_jax.cli import likelihood
from ogdm_jax.config import ConfigError
from ogdm_jax.data.base import Stored, from_reader
from ogdm_jax.sampling import generate
from ogdm_jax.training import decoding, evaluate
from tests.support import tiny


class Reader:
    """Images whose labels are in them, as records have them."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def read(self, i):
        return np.full((2, 2, 1), i % 256, np.uint8), int(self.labels[i])

    def where(self, i):
        return str(i)


def model(classes):
    return types.SimpleNamespace(label_dim=classes, text=None)


def sorted_set(counts):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    images = np.broadcast_to(labels[:, None, None, None], (len(labels), 2, 2, 1)).astype(np.uint8)
    return data.from_arrays("sorted", images, labels)


@pytest.mark.fast
def test_a_part_of_a_set_has_all_its_classes(monkeypatch):
    monkeypatch.setattr(decoding, "MOST", 500)
    whole = sorted_set([5] * 100)
    np.testing.assert_array_equal(evaluate.references(whole), whole.images)
    assert evaluate.reference_part(whole) == {}
    large = sorted_set([6] * 100)
    found = evaluate.references(large)
    assert len(found) == 500 and set(np.bincount(found[:, 0, 0, 0])) == {5}
    assert evaluate.reference_part(large) == {"reference": "500 of 600 images, spread evenly"}


@pytest.mark.fast
@pytest.mark.parametrize("known", [True, False], ids=["labels known ahead", "labels in the images"])
def test_classes_are_as_frequent_as_in_the_data(known):
    counts = [180, 180, 20, 20, 20]
    source, seeds = sorted_set(counts), np.arange(420)
    if not known:
        stored = Stored(Reader(source.labels), None, ("a", "b", "c", "d", "e"))
        source = from_reader("read", stored, None, None, 0)
        assert source.labels is None
    labels = evaluate.conditions(source, model(5), seeds)
    np.testing.assert_array_equal(np.bincount(labels), counts)
    first = np.bincount(labels[:105], minlength=5)  # a quarter is about a quarter of each class
    assert (abs(first - np.array(counts) / 4) < 12).all()
    part = evaluate.conditions(source, model(5), [840 + 17, 3, 400])
    np.testing.assert_array_equal(part, labels[[17, 3, 400]])
    assert evaluate.shared_conditions(source, model(5))


@pytest.mark.fast
def test_labels_of_every_kind_and_those_that_are_not_the_models():
    images, seeds = np.zeros((40, 2, 2, 1), np.uint8), np.arange(40)
    some = np.where(np.arange(40) < 10, -1, np.arange(40) % 3).astype(np.int32)
    unlabelled = data.from_arrays("some", images, some)
    found = evaluate.conditions(unlabelled, model(3), seeds)
    np.testing.assert_array_equal(np.sort(found), np.sort(some))
    vectors = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    found = evaluate.conditions(data.from_arrays("vectors", images, vectors), model(3), seeds)
    np.testing.assert_array_equal(np.sort(found[:, 0]), np.sort(vectors[:, 0]))
    for source, made, names in (
        (unlabelled, model(4), ()),
        (data.from_arrays("none", images), model(4), ()),
        (data.from_arrays("named", images, some, ["a", "b", "c"]), model(3), ("x", "y", "z")),
    ):
        uniform = generate.labels_for(seeds, made.label_dim, None)
        np.testing.assert_array_equal(evaluate.conditions(source, made, seeds, names), uniform)
        assert evaluate.shared_conditions(source, made, names) == {}
    assert evaluate.conditions(unlabelled, model(0), seeds) is None


def test_a_likelihood_is_of_images_of_all_classes(monkeypatch):
    """The images stand in for their own likelihoods."""
    bits = lambda denoise, x0, *_, **__: types.SimpleNamespace(
        bits=x0.mean((1, 2, 3)), nfe=x0[:, 0, 0, 0]
    )
    monkeypatch.setattr(likelihood.likelihood, "log_likelihood", bits)
    monkeypatch.setattr(likelihood.likelihood, "dequantised", lambda images, keys: images / 1.0)
    made = types.SimpleNamespace(label_dim=0, denoiser=lambda *weights: None)
    trained = types.SimpleNamespace(model=made, params={}, buffers={})
    args = types.SimpleNamespace(devices=1, num=10, batch=4, seed=0)
    found = likelihood._measure(args, trained, sorted_set([10] * 11), None, (), {})
    assert found["bits_per_dim"] == (np.linspace(0, 109, 10).round() // 10).mean()


def test_an_evaluation_draws_the_datas_classes(monkeypatch):
    run = tiny.build("methods=", "data.conditional=true", "evaluate.num=50")
    drawn = []

    def sampler(*_):
        def images(params, buffers, seeds, labels, constants, rows):
            drawn.append(np.asarray(labels))
            return np.zeros((len(labels), *run.source.shape), np.float32)

        return images

    monkeypatch.setattr(evaluate.generate, "sampler", sampler)
    assert evaluate.Evaluator(run, run.model).samples({}, {}).shape == (50, 8, 8, 1)
    order = np.random.default_rng(0).permutation(1797)[:50]
    np.testing.assert_array_equal(np.concatenate(drawn)[:50], run.source.labels[order])


def test_an_evaluation_draws_at_most_as_many_as_it_is_compared_with(monkeypatch):
    """Of a million images it drew a million, and compared all pairs of them."""
    run, asked = tiny.build("methods="), []
    monkeypatch.setattr(evaluate.decoding, "MOST", 30)
    evaluator = evaluate.Evaluator(run, run.model)

    def draw(seeds, *_):
        asked.append(len(seeds))
        return [np.zeros((len(seeds), 8, 8, 1), np.float32)]

    monkeypatch.setattr(evaluator, "_draw", draw)
    assert evaluator.samples({}, {}).shape == (30, 8, 8, 1) and asked == [30]


@pytest.fixture
def pictures(tmp_path):
    for name in "ab":
        (tmp_path / "imgs" / name).mkdir(parents=True)
        for k in range(4):
            grey = np.full((24, 16), k * 40 + (name == "b") * 99, np.uint8)
            Image.fromarray(grey).save(tmp_path / "imgs" / name / f"{k}.png")
    return tmp_path


@pytest.mark.fast
def test_the_features_source_is_opened_as_the_data_are(pictures):
    config = tiny.config(
        f"data.data_dir={pictures}", "data.resolution=8", "evaluate.features=folder:imgs"
    )
    assert evaluate.check_evaluation(config) == (8, 8, 1)
    wide = tiny.config("data.resolution=16", "data.channels=3", "evaluate.features=digits")
    assert evaluate.check_evaluation(wide) == (16, 16, 3)


@pytest.mark.fast
def test_what_measures_samples_is_opened_before_any_is_drawn(pictures):
    words = f"data.data_dir={pictures}", "data.resolution=8"
    plain = tiny.config("data.source=folder:imgs/a", "evaluate.features=", *words)
    with pytest.raises(
        ValueError, match=r"no class labels; .*--features \(of ogdm evaluate and re"
    ):
        evaluate.ruler(plain, 6)
    with pytest.raises(ConfigError, match="--num: 5 given; expected at least 6"):
        evaluate.ruler(plain, 5)


@pytest.mark.fast
def test_what_cannot_be_measured_is_refused(monkeypatch):
    for num in (1, 5):
        few = tiny.config("evaluate.features=digits", f"evaluate.num={num}")
        with pytest.raises(ConfigError, match=rf"evaluate.num: {num} given; expected at least 6"):
            evaluate.check_evaluation(few)
    monkeypatch.setattr(evaluate.networks.places, "package", lambda name: None)
    with pytest.raises(ConfigError, match=r"evaluate.features: lite0: .*pip install"):
        evaluate.check_evaluation(tiny.config("evaluate.features=lite0"))
    config = tiny.config("evaluate.features=digits")
    run = lambda source: types.SimpleNamespace(config=config, source=source, model=None)
    small = data.from_arrays("small", np.zeros((11, 8, 8, 1), np.uint8))
    with pytest.raises(
        ConfigError, match=r"'digits' given; expected .*11 images .*at least 12 of them"
    ):
        evaluate.check_images(run(small), (8, 8, 1))
    other = data.from_arrays("other", np.zeros((12, 16, 16, 1), np.uint8))
    with pytest.raises(ConfigError, match=r"images of \(16, 16, 1\).*not of \(8, 8, 1\)"):
        evaluate.check_images(run(other), (8, 8, 1))
    evaluate.check_images(run(other), None)


def test_processes_exchange_their_samples_part_by_part(monkeypatch):
    """Seven images of two processes, one of each at a time: in the order of their seeds."""
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 1), np.uint8)
    shares = [images[[0, 2, 4, 6]], images[[1, 3, 5, 1]]]  # as many in each
    exchanged = []

    def gathered(part):
        assert part.nbytes <= 8
        start = sum(map(len, exchanged))
        exchanged.append(part)
        return np.stack([share[start : start + len(part)] for share in shares])

    monkeypatch.setattr(evaluate, "_GATHERED", 8)
    monkeypatch.setattr(evaluate.jax, "process_count", lambda: 2)
    monkeypatch.setattr(evaluate.multihost_utils, "process_allgather", gathered)
    space = types.SimpleNamespace
    run = space(config=space(evaluate=space(num=7)))
    evaluator = evaluate.Evaluator(run, None)  # pyright: ignore[reportArgumentType]
    draw = lambda seeds, *_: [images[seeds % 7] / np.float32(127.5) - 1]
    monkeypatch.setattr(evaluator, "_draw", draw)
    np.testing.assert_array_equal(evaluator.samples({}, {}), images)
    np.testing.assert_array_equal(np.concatenate(exchanged), shares[0])
