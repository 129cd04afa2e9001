"""How loss guidance takes its gradient: through the network, or at x0_hat; of a loss, or of a loss
that is smoothed by noise.

A loss is any differentiable x0_hat [B,H,W,C] -> [B]; images never look at each other. Where it is
nan, so is the gradient: an image that was not guided must not look like one that was.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ogdm_jax import randomness
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Evaluate
from ogdm_jax.typing import Array

Loss = Callable[[Array], Array]


def clipped(x0_hat: Array, clip: bool) -> Array:
    """x0_hat, in [-1, 1] if clip."""
    return jnp.clip(x0_hat, -1, 1) if clip else x0_hat


def of_step(
    loss: Loss,
    evaluate: Evaluate,
    x: Array,
    info: Info,
    clip: bool = False,
    samples: int = 0,
    backward: bool = True,
) -> tuple[Array, Array, Array]:
    """(x0_hat like x, loss [B], gradient like x) of one step.

    Args:
      loss: x0_hat [B,H,W,C] -> [B].
      evaluate: x -> x0_hat.
      x: [B,H,W,C].
      info: of the step.
      clip: the loss sees x0_hat clipped to [-1, 1], as in DPS's and DSG's code for linear problems;
        the gradient of clipped pixels is 0.
      samples: above 0, the loss is `smoothed` by so many draws.
      backward: take the gradient `through_network`, else `at_x0`.
    """
    seen = (lambda x0_hat: loss(clipped(x0_hat, clip))) if clip else loss
    seen = smoothed(seen, samples, info) if samples else seen
    return (through_network if backward else at_x0)(seen, evaluate, x)


def through_network(loss: Loss, evaluate: Evaluate, x: Array) -> tuple[Array, Array, Array]:
    """The gradient of loss(D(x)) with respect to x: one evaluation and one backward pass of the
    network.

    Args:
      loss: x0_hat [B,H,W,C] -> [B].
      evaluate: x -> x0_hat.
      x: [B,H,W,C].

    Returns:
      (x0_hat like x, loss [B], gradient like x).

    Raises:
      ValueError: the loss gives something else than one number per image.
    """

    def value(x: Array) -> tuple[Array, Array]:
        x0_hat = evaluate(x)
        return loss(x0_hat), x0_hat

    # A pull-back of ones and not the gradient of a sum: no sum over images, which may lie on
    # several devices.
    values, pull, x0_hat = jax.vjp(value, x, has_aux=True)
    _check(values, x)
    return x0_hat, values, known(values, pull(jnp.ones_like(values))[0])


def at_x0(loss: Loss, evaluate: Evaluate, x: Array) -> tuple[Array, Array, Array]:
    """The gradient at x0_hat, without a backward pass through the network (MPGD, arXiv 2311.16424);
    arguments and results of `through_network`.
    """
    x0_hat = evaluate(x)
    values, pull = jax.vjp(loss, x0_hat)
    _check(values, x)
    return x0_hat, values, known(values, pull(jnp.ones_like(values))[0])


def _check(values: Array, x: Array) -> None:
    """Raises ValueError for something else than one number per image."""
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"loss: gives shape {values.shape}; expected one number per image, {x.shape[:1]}"
        )


def known(values: Array, grad: Array) -> Array:
    """The gradient, nan where the loss is."""
    return jnp.where(per_example(jnp.isnan(values), grad) > 0, jnp.nan, grad)


def smoothed(loss: Loss, samples: int, info: Info) -> Loss:
    """LGD-MC's loss (Song et al., ICML 2023): -log mean_j exp(-loss(x0_hat + r z_j)), with
    z_j ~ N(0, I) and r = sigma / sqrt(1 + sigma^2).

    The loss has to be a negative log-likelihood for the weights to mean anything:
    ||y - A(x0)||^2 / (2 std^2).

    Args:
      loss: of one x0_hat.
      samples: number of draws, at least 1.
      info: of the step: its sigma and its key.

    Raises:
      ValueError: no key.
    """
    keys_of_step = info.key
    if keys_of_step is None:
        raise ValueError("key=None; expected a key, because Monte-Carlo guidance draws noise")
    width = info.sigma / jnp.sqrt(1 + info.sigma**2)

    def total(x0_hat: Array) -> Array:
        def one(sample: Array) -> Array:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(
                randomness.fold_in_each(keys_of_step, "lgd"), sample
            )
            # in float32, so that samplers of both precisions see the same noise
            z = randomness.normal(keys, x0_hat.shape[1:]).astype(x0_hat.dtype)
            return loss(x0_hat + per_example(width, x0_hat) * z)

        values = jax.vmap(one)(jnp.arange(samples))
        return jnp.log(float(samples)) - jax.nn.logsumexp(-values, axis=0)

    return total


def vp_factor(info: Info) -> Array:
    """[B] 1 / sqrt(abar abar'): what a step -grad in VP coordinates (x_vp = sqrt(abar) x, as
    published) is in ours.
    """
    return jnp.sqrt((1 + info.sigma**2) * (1 + info.sigma_next**2))
