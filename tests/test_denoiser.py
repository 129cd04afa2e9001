"""The denoiser as an object: what it answers, and what a plain function becomes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser

pytestmark = pytest.mark.fast

X = jnp.linspace(-2, 2, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
SIGMA = jnp.asarray([0.5, 2.0])


def shrink(x, sigma, label=None):
    return x / (1 + sigma[:, None, None, None])


def test_a_plain_function_becomes_a_denoiser_and_a_denoiser_stays_what_it_is():
    denoise = as_denoiser(shrink)
    assert as_denoiser(denoise) is denoise
    np.testing.assert_array_equal(denoise(X, SIGMA), shrink(X, SIGMA))
    assert (denoise.sigma_min, denoise.sigma_max) == (0, np.inf)
    assert (denoise.variance, denoise.corrector) == (None, None)
    np.testing.assert_array_equal(denoise.round_sigma(SIGMA), SIGMA)


def test_a_decorator_keeps_what_it_does_not_replace():
    first = Denoiser(shrink, sigma_min=0.1, sigma_max=50.0, round_sigma=jnp.round)
    other = dataclasses.replace(first, evaluate=lambda x, sigma, label: 2 * first(x, sigma, label))
    assert (other.sigma_min, other.sigma_max, other.round_sigma) == (0.1, 50.0, jnp.round)
    np.testing.assert_array_equal(other(X, SIGMA), 2 * shrink(X, SIGMA))


def test_with_noise_divides_the_difference_unless_the_denoiser_knows_better():
    x0_hat, eps_hat = jax.jit(as_denoiser(shrink).with_noise)(X, SIGMA)
    np.testing.assert_allclose(x0_hat + SIGMA[:, None, None, None] * eps_hat, X, rtol=1e-6)
    exact = Denoiser(shrink, noise=lambda x, sigma, label: (x, jnp.zeros_like(x)))
    np.testing.assert_array_equal(exact.with_noise(X, SIGMA)[1], 0)


def test_features_need_taps():
    taps = lambda x, sigma, label, at: (x, at)
    assert Denoiser(shrink, taps=taps).features(X, SIGMA, at="mid")[1] == "mid"
    with pytest.raises(ValueError, match="features.*at='mid'.*gives no features"):
        as_denoiser(shrink).features(X, SIGMA, at="mid")


@pytest.mark.parametrize(
    ("label", "none"),
    [
        (jnp.asarray([3, 5]), [-1, -1]),
        (jnp.asarray([3, 5], jnp.uint8), [-1, -1]),  # 255 would be a class
        (jnp.ones((2, 3)), np.zeros((2, 3))),
        ({"text": jnp.ones((2, 3))}, {"text": np.zeros((2, 3))}),
        (None, None),
    ],
)
def test_the_condition_that_means_none_has_the_shape_of_the_given_one(label, none):
    found = as_denoiser(shrink).unconditional(label)
    jax.tree.map(np.testing.assert_array_equal, found, none)
