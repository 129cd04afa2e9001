"""Adam with EDM's ramp, gradient sanitising, and the exponential moving average (2206.00364,
appendix F).
"""

import jax
import jax.numpy as jnp
import optax

from ogdm_jax.config import Config, duration
from ogdm_jax.typing import Array, PyTree


def learning_rate(peak: float, ramp_steps: int, decay_steps: int) -> optax.Schedule:
    """lr(step) = peak * min(step / ramp, 1) * max(1 - step / decay, 0); 0 switches ramp or decay
    off.

    With a ramp the very first step has learning rate 0, as in EDM (the ramp counts images seen
    before the step).
    """

    def schedule(step: Array) -> Array:
        rate = jnp.asarray(peak, jnp.float32)
        if ramp_steps:
            rate = rate * jnp.minimum(step / ramp_steps, 1.0)
        if decay_steps:
            rate = rate * jnp.maximum(1.0 - step / decay_steps, 0.0)
        return rate

    return schedule


def optimiser(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The denoiser's Adam and its learning rate as a function of the step."""
    settings, batch = config.optim, config.data.batch
    schedule = learning_rate(
        settings.learning_rate,
        duration(settings.ramp, batch, "config.optim.ramp"),
        duration(settings.decay, batch, "config.optim.decay"),
    )
    return adam(schedule, tuple(settings.betas), settings.eps, settings.weight_decay), schedule


def adam(
    rate: optax.ScalarOrSchedule,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float = 0.0,
):
    """Adam, or AdamW where weight_decay > 0."""
    if weight_decay:
        return optax.adamw(rate, *betas, eps=eps, weight_decay=weight_decay)
    return optax.adam(rate, *betas, eps=eps)


def sanitise(grads: PyTree) -> tuple[PyTree, Array]:
    """Replaces nan by 0 and +-inf by +-1e5 (EDM's rule), and counts what was replaced. Run it after
    averaging.
    """
    bad = sum(jnp.sum(~jnp.isfinite(g)) for g in jax.tree.leaves(grads))
    clean = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), grads)
    return clean, jnp.asarray(bad, jnp.int32)


def ema_beta(step: Array, batch: int, halflife_images: float, rampup: float) -> Array:
    """Beta = 0.5^(batch / h), h = min(halflife, rampup * images seen before the step); no ramp-up
    where rampup is 0.
    """
    halflife = jnp.asarray(halflife_images, jnp.float32)
    if rampup:
        halflife = jnp.minimum(halflife, rampup * batch * step.astype(jnp.float32))
    return 0.5 ** (batch / jnp.maximum(halflife, 1e-8))


def ema_update(ema: PyTree, params: PyTree, beta: Array) -> PyTree:
    return jax.tree.map(lambda e, p: e * beta + p * (1 - beta), ema, params)
