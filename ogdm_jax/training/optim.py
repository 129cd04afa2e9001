"""Adam with EDM's ramp, finite gradients, and the exponential moving average.

arXiv 2206.00364, appendix F.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ogdm_jax.config import Config, require
from ogdm_jax.networks import cpu
from ogdm_jax.typing import Array, PyTree


def learning_rate(
    peak: float, ramp_steps: int, decay_steps: int, shape: str = "linear"
) -> optax.Schedule:
    """The learning rate at each step: peak * min(step / ramp, 1) * shape(step / decay).

    A length of 0 switches ramp or decay off. With a ramp the very first step has learning rate 0,
    as in EDM: its ramp counts the images seen before the step.

    Args:
      peak: the largest rate.
      ramp_steps: length of the warm-up.
      decay_steps: length of the shape.
      shape: of x = step / decay: "constant" 1, "linear" max(1 - x, 0), "cosine"
        (1 + cos(pi min(x, 1))) / 2, "inverse_sqrt" 1 / sqrt(max(x, 1)) (2312.02696).
    """
    cosine = optax.cosine_decay_schedule(1.0, max(decay_steps, 1))

    def schedule(step: ArrayLike) -> Array:
        step, rate = jnp.asarray(step), jnp.asarray(peak, jnp.float32)
        if ramp_steps:
            rate = rate * jnp.minimum(step / ramp_steps, 1.0)
        if decay_steps and shape == "linear":
            rate = rate * jnp.maximum(1.0 - step / decay_steps, 0.0)
        elif decay_steps and shape == "cosine":
            rate = rate * cosine(step)
        elif decay_steps and shape == "inverse_sqrt":
            rate = rate / jnp.sqrt(jnp.maximum(step / decay_steps, 1.0))
        return rate

    return schedule


def rate_of(config: Config) -> optax.Schedule:
    """`learning_rate` of config.optim.

    Raises:
      ConfigError: the rate would be 0 before the run ends, or a schedule has no length.
    """
    settings, length, shape = config.optim, config.train.duration, config.optim.schedule
    ramp, decay = config.steps(settings.ramp), config.steps(settings.decay)
    need = f"a length with optim.schedule={shape}, such as train.duration"
    require(decay > 0 or shape in ("constant", "linear"), "optim.decay", settings.decay, need)
    falls_to_zero = decay > 0 and shape in ("linear", "cosine")
    need = (
        f"a length of at least train.duration ({length}), after which the learning rate is 0; "
        "train.duration to follow it, or 0 steps for a constant rate"
    )
    lasts = not falls_to_zero or decay >= config.steps(length)
    require(lasts, "optim.decay", settings.decay, need)
    return learning_rate(settings.learning_rate, ramp, decay, shape)


def optimiser(config: Config) -> optax.GradientTransformation:
    """The denoiser's Adam, or AdamW where config.optim.weight_decay > 0."""
    settings, rate = config.optim, rate_of(config)
    if decay := settings.weight_decay:
        return optax.adamw(rate, *settings.betas, eps=settings.eps, weight_decay=decay)
    return optax.adam(rate, *settings.betas, eps=settings.eps)


def _total(number: Callable[[Array], Array], tree: PyTree) -> Array:
    return jnp.asarray(sum(jnp.sum(number(leaf)) for leaf in jax.tree.leaves(tree)))


total = cpu.choose(_total, cpu.total)  # the sum of number(leaf) over all numbers of a tree


def norm(grads: PyTree) -> Array:
    """Square root of the sum of the squares of all numbers."""
    return jnp.sqrt(total(jnp.square, grads))


def sanitise(grads: PyTree) -> tuple[PyTree, Array]:
    """Replaces nan by 0 and +-inf by +-1e5 (EDM's rule). Call it after averaging over devices.

    Returns:
      (gradients, how many numbers were replaced: int32 scalar).
    """
    bad = total(lambda g: ~jnp.isfinite(g), grads)
    clean = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), grads)
    return clean, jnp.asarray(bad, jnp.int32)


def clip(grads: PyTree, largest: float) -> PyTree:
    """Scales gradients whose norm over all numbers is above `largest` down to it; 0: never.

    It keeps no state, so that a run may be resumed with another limit.
    """
    if not largest:
        return grads
    return optax.clip_by_global_norm(largest).update(grads, optax.EmptyState())[0]


def ema_beta(step: Array, batch: int, halflife_images: float, rampup: float) -> Array:
    """Decay of the moving average: beta = 0.5^(batch / h), h = min(half-life, rampup * images seen
    before the step); h = half-life where rampup is 0.
    """
    halflife = jnp.asarray(halflife_images, jnp.float32)
    if rampup:
        halflife = jnp.minimum(halflife, rampup * batch * step.astype(jnp.float32))
    return 0.5 ** (batch / jnp.maximum(halflife, 1e-8))


def ema_update(ema: PyTree, params: PyTree, beta: Array) -> PyTree:
    """Beta * ema + (1 - beta) * params, leaf by leaf."""
    return jax.tree.map(lambda e, p: e * beta + p * (1 - beta), ema, params)
