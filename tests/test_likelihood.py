"""Likelihoods by the flow against closed densities; probes, dequantisation, guidance."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from ogdm_jax.cli import likelihood as command
from ogdm_jax.config import ConfigError
from ogdm_jax.data import Source
from ogdm_jax.diffusion import precondition
from ogdm_jax.methods import apg, cfg, dg
from ogdm_jax.sampling import adaptive
from ogdm_jax.sampling.churn import Churn
from ogdm_jax.sampling.guidance import Guidance, plain_step
from ogdm_jax.sampling.likelihood import dequantised, log_likelihood
from tests.support.oracles import Gaussian, two_bumps

DATA = Gaussian(0.2, 0.4)
BIT = 1e-3
TOP = 800.0  # at 80 the prior, which knows no mean, is off by 3e-3 bits


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def bits(nats, x):
    return np.asarray(-nats / np.log(2) / x[0].size + 7)


@pytest.mark.slow_cases("v?")
@pytest.mark.parametrize("variable", adaptive.VARIABLES)
def test_a_gaussian_has_its_density(variable):
    """One Rademacher probe is exact where the Jacobian is diagonal."""
    x = DATA.draw(jax.random.key(1), (5, 3, 3, 1))
    run = jax.jit(
        lambda x, k: log_likelihood(
            DATA.denoise, x, k, sigma_max=TOP, control=adaptive.Control(1e-5, 1e-5, variable)
        )
    )
    found = run(x, keys(5))
    exact = DATA.log_density(x, jnp.zeros(5))
    np.testing.assert_allclose(found.bits, bits(exact, x), atol=BIT)
    np.testing.assert_allclose(found.nats, exact, atol=9 * BIT * np.log(2))
    std = np.sqrt(1 + TOP**2) if variable == "vp" else TOP
    np.testing.assert_allclose(found.prior, DATA.ode(x, 0.002, TOP) / std, atol=1e-3)
    assert (found.nfe > 9).all() and found.nats.dtype == jnp.float32


@pytest.mark.slow_cases("float32")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mixture_has_its_density_by_the_exact_trace(dtype):
    data = two_bumps()
    with jax.enable_x64(dtype == "float64"):
        x = data.draw(jax.random.key(2), 6).astype(dtype)
        run = jax.jit(lambda x, k: log_likelihood(data.denoise, x, k, sigma_max=TOP, probe="exact"))
        found = run(x, keys(6))
        np.testing.assert_allclose(found.bits, bits(data.log_density(x, jnp.zeros(6)), x), atol=BIT)
        assert found.nats.dtype == dtype


@pytest.mark.slow_cases("gaussian")
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_probes_are_unbiased(probe):
    """The mean over many keys is the exact trace's, within four standard errors; more probes
    scatter less."""
    data, n = two_bumps(), 256
    x = jnp.tile(data.draw(jax.random.key(2), 1), (n, 1, 1, 1))
    loose = adaptive.Control(1e-4, 1e-4)
    run = jax.jit(
        functools.partial(log_likelihood, data.denoise, control=loose, probe=probe),
        static_argnames="probes",
    )
    exact = log_likelihood(data.denoise, x[:1], keys(1), probe="exact", control=loose).bits[0]
    one, four = (np.asarray(run(x, keys(n), probes=k).bits) for k in (1, 4))
    for found in (one, four):
        assert abs(found.mean() - exact) < 4 * found.std() / np.sqrt(n) + 1e-4
    assert one.std() > 1.5 * four.std() > 0
    np.testing.assert_allclose(run(x[:2], keys(n)[5:7], probes=1).bits, one[5:7], atol=1e-4)


def test_dequantisation_bounds_the_bits_of_levels():
    """Of a discrete law of one number, k ~ round N: the bound -E log2 p(x) + 7 against its entropy.

    The density is constant over a cell to first order, so that the bound is tight to 1e-4 bits.
    """
    wide, levels = Gaussian(0.0, 0.3), np.arange(256)
    edges = norm.cdf(np.linspace(-1, 1, 257), 0.0, 0.3)
    cells = np.diff(edges) / (edges[-1] - edges[0])
    images = jnp.asarray(levels, jnp.uint8).reshape(-1, 1, 1, 1)
    found = [
        np.asarray(wide.log_density(dequantised(images, keys(256, seed)), jnp.zeros(256)))
        for seed in range(64)
    ]
    bound = -(cells * np.mean(found, 0)).sum() / np.log(2) + 7
    entropy = -(cells * np.log2(np.diff(edges))).sum()
    assert abs(bound - entropy) < 5e-3
    x = np.asarray(dequantised(images, keys(256)))
    assert (np.floor((x.ravel() + 1) * 128) == levels).all() and x.min() >= -1 and x.max() < 1
    np.testing.assert_array_equal(dequantised(images[7:9], keys(256)[7:9]), x[7:9])
    with pytest.raises(ValueError, match="float32 given; expected uint8"):
        dequantised(jnp.zeros((1, 2, 2, 1)), keys(1))


def test_a_perfect_discriminator_gives_the_likelihood_of_the_data():
    """DG of the exact log ratio turns the model's flow into the data's, divergence included."""
    model = Gaussian(-0.1, 0.6)
    ratio = lambda x, sigma, label: DATA.log_density(x, sigma) - model.log_density(x, sigma)
    x = DATA.draw(jax.random.key(7), (3, 2, 2, 1))
    run = jax.jit(
        lambda x, k: (
            log_likelihood(model.denoise, x, k, guidance=dg.guidance(ratio), sigma_max=TOP).bits
        )
    )
    np.testing.assert_allclose(
        run(x, keys(3)), bits(DATA.log_density(x, jnp.zeros(3)), x), atol=2e-3
    )


def test_classifier_free_guidance_has_the_guided_density():
    """Equal spreads: the guided denoiser is that of the mean without + w (with - without)."""
    means = [Gaussian(mean, 0.5) for mean in (-0.1, 0.2)]

    def denoise(x, sigma, label):
        both = [data.denoise(x, sigma) for data in means]
        return jnp.where(label[:, None, None, None] >= 0, both[1], both[0])

    x0, label = 0.3 * jnp.ones((2, 2, 2, 1)), jnp.zeros(2, jnp.int32)
    how = {"probe": "exact"}
    found = log_likelihood(denoise, x0, keys(2), label, cfg.guidance(2.0), **how)
    want = log_likelihood(Gaussian(0.5, 0.5).denoise, x0, keys(2), **how)
    np.testing.assert_allclose(found.nats, want.nats, atol=1e-3)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"guidance": Guidance("plain", transition=plain_step)}, "plain: it draws noise"),
        ({"guidance": Guidance("rise", churn=Churn(1.0))}, "rise: it draws noise"),
        ({"guidance": Guidance("mean", shift=lambda *_: 0)}, "mean: it shifts the mean of random"),
        ({"guidance": apg.guidance(2.0, momentum=-0.5)}, "apg: it remembers the step before"),
        ({"probe": "unit"}, "probe='unit'; expected one of rademacher"),
        ({"probes": 0}, "probes=0; expected at least 1"),
        ({"sigma_min": 90.0}, "expected 0 < sigma_min"),
        ({"control": adaptive.Control(0.0)}, "rtol=0.0"),
        ({"denoise": precondition.iddpm(lambda x, c, label=None: x)}, "discrete noise levels"),
    ],
)
def test_what_cannot_be_is_one_sentence(settings, words):
    given = {"denoise": DATA.denoise, "x0": jnp.zeros((1, 2, 2, 1)), "keys": keys(1)} | settings
    with pytest.raises(ValueError, match=words):
        log_likelihood(**given)


@pytest.mark.parametrize(
    "classes,first,dropout,sentence",
    [
        (13, 0, 0.1, "'x' has 13 classes, the model 10; expected"),
        (0, -1, 0.0, "'x' has images without a class"),
        (10, -1, 0.0, "'x' has images without a class"),
        (0, -1, 0.1, ""),
        (10, -1, 0.1, ""),
        (10, 3, 0.0, ""),
    ],
)
def test_images_have_the_models_classes(classes, first, dropout, sentence):
    labels = np.array([first, 9 if classes else -1], np.int32)
    source = Source("x", (8, 8, 1), classes, images=np.zeros((2, 8, 8, 1)), labels=labels)
    told = {"model": types.SimpleNamespace(label_dim=10), "class_names": ()}
    data = types.SimpleNamespace(label_dropout=dropout)
    trained = types.SimpleNamespace(config=types.SimpleNamespace(data=data), **told)
    if not sentence:
        assert command._model_classes(source, trained, 2) is None
        return
    with pytest.raises(ConfigError, match=f"^--reference: {sentence}"):
        command._model_classes(source, trained, 2)


def test_classes_are_matched_by_their_names():
    """A folder of some of the classes numbers them anew."""
    model = types.SimpleNamespace(label_dim=3)
    data = types.SimpleNamespace(label_dropout=0.0)
    trained = types.SimpleNamespace(
        model=model, class_names=("cat", "dog", "emu"), config=types.SimpleNamespace(data=data)
    )
    images, labels = np.zeros((2, 8, 8, 1)), np.array([1, 0], np.int32)
    of = lambda *names: Source(
        "x", (8, 8, 1), len(names), images=images, labels=labels, class_names=names
    )
    found = command._model_classes(of("dog", "emu"), trained, 2)
    assert found is not None and found[[0, 1, -1]].tolist() == [1, 2, -1]
    with pytest.raises(ConfigError, match="'x' has a class 'fox', the model has none of that name"):
        command._model_classes(of("cat", "fox", "emu"), trained, 2)
