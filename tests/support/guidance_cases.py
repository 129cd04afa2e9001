"""A small guided problem for the tests of guidance: Gaussian data, half the pixels seen, one step and
its parts.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import steps
from ogdm_jax.inverse import operators
from ogdm_jax.sampling.churn import Info
from tests.support.oracles import Gaussian

SHAPE = (3, 4, 4, 2)
MASK = np.zeros((1, 4, 4, 1), np.float32)
MASK[:, ::2] = 1
DATA = Gaussian(0.1, 0.5)
Y = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32) * MASK
LOSS = operators.measurement_loss(operators.inpaint(MASK), Y)
LATENTS = np.random.default_rng(6).normal(size=SHAPE).astype(np.float32)


def norms(v):
    return np.linalg.norm(np.asarray(v, np.float64).reshape(len(v), -1), axis=1)


def info_at(i: int, n: int, sigma: float = 1.0):
    keys = jax.random.split(jax.random.key(i), 3)
    return Info(jnp.int32(i), n, jnp.full(3, sigma), jnp.full(3, 0.6 * sigma), keys)


def evaluate_at(info):
    return lambda x: DATA.denoise(x, info.sigma)


def transition_at(info):
    return lambda x0, x: steps.ddim_moments(x, x0, info.sigma, info.sigma_next, 1.0)
