"""Pi-GDM on a Gaussian prior, where its posterior mean is exact, and where it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.config import ConfigError
from ogdm_jax.diffusion import grids
from ogdm_jax.inverse import operators
from ogdm_jax.methods import pigdm
from ogdm_jax.sampling.sampler import sample
from tests.support.guidance_cases import DATA as PRIOR
from tests.support.guidance_cases import LATENTS, evaluate_at, info_at, transition_at

pytestmark = pytest.mark.fast


def matrix_of(operator):
    return np.asarray(operator.forward(jnp.eye(16).reshape(16, 4, 4, 1)), np.float64).reshape(
        16, -1
    )


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("name", ["super_resolution", "gaussian_blur", "inpaint"])
def test_the_posterior_mean_is_exact(name, std):
    """E[x0 | x, y] of a Gaussian, by the normal equations in float64."""
    mask = np.ones((4, 4), np.float32)
    mask[1] = 0
    operator = {
        "super_resolution": lambda: operators.super_resolution(2, 4),
        "gaussian_blur": lambda: operators.gaussian_blur(3, 0.4),
        "inpaint": lambda: operators.inpaint(mask),
    }[name]()
    at = info_at(1, 6)
    y = operator.forward(0.2 + 0.5 * jax.random.normal(jax.random.key(7), LATENTS.shape))
    rule = pigdm.guidance(operator, y, std, data_std=PRIOR.std).transition
    _, got = rule(evaluate_at(at), transition_at(at), LATENTS, jnp.zeros_like(LATENTS), at)
    flat = lambda v: np.moveaxis(np.asarray(v, np.float64), -1, 1).reshape(6, -1)
    a = matrix_of(operator).T  # [m, 16]
    x0 = flat(PRIOR.denoise(LATENTS, at.sigma))
    r2 = PRIOR.std**2 / (PRIOR.std**2 + 1.0)
    gain = r2 * a.T @ np.linalg.pinv(r2 * a @ a.T + std**2 * np.eye(len(a)), rcond=1e-9)
    want = x0 + (flat(y) - x0 @ a.T) @ gain.T
    np.testing.assert_allclose(flat(got), want, atol=2e-3 if std == 0 else 1e-4)


def test_samples_are_those_of_the_posterior():
    """Mean and spread of 8,192 numbers, denoised from one noisy look at each."""
    z = jax.random.normal(jax.random.key(0), (512, 4, 4, 1))
    y = jnp.full_like(z, 0.9)
    guidance = pigdm.guidance(operators.identity(), y, 0.4, data_std=PRIOR.std)
    run = lambda z: sample(
        PRIOR.denoise, z, grids.edm(300), "ancestral", jax.random.key(1), guidance=guidance
    )
    x = np.asarray(jax.jit(run)(z))
    precision = 1 / PRIOR.std**2 + 1 / 0.4**2
    mean = (PRIOR.mean / PRIOR.std**2 + 0.9 / 0.4**2) / precision
    assert abs(x.mean() - mean) < 0.02 and abs(x.std() * precision**0.5 - 1) < 0.04


def test_what_is_refused():
    y = jnp.zeros((3, 4, 4, 1))
    with pytest.raises(ValueError, match="pigdm with operator 'phase_retrieval': its singular"):
        pigdm.guidance(operators.phase_retrieval(), y)
    with pytest.raises(ConfigError, match="pigdm.data_std: 0.0 given; expected a positive"):
        pigdm.guidance(operators.identity(), y, data_std=0.0)
    for solver in ("heun", "euler", "unipc"):
        guidance = pigdm.guidance(operators.identity(), LATENTS)
        with pytest.raises(ValueError, match="pigdm with solver"):
            sample(PRIOR.denoise, LATENTS, grids.edm(4), solver, guidance=guidance)
