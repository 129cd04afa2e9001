"""Score SDE's processes beside VP and VE (2011.13456): sub-VP, and VE with a thousand levels.

sub-VP is VP with c_in and t of its own process; SMLD is VE with the number of a level for c_noise.
"""

import functools

import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import precondition, process
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.precondition import Coefficients, Taps
from ogdm_jax.typing import Array, NetworkFn

SUBVP = process.SubVP()


def _subvp(sigma: Array) -> Coefficients:
    one, half = jnp.ones_like(sigma), sigma / 2
    scale = 1 / (half + jnp.sqrt(1 + jnp.square(half)))  # s of sigma = 1 / s - s
    return one, -sigma, scale, (precondition.VP_STEPS - 1) * SUBVP.time(sigma)


def subvp(network_fn: NetworkFn, *, taps: Taps | None = None) -> Denoiser:
    """Score SDE's sub-VP networks (2011.13456): score = -F / std as in VP, so F = eps; levels
    sigma(1e-5) = 1e-6 to sigma(1) = 152.
    """
    low, high = float(SUBVP.sigma(1e-5)), float(SUBVP.sigma(1.0))
    return precondition.make(network_fn, _subvp, low, high, taps=taps)


def _smld_index(sigma: Array, low: float, high: float, steps: int) -> Array:
    """Number of the level nearest in log sigma, 0 the highest."""
    at = (steps - 1) * jnp.log(high / sigma) / np.log(high / low)
    return jnp.clip(jnp.round(at), 0, steps - 1)


def smld(
    network_fn: NetworkFn,
    sigma_min: float = 0.02,
    sigma_max: float = 100.0,
    steps: int = 1000,
    *,
    taps: Taps | None = None,
) -> Denoiser:
    """Score SDE's discrete VE networks (2011.13456, section 3.1; 1907.05600): VE whose network is
    told the number of one of `steps` levels in geometric progression, 0 the highest.

    Only the number is rounded, as in `iddpm`; samplers round their grid by round_sigma.
    """
    index = functools.partial(_smld_index, low=sigma_min, high=sigma_max, steps=steps)
    level = lambda sigma: sigma_max * (sigma_min / sigma_max) ** (index(sigma) / (steps - 1))

    def coefficients(sigma: Array) -> Coefficients:
        one = jnp.ones_like(sigma)
        return one, sigma, one, index(sigma)

    low, high = sigma_min, sigma_max
    return precondition.make(network_fn, coefficients, low, high, round_sigma=level, taps=taps)
