"""FreeDoM (Yu et al., ICCV 2023, arXiv 2303.09833): DPS's step with its own step sizes, and time
travel.

Rule "rms", its text and style guidance: |move| is scale times the weight 1 - sigma'^2 / sigma^2
that x0_hat has in the transition, times rms(x - x0_hat); so the loss's scale cancels. From pure
noise that has no bound: leave that level out by the window. Rule "time", its face guidance: scale
sqrt(abar) on the gradient in VP coordinates (published scale: 100 face identity, 20 sketch, 0.2
segmentation, 500 landmarks, all on the unsquared norm, which the command line takes there). Time
travel is `Schedule.repeats`.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from ogdm_jax.config import setting
from ogdm_jax.methods.dps import Descent
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling import gradients
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.sampling.schedule import Schedule, numbers, scheduled
from ogdm_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """Settings of FreeDoM beside those of `Schedule`.

    Attributes:
      scale: see the rules above.
      rule: how the step size is made.
    """

    GROUP = "freedom"
    scale: float = setting(0.2, "step size, in the rule's unit", least=0)
    rule: str = setting("rms", "how the step size is made", choices=("rms", "time"))


def guidance(loss: gradients.Loss, scale: float | Array, **settings: Any) -> Guidance:
    """FreeDoM as guidance of `sample`.

    Args:
      loss: any differentiable x0_hat [B,H,W,C] -> [B].
      scale: a number or [B], see the rules above.
      **settings: further fields of `Settings` by name.

    Raises:
      ConfigError: a setting out of range, an unknown rule.
    """
    chosen = Settings(**numbers(scale=scale), **settings)

    def size(grad: Array, x: Array, x0_hat: Array, info: Info) -> Array:
        if chosen.rule == "time":
            return scale * jnp.sqrt(1 + info.sigma_next**2)
        ratio = info.sigma_next / info.sigma
        length = rms(grad)
        moves = length != 0  # of nan too, which stays
        weight = scale * jnp.abs((1 - ratio) * (1 + ratio)) * rms(x - x0_hat)
        return jnp.where(moves, weight / jnp.where(moves, length, 1.0), 0.0)

    rule = Descent(functools.partial(gradients.of_step, loss), size)
    return Guidance("freedom", transition=scheduled(rule, chosen))


def rms(v: Array) -> Array:
    """[B] root mean square over an image, for huge and tiny v too; its gradient is not used."""
    flat = v.reshape(v.shape[0], -1)
    largest = jnp.max(jnp.abs(flat), axis=1)
    scaled = flat / jnp.where(largest != 0, largest, 1.0)[:, None]
    return largest * jnp.sqrt(jnp.mean(jnp.square(scaled), axis=1))


def build(settings: Settings, session: Session) -> Guidance:
    """FreeDoM for the measurements of a command. Raises ValueError where there are none."""
    loss = session.need_measurement("freedom").loss(squared=settings.rule != "time")
    return guidance(loss, **vars(settings))
