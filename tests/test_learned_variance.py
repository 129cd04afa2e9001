"""The learned variance of a discrete model: what its loss asks for is what makes ancestral steps
exact.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import grids
from ogdm_jax.diffusion.bound import variance_bound
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.sampling.sampler import sample
from tests.support.oracles import Gaussian

DATA = Gaussian(0.0, 0.6)
STEPS = 6
TABLE = Discrete.make(keep=grids.ddim_timesteps(STEPS, spacing="even"))


def best_fraction():
    """[T] of the true reverse variance: the posterior's plus what x0_hat leaves open of x0."""
    sigma, bar = TABLE.sigma, TABLE.alpha_bar
    open_ = DATA.std**2 * sigma**2 / (DATA.std**2 + sigma**2)
    weight = TABLE.betas * np.sqrt(TABLE.alpha_bar_before) / (1 - bar)
    true = TABLE.posterior_variance + weight**2 * open_
    small = np.log(np.append(TABLE.posterior_variance[1:2], TABLE.posterior_variance[1:]))
    return (np.log(true) - small) / (np.log(TABLE.betas) - small)


def test_the_loss_is_least_at_the_true_variance():
    x0, eps = jax.random.normal(jax.random.key(0), (2, 400, 8, 8, 1))
    x0 = DATA.std * x0
    for t in range(1, STEPS):
        sigma = jnp.full(400, TABLE.sigma[t], jnp.float32)
        x0_hat = DATA.denoise(x0 + TABLE.sigma[t] * eps, sigma)

        @jax.jit
        def loss(fraction, sigma=sigma, x0_hat=x0_hat):
            spread = jnp.full(x0.shape, fraction)
            return jnp.mean(variance_bound(TABLE, x0, x0_hat, sigma, spread))

        best = best_fraction()[t]
        around = [float(loss(best + off)) for off in (-0.2, 0.0, 0.2)]
        assert min(around) == around[1]
        slope = jax.grad(loss)
        assert slope(best - 0.2) < 0 < slope(best + 0.2)
        assert abs(slope(best)) < 0.1 * min(abs(slope(best - 0.2)), abs(slope(best + 0.2)))


def test_ancestral_steps_with_it_are_exact_for_a_gaussian():
    """Six steps keep the data's spread; the smaller fixed variance loses a good part of it."""
    levels, best = jnp.asarray(TABLE.sigma, jnp.float32), jnp.asarray(best_fraction(), jnp.float32)

    def variance(x, sigma, label=None):
        at = best[jnp.searchsorted(levels, sigma * 0.999)].reshape(-1, 1, 1, 1)
        return DATA.denoise(x, sigma), jnp.broadcast_to(at, x.shape)

    denoise = Denoiser(DATA.denoise, variance=variance)
    z = jax.random.normal(jax.random.key(1), (500, 8, 8, 1))
    grid = np.append(TABLE.sigma[::-1], 0.0)

    def spread(kind):
        run = jax.jit(
            lambda z: sample(
                denoise, z, grid, "ancestral", key=jax.random.key(2), variance=kind
            ).std()
        )
        return float(run(z))

    assert spread(None) == spread("learned")
    np.testing.assert_allclose(spread("learned"), DATA.std, rtol=0.01)
    assert spread("small") < 0.9 * DATA.std and spread("large") > 1.02 * DATA.std
