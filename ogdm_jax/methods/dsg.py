"""DSG: guidance with a spherical Gaussian constraint (Yang et al., ICML 2024, arXiv 2402.03201),
and DPS beside it.

A stochastic step is x' ~ N(mean, std^2 I) in n = H W C numbers, so x' lies close to the sphere of
radius r = sqrt(n) std. Loss guidance pushes it off; DSG takes the step that lowers a loss
L(x0_hat(x)) most on the sphere, mixed with the step that the noise alone would take:

    d* = -r grad / ||grad||        d = (1 - rate) std eps + rate d*        x' = mean + r d / ||d||

Any step with a known mean and std will do (arXiv section 4; derivations for this coordinate beside
each solver): ancestral steps with every choice of variance, ddim and heun with eta > 0 (heun: "down
by Heun, up on the sphere"), and the noise that churn adds. A deterministic step has r = 0 and
cannot be guided. It is an optimiser on a sphere and no
sampler of the posterior: the spread of its results shrinks as the rate grows (rate 1 has none).

Differences from the released code: norms are per image (theirs broadcast wrongly for batches above
1); the last step, which has no noise here, is not guided; a zero gradient leaves the noise's
direction at every rate (theirs at rate 1 stays at the mean); fixed eps of 1e-8 and 1e-20 are
replaced by scaling with the largest number.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ogdm_jax.diffusion.steps import per_example, spread
from ogdm_jax.methods.contract import Guidance
from ogdm_jax.sampling import kicks
from ogdm_jax.sampling.kicks import Direction, Loss, dps_step
from ogdm_jax.sampling.solvers import Kick
from ogdm_jax.typing import Array, PyTree

__all__ = [
    "dps_step",
    "guidance",
    "posterior",
    "rate_of_cosine",
    "rate_of_strength",
    "spherical",
    "spherical_step",
]


def _unit(v: Array) -> tuple[Array, Array]:
    """(v / ||v||, whether it has a direction [B,1,..]) per image: safe at 0, for huge and tiny, and
    for nan or inf.
    """
    axes = tuple(range(1, v.ndim))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(v), axes, keepdims=True))
    known = (largest > 0) & jnp.isfinite(largest)  # nan compares as False
    scaled = jnp.where(known, v, 0.0) / jnp.where(known, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(jnp.where(known, jnp.square(scaled), 1.0), axes, keepdims=True))
    return scaled / norm, known


def spherical_step(mean: Array, std: Array, eps: Array, grad: Array, rate: float | Array) -> Array:
    """DSG's step (arXiv 2402.03201 eq. of algorithm 1): always at distance sqrt(n) std from the
    mean.

    Args:
      mean: [B,H,W,C] of the transition.
      std: of the transition: a number, [B], or like mean (a learned variance: the radius is then
        its root of squares).
      eps: like mean, ~ N(0, I).
      grad: like mean, any positive multiple of a loss's gradient; only its direction counts.
      rate: g in [0, 1], a number or [B]: 0 is the noise's direction on the sphere, 1 pure descent
        without randomness; published 0.05 to 0.2. The angle to the noise has cosine g / sqrt(g^2 +
        (1 - g)^2) towards -grad.

    Returns:
      Like mean. Norms are taken in float32 at least. Zero gradient: mean + r eps / ||eps||; that
      and zero noise: mean.

    Raises:
      ValueError: a rate outside [0, 1].
    """
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"rate={rate}; expected a number from 0 to 1")
    wide = jnp.promote_types(mean.dtype, jnp.float32)
    mean_, eps, grad = (v.astype(wide) for v in (mean, eps, grad))
    std = spread(std, mean_)
    root_n = math.sqrt(math.prod(mean.shape[1:]))
    if std.shape == mean.shape:
        radius = jnp.sqrt(jnp.sum(jnp.square(std), tuple(range(1, mean.ndim)), keepdims=True))
        eps = eps * std * jnp.where(radius > 0, root_n / jnp.where(radius > 0, radius, 1.0), 0.0)
    else:
        radius = root_n * std
    downhill, known = _unit(grad)
    rate = jnp.where(known, spread(rate, mean_), 0.0)
    d, moved = _unit(
        (1 - rate) * eps - rate * root_n * downhill
    )  # std cancels: nothing is divided by it
    return (mean_ + radius * jnp.where(moved, d, _unit(eps)[0])).astype(mean.dtype)


def rate_of_cosine(cosine: float | Array) -> float | Array:
    """The rate at which the step's cosine with -grad is this: c / (c + sqrt(1 - c^2))."""
    return cosine / (cosine + (1 - cosine**2) ** 0.5)


def rate_of_strength(strength: float, steps: int, interval: int = 1) -> float:
    """The rate that keeps guidance equally strong whatever the number of steps.

    A step's std falls as 1 / sqrt(steps), so the guided way is about strength = sqrt(steps) cosine
    / interval; a fixed rate guides more with more steps. 1 is moderate; published settings lie
    between 0.4 and 2.4.

    Raises:
      ValueError: a negative strength.
    """
    if strength < 0:
        raise ValueError(f"strength={strength}; expected a number of at least 0")
    return float(rate_of_cosine(min(strength * interval / math.sqrt(steps), 1.0)))


