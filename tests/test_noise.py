"""Noise laws against their distribution functions, and the stratified draw against its
definition.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ogdm_jax import randomness
from ogdm_jax.diffusion import noise, process

pytestmark = pytest.mark.fast

N = 4096


def keys(n: int = N, seed: int = 0):
    return randomness.example_keys(jax.random.key(seed), "sigma", jnp.arange(n))


def uniforms(name: str, sigma: np.ndarray) -> np.ndarray:
    """The probability integral transform of each law, written from its definition."""
    if name == "edm":
        return stats.norm.cdf((np.log(sigma) + 1.2) / 1.2)
    if name == "vp":
        return (process.VP().time(sigma) - 1e-5) / (1 - 1e-5)
    if name == "ve":
        return np.log(sigma / 0.02) / math.log(100 / 0.02)
    low, high = np.arctan([0.002 / 0.5, 80 / 0.5])
    return (np.arctan(sigma / 0.5) - low) / (high - low)


LAWS = {"edm": noise.edm, "vp": noise.vp, "ve": noise.ve, "angle": noise.angle_uniform}


@pytest.mark.parametrize("name", LAWS)
def test_distribution(name):
    sigma = np.asarray(LAWS[name]().sample(keys()), np.float64)
    assert sigma.shape == (N,) and np.all(sigma > 0)
    assert stats.kstest(uniforms(name, sigma), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.default
def test_stratified_draws_one_level_in_every_quantile(name):
    law = LAWS[name](stratified=True)
    n = 64
    sigma = np.asarray(law.sample(keys(n), index=jnp.arange(n), batch=n), np.float64)
    u = uniforms(name, sigma)
    u = 1 - u if name == "vp" else u  # VP's level falls with the draw
    np.testing.assert_array_equal(
        np.floor(u * n + 1e-2 * (u * n % 1 < 0.01)).astype(int), np.arange(n)
    )
    # Moved by a common number there is still one in every n-th part of the circle, and the law is
    # unchanged.
    many = [
        law.sample(keys(n, s), index=jnp.arange(n), batch=n, key=jax.random.key(s))
        for s in range(30)
    ]
    assert (
        stats.kstest(uniforms(name, np.asarray(many, np.float64).ravel()), "uniform").pvalue > 1e-3
    )
    halves = [
        law.sample(keys(n)[part], index=jnp.arange(n)[part], batch=n)
        for part in (slice(0, 32), slice(32, 64))
    ]
    np.testing.assert_allclose(
        np.concatenate(halves), sigma, rtol=1e-6
    )  # a device's share is a share of the same draw


def test_moments_and_clip():
    law = noise.edm(mean=0.4, std=2.0, clip=(0.1, 5.0))
    sigma = np.asarray(law.sample(keys()))
    assert sigma.min() == np.float32(0.1) and sigma.max() == np.float32(5.0)
    log = np.log(np.asarray(noise.edm(mean=0.4, std=2.0).sample(keys())))
    assert abs(log.mean() - 0.4) < 4 * 2 / math.sqrt(N) and abs(log.std() - 2) < 0.1


def test_ends_of_the_uniform_laws():
    ends = jnp.asarray([0.0, 1.0])
    np.testing.assert_allclose(noise.ve().sigma(ends), [0.02, 100], rtol=1e-5)
    np.testing.assert_allclose(noise.vp().sigma(ends), [152.167, 1.0005e-3], rtol=1e-3)
    np.testing.assert_allclose(noise.angle_uniform().sigma(ends), [0.002, 80], rtol=1e-3)


@pytest.mark.parametrize(
    "name,closed", [("vp", lambda s: s**-2), ("ve", lambda s: s**-2), ("edm", lambda s: s**-2 + 4)]
)
def test_weights(name, closed):
    sigma = jnp.asarray([0.002, 0.3, 1.0, 80.0])
    np.testing.assert_allclose(LAWS[name]().weight(sigma), closed(sigma), rtol=1e-5)


def test_draws_belong_to_examples():
    law = noise.edm()
    np.testing.assert_array_equal(law.sample(keys()[10:20]), law.sample(keys())[10:20])


def test_errors():
    with pytest.raises(ValueError, match="std 0"):
        noise.edm(std=0)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        noise.ve(sigma_min=2, sigma_max=1)
    with pytest.raises(ValueError, match="index and batch"):
        noise.edm(stratified=True).sample(keys(4))
    with pytest.raises(ValueError, match="'cauchy'"):
        noise.NoiseDistribution("cauchy", jnp.exp, jnp.exp)
