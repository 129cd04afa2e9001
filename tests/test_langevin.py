"""The predictor-corrector sampler against what it converges to (the authors' code: test_golden)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids
from ogdm_jax.inverse import operators
from ogdm_jax.methods import ddnm, dsg
from ogdm_jax.sampling.langevin import langevin_step
from ogdm_jax.sampling.sampler import sample
from tests.support.oracles import Gaussian, two_bumps

BUMPS, DATA = two_bumps(), Gaussian(0.3, 0.5)


def images(z, denoise=DATA.denoise, n=200, **how):
    run = lambda z: sample(denoise, z, grids.edm(n), "pc", jax.random.key(1), **how)
    return np.asarray(jax.jit(run)(z))


@pytest.mark.slow_cases("0-*", "1-ve")
@pytest.mark.parametrize("sde", ["ve", "vp"])
@pytest.mark.parametrize("count", [0, 1])
def test_moments(sde, count):
    """Langevin steps of 4,096 numbers keep a Gaussian up to 1 / (1 - snr^2) of its variance."""
    z = jax.random.normal(jax.random.key(0), (16, 64, 64, 1))
    x = images(z, sde=sde, corrector_steps=count, snr=0.1)
    assert abs(x.std() / 0.5 - 1) < 0.03 and abs(x.mean() - 0.3) < 0.02


def test_without_corrector_it_is_the_ancestral_step_of_the_reverse_sde():
    z, key = jax.random.normal(jax.random.key(0), (3, 2, 2, 1)), jax.random.key(1)
    x = images(z, BUMPS.denoise, 9, corrector_steps=0)
    other = sample(BUMPS.denoise, z, grids.edm(9), "ancestral", key, variance="diffusion")
    np.testing.assert_allclose(x, other, atol=1e-5)


@pytest.mark.slow_cases("1.0")
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_langevin_stays_where_it_is(alpha):
    """A thousand steps at one level: the exact stationary variance of the scheme."""
    shape, sigma, snr = (4, 64, 64, 1), jnp.full(4, 0.8), 0.3
    std = np.sqrt(0.25 + 0.64)
    x = DATA.mean + 2 * std * jax.random.normal(jax.random.key(0), shape)

    def again(i, x):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), shape)
        return langevin_step(x, DATA.denoise(x, sigma), sigma, noise, snr, alpha)

    x = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, again, x))(x)
    # With ||z|| / ||d|| = 1 / rms(d) the step contracts by 1 - 2 k v' / v and adds 4 k v'.
    contraction = 1 - 2 * snr**2 * alpha
    rms = np.sqrt(1 / (1 - snr**2 * alpha))
    assert 0 < contraction < 1 and abs(float(x.std()) / (std * rms) - 1) < 0.02
    assert abs(float(x.mean()) - 0.3) < 0.05


def test_an_image_depends_on_its_key_alone():
    keys, z = (
        jax.vmap(jax.random.key)(jnp.arange(6)),
        jax.random.normal(jax.random.key(0), (6, 2, 2, 1)),
    )
    run = jax.jit(lambda z, k: sample(BUMPS.denoise, z, grids.edm(6), "pc", k, corrector_steps=2))
    np.testing.assert_allclose(run(z[2:4], keys[2:4]), run(z, keys)[2:4], rtol=1e-5, atol=1e-6)


def test_what_guidance_owns():
    """The predictor's step: DDNM meets the measurement exactly, DSG lowers its loss."""
    z = jax.random.normal(jax.random.key(0), (32, 4, 4, 1))
    mask = np.zeros((4, 4), np.float32)
    mask[::2] = 1
    operator, y = operators.inpaint(mask), 0.7 * jnp.ones_like(z) * mask[None, ..., None]
    x = images(z, n=40, guidance=ddnm.guidance(operator, y))
    np.testing.assert_allclose(x[:, ::2], 0.7, atol=1e-5)
    loss = operators.measurement_loss(operator, y)
    guided, plain = (images(z, n=40, guidance=g) for g in (dsg.guidance(loss, 0.3), ()))
    assert loss(guided).mean() < 0.6 * loss(plain).mean()


def test_a_score_of_zero_says_no_size_and_nan_stays():
    x = jnp.ones((2, 2, 2, 1)).at[1, 0, 0, 0].set(jnp.nan)
    moved = langevin_step(x, x, jnp.ones(2), jnp.ones_like(x), 0.16)
    np.testing.assert_array_equal(moved[0], x[0])
    assert np.isnan(moved[1]).all()