def spherical(
    loss: Loss,
    rate: float | Array = 0.2,
    interval: int = 1,
    window: tuple[float, float] | None = None,
    *,
    strength: float | None = None,
    repeats: int = 1,
    repeat_window: tuple[float, float] | None = None,
    stop: float | None = None,
    backward: bool = True,
    samples: int = 0,
    clip_loss: bool = False,
    clip_mean: bool = False,
) -> Kick:
    """DSG as a kick of `sample` (arXiv 2402.03201 algorithm 1): `spherical_step` on guided steps,
    plain steps between.

    Squared, unsquared or otherwise increasing functions of the same loss give the same images.

    Args:
      loss: any differentiable x0_hat [B,H,W,C] -> [B]; of measurements:
        `operators.measurement_loss`.
      rate: of `spherical_step`.
      interval: every how many steps are guided, counted back from the last as released (the last
        itself, a step without noise, is not guided but under churn); the others cost no gradient.
      window: (low, high) noise levels that are guided; None: all.
      strength: replaces rate, see `rate_of_strength`.
      repeats, repeat_window: time travel (`kicks.time_travel`).
      stop: images whose loss is at most this take the plain step (the discrepancy principle: m
        std^2 of y's noise).
      backward: False takes the gradient at x0_hat, without a backward pass through the network.
      samples: > 0 smooths the gradient by so many draws (`kicks.smoothed`).
      clip_loss, clip_mean: clip x0_hat to [-1, 1] for the loss, for the transition of every step,
        guided or not (released code: both, where linear).

    Raises:
      ValueError: a setting out of range; samples without a backward pass; at the call, an interval
      that leaves no
        step to guide.
    """
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"rate={rate}; expected a number from 0 to 1")
    direction = _direction(loss, backward, samples, clip_loss)
    if strength is not None:
        rate_of_strength(strength, 1)  # refuses bad numbers now

    def guided(evaluate, transition, x, noise, info):
        x0_hat, values, grad = direction(evaluate, x, info)
        mean, std = transition(kicks.clipped(x0_hat, clip_mean), x)
        g = rate if strength is None else rate_of_strength(strength, info.steps, interval)
        x_next = spherical_step(mean, std, noise, grad, g)
        if stop is not None:
            x_next = jnp.where(
                per_example(values > stop, x) > 0, x_next, mean + spread(std, x) * noise
            )
        return x_next, x0_hat

    def noiseless(evaluate, transition, x):
        x0_hat = evaluate(x)
        return transition(kicks.clipped(x0_hat, clip_mean), x)[0], x0_hat

    def kick(evaluate, transition, x, noise, info):
        # The step to 0 has no noise, so a sphere of radius 0: nothing to guide, and no gradient to
        # pay for.
        return jax.lax.cond(
            info.sigma_next[0] > 0,
            lambda x, noise: guided(evaluate, transition, x, noise, info),
            lambda x, noise: noiseless(evaluate, transition, x),
            x,
            noise,
        )

    on_steps = kicks.on_steps(
        kicks.time_travel(kick, repeats, repeat_window), interval, window, clip_mean
    )

    def checked(evaluate, transition, x, noise, info):
        if interval > 1 and interval >= info.steps and not info.churned:
            raise ValueError(
                f"interval={interval} with {info.steps} steps: leaves only the last step, which "
                "has no noise to guide; "
                "expected an interval below the number of steps"
            )
        return on_steps(evaluate, transition, x, noise, info)

    return checked


def _direction(loss: Loss, backward: bool, samples: int, clip: bool) -> Direction:
    if samples:
        if not backward:
            raise ValueError(
                f"samples={samples} with backward=False; expected samples=0 or backward=True"
            )
        return kicks.smoothed(loss, samples, clip)
    return kicks.through_network(loss, clip) if backward else kicks.at_x0(loss, clip)


def posterior(
    loss: Loss,
    scale: float | Array,
    interval: int = 1,
    window: tuple[float, float] | None = None,
    *,
    coordinate: str = "ve",
    repeats: int = 1,
    repeat_window: tuple[float, float] | None = None,
    clip_loss: bool = False,
    clip_mean: bool = False,
) -> Kick:
    """DPS as a kick (arXiv 2209.14687 algorithm 1): `dps_step` with the gradient through the
    network.

    The released code uses the unsquared norm of the residual (`measurement_loss(...,
    squared=False)`) in the coordinate x_vp = x / sqrt(1 + sigma^2): with coordinate="vp" its scales
    carry over (super-resolution, Gaussian, motion and non-linear blur 0.3, inpainting 0.5, phase
    retrieval 1).

    Args:
      loss, interval, window, repeats, repeat_window, clip_loss, clip_mean: as in `spherical`.
      scale: step size.   coordinate: "ve", x' - scale grad as it stands; "vp", see above.

    Raises:
      ValueError: an unknown coordinate.
    """
    if coordinate not in ("ve", "vp"):
        raise ValueError(f"coordinate={coordinate!r}; expected 've' or 'vp'")

    def step_size(grad: Array, x: Array, x0_hat: Array, info) -> Array:
        size = jnp.broadcast_to(jnp.asarray(scale, info.sigma.dtype), info.sigma.shape)
        return size * kicks.vp_factor(info) if coordinate == "vp" else size

    kick = kicks.descend(kicks.through_network(loss, clip_loss), step_size, clip_mean)
    return kicks.on_steps(
        kicks.time_travel(kick, repeats, repeat_window), interval, window, clip_mean
    )


def guidance(kick_of: Callable[[PyTree], Kick], given: PyTree, name: str = "dsg") -> Guidance:
    """A kick on data as a sampling method: kick_of(rows of `given` of a batch) -> kick.

    given: arrays with one row per image: the measurements, masks that differ from image to image.
    """

    def kick(frozen: Any, rows: PyTree) -> Kick:
        return kick_of(rows)

    return Guidance(name=name, kick=kick, given=given)
