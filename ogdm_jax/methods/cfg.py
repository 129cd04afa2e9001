"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), also within a limited interval
(arXiv 2404.07724).

    D_w(x, sigma, y) = D(x, sigma, -) + w (D(x, sigma, y) - D(x, sigma, -))

for a denoiser trained with label dropout (config.data.label_dropout > 0). w = 1 is the conditional
model, w = 0 the unconditional one; the papers also write 1 + w or s for it. Outside the interval
the conditional model answers alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.methods.contract import Guidance
from ogdm_jax.typing import Array, Denoise, PyTree


def guide(
    denoise: Denoise, weight: Any = 1.5, sigma_min: float = 0.0, sigma_max: float = float("inf")
) -> Denoiser:
    """The denoiser under classifier-free guidance where sigma_min <= sigma <= sigma_max.

    Both evaluations run as one batch of twice the size; outside the interval (a real branch, where
    every example is outside) there is only one.

    Args:
      denoise: trained with label dropout. Its `corrector` is guided too; its range of levels,
        rounding and learned variance (that of the given labels) are handed on. Under `dg.guide` is
        the published order; over it, the log ratio is asked for the label -1 as well.
      weight: w above; a number or an array.
      sigma_min, sigma_max: the interval, per example; 2404.07724 finds 0.28 to 2.9 best on
        ImageNet-512.

    Raises:
      ValueError: an empty interval; at the call, no labels.
    """
    if not sigma_min <= sigma_max:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}; expected sigma_min <= sigma_max"
        )
    denoise = as_denoiser(denoise)
    if isinstance(weight, int | float) and weight == 1:
        return denoise

    def guided(evaluate: Callable[..., PyTree], x: Array, sigma: Array, label: PyTree) -> PyTree:
        """evaluate's [x0_hat, ...] for the given labels, with x0_hat guided."""
        if label is None:
            raise ValueError(
                "label=None; classifier-free guidance expects labels of a conditional denoiser"
            )
        active = (sigma >= sigma_min) & (sigma <= sigma_max)

        def both() -> PyTree:
            twice = lambda v: jnp.concatenate([v, v]) if jnp.ndim(v) else v
            labels = jax.tree.map(
                lambda *pair: jnp.concatenate(pair), label, denoise.unconditional(label)
            )
            out = evaluate(twice(x), twice(sigma), labels)
            (conditional, plain), *rest = (jnp.split(v, 2) for v in out)
            w = jnp.where(active, jnp.asarray(weight, sigma.dtype), 1)
            return [plain + per_example(w, plain) * (conditional - plain), *(v[0] for v in rest)]

        if sigma_min <= 0 and sigma_max == float("inf"):
            return both()
        return jax.lax.cond(jnp.any(active), both, lambda: evaluate(x, sigma, label))

    def evaluate(x: Array, sigma: Array, label: PyTree = None) -> Array:
        return guided(lambda *at: [denoise(*at)], x, sigma, label)[0]

    def variance(x: Array, sigma: Array, label: PyTree = None) -> tuple[Array, Array]:
        x0_hat, fraction = guided(lambda *at: list(denoise.variance(*at)), x, sigma, label)
        return x0_hat, fraction

    return dataclasses.replace(
        denoise,
        evaluate=evaluate,
        variance=denoise.variance and variance,
        noise=None,
        corrector=denoise.corrector and guide(denoise.corrector, weight, sigma_min, sigma_max),
    )


def guidance(
    weight: float = 1.5, sigma_min: float = 0.0, sigma_max: float = float("inf")
) -> Guidance:
    """Classifier-free guidance as one sampling method; the weight is an array, so another one
    compiles nothing.
    """

    def shift(denoise: Denoiser, frozen: PyTree) -> Denoiser:
        return guide(denoise, frozen["weight"], sigma_min, sigma_max)

    guide(
        lambda x, sigma, label=None: x, weight, sigma_min, sigma_max
    )  # refuses a bad interval here
    return Guidance(name="cfg", shift=shift, frozen={"weight": np.float32(weight)})
