"""The loss that trains a learned variance: one term of DDPM's variational bound.

A network of discrete steps may say the variance of its reverse transitions (`Denoiser.variance`).
The squared error does not reach it; this term does (arXiv 2102.09672 section 3.1: L_hybrid =
L_simple + 0.001 L_vlb, with the mean held constant in L_vlb).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.typing import Array


def variance_bound(
    table: Discrete, x0: Array, x0_hat: Array, sigma: Array, fraction: Array
) -> Array:
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) in bits per dimension, [B] (2102.09672 eq. 4-7).

    At the first step it is -log p(x0 | x_1) of 8-bit pixels. No gradient goes to x0_hat, as in
    guided-diffusion. Both Gaussians have one mean but for what x0_hat misses of x0, so x_t itself
    is not needed.

    Args:
      table: the process; sigma is looked up in it (nearest level).
      x0: [B,H,W,C] in [-1, 1].
      x0_hat: [B,H,W,C], the denoiser's output.
      sigma: [B] levels.
      fraction: [B,H,W,C], what `Denoiser.variance` gives: log variance = f log beta + (1 - f) log
        of the posterior's, whose entry 0 (log 0) repeats entry 1.
    """
    t, bar = table.index(sigma), table.alpha_bar
    posterior = table.posterior_variance
    small = np.log(np.append(posterior[1:2] if len(bar) > 1 else table.betas, posterior[1:]))
    mean_weight = table.betas * np.sqrt(table.alpha_bar_before) / (1 - bar)
    at = lambda values: per_example(jnp.asarray(values, x0.dtype)[t], x0)
    log_small, log_large = at(small), at(np.log(table.betas))
    log_variance = fraction * log_large + (1 - fraction) * log_small
    x0_hat = jax.lax.stop_gradient(x0_hat)
    gap = log_small - log_variance
    missed = jnp.square(at(mean_weight) * (x0 - x0_hat)) * jnp.exp(-log_variance)
    kl = 0.5 * (jnp.exp(gap) - 1 - gap + missed)
    last = -pixel_log_likelihood(x0, x0_hat, 0.5 * log_variance)
    bits = jnp.where(per_example(t, x0) == 0, last, kl) / math.log(2)
    return jnp.mean(bits, axis=tuple(range(1, x0.ndim)))


def pixel_log_likelihood(x0: Array, mean: Array, log_std: Array) -> Array:
    """The log of the mass that N(mean, std^2) puts on x0's bin of width 2 / 255, elementwise.

    2006.11239 eq. 13; the outermost bins reach to infinity. As in guided-diffusion the normal
    distribution function is approximated by (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2, and no
    mass counts for less than 1e-12.
    """

    def distribution(z: Array) -> Array:
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    precision = jnp.exp(-log_std)
    above = distribution(precision * (x0 - mean + 1 / 255))
    below = distribution(precision * (x0 - mean - 1 / 255))
    mass = jnp.where(x0 < -0.999, above, jnp.where(x0 > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(mass, 1e-12))
