"""Does a distance in the trained feature space rank images as people would, and is it the same
every time?
"""

import json

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ogdm_jax.data import open_source
from ogdm_jax.data.base import Stored, from_reader
from ogdm_jax.metrics import (
    Moments,
    distance_report,
    feature_space,
    frechet_distance,
    train_features,
    trained,
)
from ogdm_jax.metrics import features as features_of
from ogdm_jax.metrics.features import short_name


@pytest.fixture(scope="module")
def features():
    return feature_space("digits")


@pytest.fixture(scope="module")
def halves():
    source = open_source("digits")
    order = np.random.default_rng(11).permutation(len(source))
    a, b = order[:898], order[898:1796]
    return source.images[a], source.images[b], source.labels[b]


def _distance(features, x, y):
    moments = [Moments().update(features(images)).finalize() for images in (x, y)]
    return frechet_distance(*moments[0], *moments[1])


def _noisy(images, spread):
    noise = np.random.default_rng(12).normal(size=images.shape) * spread
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def _blurred(images, width):
    return gaussian_filter(images.astype(np.float64), (0, width, width, 0)).astype(np.uint8)


def test_damage_is_ranked(features, halves):
    a, b, labels = halves
    floor = _distance(features, b, a)
    for cases in (
        [_noisy(b, s) for s in (8, 16, 48, 96)],
        [_blurred(b, s) for s in (0.4, 0.6, 1.0)],
        [b[labels < keep] for keep in (9, 7, 5, 2)],  # fewer and fewer classes
        [
            b[np.arange(len(b)) % copies] for copies in (400, 100, 20)
        ],  # fewer and fewer different images
        [np.roll(b, s, axis=2) for s in (1, 3)],
    ):
        distances = [floor, *(_distance(features, case, a) for case in cases)]
        assert all(np.diff(distances) > 0.15 * floor), distances


def test_features_are_standardised_and_the_classifier_has_learnt(features, halves):
    a, b, labels = halves
    values = features(np.concatenate([a, b]))
    assert (
        values.shape == (1796, features.dim)
        and values.dtype == np.float32
        and features.name == "fd_digits"
    )
    np.testing.assert_allclose(values.mean(0), 0, atol=0.05)
    assert np.median(values.std(0)) == pytest.approx(1, abs=0.02) and values.std(0).max() < 1.1
    assert (features.both(b)[1].argmax(1) == labels).mean() > 0.98 and features.accuracy > 0.98
    np.testing.assert_allclose(features.both(b[:3])[1].sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(
        features(b[:5]), features(b)[:5]
    )  # padding of the last batch changes nothing


def test_report_puts_number_and_floor_beside_the_distance(features, halves):
    a, b, _ = halves
    real = distance_report(features, b, a)
    noisy = distance_report(features, _noisy(b, 32).astype(np.float32) / 127.5 - 1, features(a))
    assert (
        real["n"] == 449
        and real["n_samples"] == real["n_reference"] == 898
        and real["features"] == "fd_digits"
    )
    assert real["fd_over_floor"] == pytest.approx(1, abs=0.25) and noisy["fd_over_floor"] > 2
    assert real["floor"] == pytest.approx(
        noisy["floor"], rel=1e-6
    )  # the same splits of the same reference
    assert abs(real["kid"]) < 0.05 < noisy["kid"] and real["precision"] == pytest.approx(
        real["precision_floor"], abs=0.05
    )
    assert json.loads(json.dumps(noisy)) == noisy
    with pytest.raises(ValueError, match="expected more than 5"):
        distance_report(features, b[:4], a)


def test_copies_of_the_reference_are_below_the_floor(features, halves):
    a, _, _ = halves
    assert distance_report(features, a, a)["fd_over_floor"] < 0.8


def test_perfect_reconstructions_are_at_the_floor(features, halves):
    """Not below it, although each has its original among the reference."""
    report = distance_report(features, halves[0], halves[0], paired=True)
    assert report["fd"] == report["floor"] > 0
    with pytest.raises(ValueError, match="expected one of each"):
        distance_report(features, halves[0][1:], halves[0], paired=True)


def test_training_is_deterministic_and_leaves_unlabelled_images_out(halves):
    _, b, labels = halves
    first, again = (train_features("fd_x", b, labels, steps=20) for _ in range(2))
    np.testing.assert_array_equal(first(b), again(b))
    more_images, more_labels = (
        np.concatenate([b, b[:50]]),
        np.concatenate([labels, np.full(50, -1, labels.dtype)]),
    )
    np.testing.assert_array_equal(
        first(b), train_features("fd_x", more_images, more_labels, steps=20)(b)
    )


def test_features_that_are_no_better_than_random_ones_are_refused(halves):
    _, b, labels = halves
    shuffled = np.random.default_rng(13).permutation(labels)
    with pytest.raises(ValueError, match="expected labels that the pixels tell"):
        train_features("fd_x", b, shuffled, steps=20)
    with pytest.raises(ValueError, match="at least 2 classes"):
        train_features("fd_x", b, np.zeros_like(labels))
    with pytest.raises(ValueError, match="expects uint8 \\[n, 8, 8, 1\\]"):
        feature_space("digits")(np.zeros((2, 16, 16, 1), np.uint8))


def test_other_sizes_and_colour_take_the_same_construction():
    source = open_source("digits", resolution=12, channels=3)
    space = feature_space(source)
    assert feature_space(source) is space  # trained once
    assert space.name == "fd_digits" and space(source.images[:7]).shape == (7, space.dim)


@pytest.mark.parametrize("known", [True, False], ids=["labels known ahead", "labels in the images"])
def test_of_a_large_set_only_the_images_that_are_trained_on_are_read(monkeypatch, known):
    """They are those that `train_features` would draw from the whole set, with what it draws next."""
    monkeypatch.setattr(trained, "MOST_IMAGES", 300)
    digits, seen, told = open_source("digits"), [], []
    labels = (
        np.where(np.arange(len(digits)) % 7 == 0, -1, digits.labels) if known else digits.labels
    )

    class Reader:
        def __len__(self):
            return len(digits)

        def read(self, i):
            seen.append(i)
            return digits.images[i], None if known else digits.labels[i]

        def where(self, i):
            return str(i)

    source = from_reader("big", Stored(Reader(), labels if known else None), None, None, 0)
    monkeypatch.setattr(features_of, "_TRAINED", {})
    stop = lambda *words: told.append(words) or 1 / 0
    monkeypatch.setattr(features_of, "train_features", stop)
    seen.clear()
    with pytest.raises(ZeroDivisionError):
        feature_space(source)
    rng = np.random.default_rng(0)
    images, classes, _ = trained._labelled(digits.images, labels, rng)
    assert len(seen) == 300 and told[0][0] == "fd_big"
    np.testing.assert_array_equal(told[0][1], images)
    np.testing.assert_array_equal(told[0][2], classes)
    assert told[0][3].random() == rng.random()


def test_short_names():
    names = {
        "digits": "digits",
        "tfds:cifar10/train[:10%]": "cifar10",
        "npz:/a/emoji32.npz?base<17": "emoji32",
    }
    assert {name: short_name(name) for name in [*names, "folder:/b/faces/"]} == {
        **names,
        "folder:/b/faces/": "faces",
    }
