"""The one object that everything speaks of: denoise(x, sigma, label) -> x0_hat.

x = x0 + sigma * eps with eps ~ N(0, I); sigma is the standard deviation of the noise around an
unscaled image. Preconditioning (precondition.py) makes a denoiser of a network; losses, samplers
and guidance ask it for what its fields say, and for nothing else.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ogdm_jax.brief import brief
from ogdm_jax.typing import Array, Denoise, PyTree

Evaluation = Callable[..., list[Array]]  # (x, sigma, label) -> [x0_hat], or [x0_hat, fraction]


def same_level(sigma: Array) -> Array:
    """The level sigma as it is: the rounding of a network that answers at every level."""
    return sigma


def no_condition(label: PyTree) -> PyTree:
    """The condition of the same shape that means "none": class -1, and zeros for float vectors."""

    def none(v: Array) -> Array:
        if jnp.issubdtype(v.dtype, jnp.unsignedinteger):  # has no -1
            v = v.astype(jnp.int32)
        return jnp.full_like(v, -1 if jnp.issubdtype(v.dtype, jnp.integer) else 0)

    return jax.tree.map(none, label)


def of_noise(sigma: Array) -> tuple[Array, Array]:
    """(c_skip, c_out) of a network that gives the noise: x0_hat = x - sigma F."""
    return jnp.ones_like(sigma), -sigma


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """E[x0 | x]: x [B,H,W,C], sigma [B] > 0, label -> x0_hat [B,H,W,C].

    Called like a function. A label is int32 [B] classes (-1: none), float vectors [B,K], any pytree
    of arrays with a row per image, or None. What a network receives beside the label (augmentation
    labels, dropout keys) is bound where the denoiser is made; such a denoiser answers for that
    batch of images only.

    A decorator (guidance) is `dataclasses.replace`: it gives a new `evaluate`, says what it does to
    `variance`, `noise` and `corrector`, which also compute x0_hat, and keeps the rest.

    Attributes:
      evaluate: (x, sigma, label) -> x0_hat.
      sigma_min: lowest noise level that the denoiser is made for.
      sigma_max: highest noise level that the denoiser is made for.
      round_sigma: sigma, any shape -> the levels at which the network really answers (the identity
        but for networks of discrete steps). Samplers round their grid with it.
      variance: None, or (x, sigma, label) -> (x0_hat, fraction [B,H,W,C]) in one evaluation, the
        learned variance of a DDPM step. x0_hat is what a call returns; fraction says where the
        variance lies between the logarithms of the smaller and the larger one of
        `steps.posterior_std` (arXiv 2102.09672 eq. 15) and may leave [0, 1].
      corrector: the denoiser of a Heun step's second evaluation; None: this one.
      noise: None, or (x, sigma, label) -> (x0_hat, eps_hat) in one evaluation, behind `with_noise`.
      taps: None, or (x, sigma, label, at) -> features, behind `features`.
      unconditional: label -> the condition of the same shape that means none.
      parts: sigma [B] -> (c_skip, c_out) of x0_hat = c_skip x + c_out F, where F is what the
        network gives (`precondition`). The default is that of noise, F = (x - x0_hat) / sigma.
    """

    evaluate: Denoise
    sigma_min: float = 0.0
    sigma_max: float = float("inf")
    round_sigma: Callable[[Array], Array] = same_level
    variance: Callable[[Array, Array, PyTree], tuple[Array, Array]] | None = None
    corrector: "Denoiser | None" = None
    noise: Callable[[Array, Array, PyTree], tuple[Array, Array]] | None = None
    taps: Callable[[Array, Array, PyTree, str], PyTree] | None = None
    unconditional: Callable[[PyTree], PyTree] = no_condition
    parts: Callable[[Array], tuple[Array, Array]] = of_noise
    __repr__ = brief

    def __call__(self, x: Array, sigma: Array, label: PyTree = None) -> Array:
        """x0_hat [B,H,W,C]."""
        return self.evaluate(x, sigma, label)

    def with_noise(self, x: Array, sigma: Array, label: PyTree = None) -> tuple[Array, Array]:
        """(x0_hat, eps_hat) in one evaluation, with x = x0_hat + sigma eps_hat.

        The field `noise` computes eps_hat without the cancellation of (x - x0_hat) / sigma, which
        costs 4e-5 at sigma 0.002; without that field it is this difference.
        """
        if self.noise is not None:
            return self.noise(x, sigma, label)
        x0_hat = self.evaluate(x, sigma, label)
        per_image = jnp.asarray(sigma, x0_hat.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
        return x0_hat, (x - x0_hat) / per_image

    def features(self, x: Array, sigma: Array, label: PyTree = None, *, at: str) -> PyTree:
        """The network's features of a noisy image: an array [B,...], or a list of them.

        Args:
          x: [B,H,W,C] at level sigma.
          sigma: [B].
          label: as for a call.
          at: which features: names of the network's taps or blocks (see `models.Model.denoiser`).

        Raises:
          ValueError: this denoiser gives no features.
        """
        if self.taps is None:
            raise ValueError(
                f"features(at={at!r}): this denoiser gives no features; expected one of a network "
                "(models.Model.denoiser), or Denoiser(..., taps=...)"
            )
        return self.taps(x, sigma, label, at)


def as_denoiser(fn: Denoise) -> Denoiser:
    """A Denoiser as it is; a plain function (x, sigma, label) -> x0_hat as a Denoiser of it."""
    return fn if isinstance(fn, Denoiser) else Denoiser(fn)


def decorated(denoise: Denoiser, around: Callable[..., list[Array]]) -> Denoiser:
    """The denoiser with another x0_hat: in calls, beside the learned variance, in the corrector.

    Args:
      denoise: the denoiser.
      around: (base, evaluate, x, sigma, label) -> what the list evaluate(x, sigma, label) holds,
        with another x0_hat. evaluate gives [x0_hat], or [x0_hat, fraction] of `variance`; base is
        the denoiser that it belongs to: this one, or its corrector.
    """

    def evaluate(x: Array, sigma: Array, label: PyTree = None) -> Array:
        return around(denoise, lambda *at: [denoise(*at)], x, sigma, label)[0]

    def variance(x: Array, sigma: Array, label: PyTree = None) -> tuple[Array, Array]:
        learned = denoise.variance
        assert learned is not None  # replaced below only where it is there
        x0_hat, fraction = around(denoise, lambda *at: list(learned(*at)), x, sigma, label)
        return x0_hat, fraction

    return dataclasses.replace(
        denoise,
        evaluate=evaluate,
        variance=denoise.variance and variance,
        noise=None,
        corrector=denoise.corrector and decorated(denoise.corrector, around),
    )


def clipped(denoise: Denoiser) -> Denoiser:
    """The denoiser with x0_hat clamped to [-1, 1], as guided-diffusion samples.

    Slopes and eps_hat follow the clamped x0_hat: (x - x0_hat) / sigma.
    """

    def clamped(_: Denoiser, evaluate: Evaluation, *at: PyTree) -> list[Array]:
        x0_hat, *rest = evaluate(*at)
        return [jnp.clip(x0_hat, -1, 1), *rest]

    return decorated(denoise, clamped)
