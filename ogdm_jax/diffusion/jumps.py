"""Random jumps between noise levels: from level t down to a level s, as OGDM (2310.04041) draws
them.

Two ways: a uniform jump on EDM's warped time axis, and a uniform gap between the indices of a
discrete chain.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion.process import Numbers
from ogdm_jax.typing import Array


def tau(sigma: Array, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Array:
    """EDM's warped time of a noise level, 0 at sigma_max and 1 at sigma_min (2206.00364, eq. 5;
    same shape).
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (sigma ** (1 / rho) - high) / (low - high)


def sigma_of_tau(
    time: Numbers, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Numbers:
    """The inverse of tau on [0, 1]."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + time * (low - high)) ** rho


def next_sigma(
    sigma: Array,
    u: Array,
    k: float,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Array:
    """The level to project to: a uniform jump of at most k on the warped time axis (2310.04041's
    EDM code).

        tau_s = min(1, tau(sigma) + k u),   sigma_s = min(sigma, sigma(tau_s))

    For k > 1 the jump goes to the next lower level of a Karras grid of k levels, and from its last
    level to exactly 0; u is then not used (the code's discrete mode; there, levels are drawn from
    the grid).

    Args:
      sigma: [B] noise levels.   u: [B] in [0, 1).   k: a number >= 0.

    Returns:
      [B], sigma_min <= sigma_s <= sigma as long as sigma >= sigma_min (k <= 1).

    Raises:
      ValueError: k is negative, or above 1 and no whole number.
    """
    if k < 0 or (k > 1 and k % 1):
        raise ValueError(
            f"k: {k} given; expected a number from 0 to 1, or a whole number of levels"
        )
    sigma = 1.0 * jnp.asarray(sigma)
    if k > 1:
        levels = sigma_of_tau(np.arange(round(k)) / (round(k) - 1), sigma_min, sigma_max, rho)
        # A level that is itself on the grid, give or take its rounding, goes one further down.
        passed = jnp.sum(
            jnp.asarray(levels, sigma.dtype)[None, :] >= sigma[:, None] * (1 - 1e-5), axis=1
        )
        return jnp.asarray(np.append(levels, 0.0), sigma.dtype)[passed]
    time = jnp.minimum(1.0, tau(sigma, sigma_min, sigma_max, rho) + k * u)
    # The warp and back may end a rounding above sigma; a projection must never go up.
    return jnp.minimum(
        jnp.clip(sigma_of_tau(time, sigma_min, sigma_max, rho), sigma_min, sigma_max), sigma
    )


def gap(index: Array, u: Array, k: float, diffusion_steps: int = 1000) -> Array:
    """pair_T,k: s ~ U{0..min(k T, t)}, the length of the jump less one (2310.04041's
    guided-diffusion code).

    Args:
      index: [B] int32 t in 0..T-1.   u: [B] in [0, 1).   k: a fraction of T, rounded to whole steps
        (the code truncates, which makes 569 of 0.57 * 1000).

    Returns:
      [B] int32. The jump lands on index t - s - 1; t - s = 0 is clean data.
    """
    longest = jnp.minimum(round(k * diffusion_steps), index)
    drawn = jnp.floor(u * (longest + 1).astype(u.dtype)).astype(index.dtype)
    return jnp.minimum(drawn, longest)  # u close to 1 may round up to longest + 1


class Pair(NamedTuple):
    """From which level to which: sigma, sigma_next [B]; index, gap [B] int32 where the levels
    are discrete.
    """

    sigma: Array
    sigma_next: Array
    index: Array | None = None  # pyright: ignore[reportIncompatibleMethodOverride]  of tuple
    gap: Array | None = None


def index_pair(index: Array, gap: Array, table: np.ndarray) -> Pair:
    """The pair of an index t and a gap s [B] int32: from table[t] to table[t - s - 1], or to 0
    where t = s.
    """
    below = jnp.asarray(np.insert(table, 0, 0.0))
    return Pair(below[index + 1], below[index - gap], index, gap)
