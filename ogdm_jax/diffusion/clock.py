"""Times on the VP process's clock, at which discriminators and classifiers of noisy images are
trained and asked (arXiv 2211.17091).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion.process import VP

Levels = Any  # a number, a NumPy array or a JAX array of any shape; the result is alike
# Linear beta from 0.1 to 20: the clock on which the authors' discriminators are trained and used.
CLOCK = VP()
COSINE_S = 0.008


def vp_time(sigma: Levels) -> Levels:
    """Time t in [0, 1] of the linear VP process at which noise over signal is sigma: the inverse of
    sqrt(exp(B(t)) - 1).

    B(t) = 0.1 t + 19.9 t^2 / 2. sigma 0.044688 -> 0.01, 1 -> 0.25896, 80 -> 0.933511. Any shape;
    NumPy or JAX.
    """
    return CLOCK.time(sigma)


def vp_scale(t: Levels) -> Levels:
    """Signal scale m(t) = exp(-B(t) / 2), which is 1 / sqrt(1 + sigma^2) at t = vp_time(sigma)."""
    return CLOCK.scale(t)


def vp_sigma(t: Levels) -> Levels:
    """Noise level of a time on that clock: sqrt(exp(B(t)) - 1)."""
    return CLOCK.sigma(t)


def cosine_time(t: Levels) -> Levels:
    """The time of the cosine schedule (s = 0.008) with the signal-to-noise ratio of time t on the
    linear one.

    OpenAI's 64-pixel classifier was trained on the cosine clock: discriminators over it are asked
    at this time, in training too (the authors' sampling code converts, their training code does
    not).
    """
    xp = jnp if isinstance(t, jax.Array) else np
    start = np.cos(COSINE_S / (1 + COSINE_S) * np.pi / 2)
    return (1 + COSINE_S) * 2 / np.pi * xp.arccos(start * vp_scale(t)) - COSINE_S


def training_sigma(u: Levels, t_min: float = 1e-5, importance: bool = True) -> Levels:
    """Noise level of a uniform number u in [0, 1): log-uniform between sigma(t_min) = 0.001 and
    sigma(1) = 152.

    The density g^2 / s^2 of time in the authors' importance sampling is uniform in log sigma, so no
    antiderivative is needed (theirs loses the smallest times in float32). importance=False: uniform
    time on [t_min, 1].
    """
    if not importance:
        return vp_sigma(t_min + (1 - t_min) * u)
    low, high = (float(np.log(vp_sigma(np.float64(t)))) for t in (t_min, 1.0))
    return (jnp if isinstance(u, jax.Array) else np).exp(low + (high - low) * u)
