"""Index-grid samplers: published numbers, and a whole DDIM chain written out against our
coordinate.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, process
from ogdm_jax.sampling import discrete
from ogdm_jax.sampling.sampler import sample
from tests.support.oracles import column, two_bumps


def test_index_grid_goldens():
    """DDIM and PNDM of a DDPM with the exact eps of N(0, .25); the published digits are
    float32's.
    """
    table = process.Discrete.make()

    def exact(x, t):
        bar = jnp.asarray(table.alpha_bar)[t.astype(jnp.int32)]
        return column(jnp.sqrt(1 - bar) / (1 - bar + 0.25 * bar), x) * x

    with jax.enable_x64(True):
        latents = jnp.asarray([1.0, -0.5]).reshape(2, 1, 1, 1)
        for n, want in ((10, 0.3741288), (20, 0.4337346)):
            x = discrete.ddim(exact, latents, n, clip=False)
            np.testing.assert_allclose(x.ravel(), [want, -want / 2], atol=1.5e-6)
        for n, order, want in (
            (9, 2, 0.4361751),
            (19, 2, 0.4842141),
            (11, 4, 0.4987150),
            (41, 4, 0.5018901),
        ):
            x = discrete.pndm(exact, latents, n, order=order)
            np.testing.assert_allclose(x.ravel(), [want, -want / 2], atol=1.5e-6)
    with pytest.raises(ValueError, match="order=3"):
        discrete.pndm(exact, jnp.ones((1, 1, 1, 1)), 9, order=3)
    with pytest.raises(ValueError, match="n=1000"):
        discrete.pndm(exact, jnp.ones((1, 1, 1, 1)), 1000)


def test_vp_ddim_chain_is_ve_euler():
    """A whole DDIM chain in x_vp, written out, against Euler on our grid."""
    table = process.Discrete.make()
    kept = grids.ddim_timesteps(20)[::-1]
    with jax.enable_x64(True):
        z = jax.random.normal(jax.random.key(0), (2, 3, 3, 1), jnp.float64)
        data = two_bumps(3)
        denoise = jax.jit(data.denoise)
        x = z
        for t, before in zip(kept, [*kept[1:], -1]):
            a, b = table.alpha_bar[t], table.alpha_bar[before] if before >= 0 else 1.0
            x0 = denoise(x / np.sqrt(a), jnp.full(2, np.sqrt(1 / a - 1)))
            eps = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
            x = np.sqrt(b) * x0 + np.sqrt(1 - b) * eps
        sigmas = grids.ddim(20)
        start = z * np.sqrt(1 + sigmas[0] ** 2) / sigmas[0]
        np.testing.assert_allclose(
            sample(data.denoise, start, sigmas, "euler"), x, rtol=0, atol=1e-10
        )
