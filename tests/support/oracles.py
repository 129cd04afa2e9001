"""Data whose denoiser, score and density are known exactly, so that solvers can be held against the
truth.

Everything works in the dtype of x (float32, or float64 under x64). The mixture is the one of the
golden files.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from tests.support.golden_support import hash_values


def column(v, x):
    """[B] -> [B,1,1,1] of x's rank and dtype."""
    return jnp.asarray(v, x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(mean, std^2 I), each number on its own."""

    mean: float = 0.0
    std: float = 0.5

    def denoise(self, x, sigma, label=None):
        s2 = column(sigma, x) ** 2
        return (self.std**2 * x + s2 * self.mean) / (self.std**2 + s2)

    def score(self, x, sigma):
        return (self.mean - x) / (self.std**2 + column(sigma, x) ** 2)

    def log_density(self, x, sigma):
        """[B], summed over an image's numbers."""
        v = self.std**2 + column(sigma, x) ** 2
        axes = tuple(range(1, x.ndim))
        return jnp.sum(-0.5 * (x - self.mean) ** 2 / v - 0.5 * jnp.log(2 * np.pi * v), axes)

    def ode(self, x, sigma, sigma_next=0.0):
        """The probability-flow ODE solved exactly: (x - mean) scales with the standard deviation of
        the marginal.
        """
        ratio = jnp.sqrt((self.std**2 + sigma_next**2) / (self.std**2 + sigma**2))
        return self.mean + (x - self.mean) * ratio

    def draw(self, key, shape):
        return self.mean + self.std * jax.random.normal(key, shape)


class Mixture:
    """x0 ~ sum_k weight_k N(mu_k, scale_k^2 I), mu [K,H,W,C]; responsibilities per image over all
    its numbers.
    """

    def __init__(self, weights, scales, mu):
        self.weights, self.scales, self.mu = (
            np.asarray(v, np.float64) for v in (weights, scales, mu)
        )
        self.numbers = int(np.prod(self.mu.shape[1:]))

    @classmethod
    def golden(cls, config: dict) -> "Mixture":
        """README section 4: mu_k = mu_scale * hash(D, mu_p + k), flattened C, H, W; held here as H,
        W, C.
        """
        shape = tuple(config["shape"])
        size = int(np.prod(shape))
        mu = [
            hash_values(size, config["mu_p"] + k).reshape(shape)
            for k in range(len(config["weights"]))
        ]
        return cls(
            config["weights"],
            config["scales"],
            config["mu_scale"] * np.moveaxis(np.stack(mu), 1, -1),
        )

    def _parts(self, x, sigma, scale=1.0):
        """(log weight + log N_k [B,K] up to the constant, posterior means [B,K,...]) at signal
        scale `scale`.
        """
        alpha = column(jnp.broadcast_to(jnp.asarray(scale, x.dtype), x.shape[:1]), x)[:, None]
        mu, s2 = (
            jnp.asarray(self.mu, x.dtype)[None],
            jnp.asarray(self.scales, x.dtype)[None, :] ** 2,
        )
        s2 = s2.reshape(s2.shape + (1,) * (x.ndim - 1))
        v = alpha**2 * s2 + column(sigma, x)[:, None] ** 2
        away = x[:, None] - alpha * mu
        squares = jnp.sum(away**2 / v, tuple(range(2, away.ndim)))
        log = jnp.log(jnp.asarray(self.weights, x.dtype))[None] - 0.5 * squares
        return log - 0.5 * self.numbers * jnp.log(
            v.reshape(v.shape[:2])
        ), mu + alpha * s2 / v * away

    def denoise(self, x, sigma, label=None):
        log, means = self._parts(x, sigma)
        r = jax.nn.softmax(log, axis=1)
        return jnp.sum(r.reshape(r.shape + (1,) * (x.ndim - 1)) * means, axis=1)

    def score(self, x, sigma):
        return (self.denoise(x, sigma) - x) / column(sigma, x) ** 2

    def log_density(self, x, sigma, scale=1.0):
        """log sum_k pi_k N(x; scale mu_k, (scale^2 s_k^2 + sigma^2) I), [B]."""
        return logsumexp(self._parts(x, sigma, scale)[0], axis=1) - 0.5 * self.numbers * np.log(
            2 * np.pi
        )

    def draw(self, key, n: int):
        pick, noise = jax.random.split(key)
        k = jax.random.categorical(
            pick, jnp.log(jnp.asarray(self.weights, jnp.float32)), shape=(n,)
        )
        z = jax.random.normal(noise, (n, *self.mu.shape[1:]))
        return (
            jnp.asarray(self.mu, z.dtype)[k] + column(jnp.asarray(self.scales, z.dtype)[k], z) * z
        )


def two_bumps(side: int = 2) -> Mixture:
    """A small mixture with an ODE that bends: three components on side x side x 1 images."""
    size = side * side
    mu = [0.5 * hash_values(size, 300 + k).reshape(side, side, 1) for k in range(3)]
    return Mixture([0.5, 0.3, 0.2], [0.3, 0.5, 0.2], np.stack(mu))


def brute_force(x, sigma, references, mask=None):
    """Target and effective sample size by the definition, in float64 numpy."""
    b, n = len(x), len(references)
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, references))
    logits = -np.square(x[:, None] - y[None]).sum(-1) / (
        2 * np.asarray(sigma, np.float64)[:, None] ** 2
    )
    if mask is not None:
        logits = np.where(np.broadcast_to(mask, (b, n)), logits, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return weights @ y, 1 / np.square(weights).sum(1)


def parametrised(
    kind: str,
    xt,
    x0,
    sigma,
    alpha=1.0,
    sigma_data=0.5,
):
    """What a network of another parametrisation should predict when its clean image should be x0
    (spec/stf.md 1).

    kind    "x0": x0                        "eps": (x - alpha x0) / sigma        "score": (alpha x0
    - x) / sigma^2
            "v": (alpha x - x0) / sigma (alpha^2 + sigma^2 = 1)      "flow": (x - x0) / t, with
            sigma = t, alpha = 1 - t "F": (x0 - c_skip x) / c_out (EDM's network space, alpha = 1)

    Args:
      xt: [B, ...] = alpha * clean + sigma * noise.   x0: [B, ...], a clean image or a posterior
        mean.
      sigma: [B].   alpha: [B] or a number.   sigma_data: of EDM's preconditioning.

    Raises:
      ValueError: an unknown kind.
    """
    wide = (slice(None),) + (None,) * (xt.ndim - 1)
    sigma = jnp.broadcast_to(jnp.asarray(sigma, xt.dtype), (xt.shape[0],))[wide]
    alpha = jnp.broadcast_to(jnp.asarray(alpha, xt.dtype), (xt.shape[0],))[wide]
    if kind == "x0":
        return x0
    if kind == "eps":
        return (xt - alpha * x0) / sigma
    if kind == "score":
        return (alpha * x0 - xt) / jnp.square(sigma)
    if kind == "v":
        return (alpha * xt - x0) / sigma
    if kind == "flow":
        return (xt - x0) / sigma
    if kind == "F":
        norm = jnp.sqrt(jnp.square(sigma) + sigma_data**2)
        return (x0 - sigma_data**2 / jnp.square(norm) * xt) * norm / (sigma * sigma_data)
    raise ValueError(f"target: kind is {kind!r}; expected x0, eps, score, v, flow or F")
