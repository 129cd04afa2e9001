"""MPGD: manifold-preserving guided diffusion, without autoencoder (He et al., ICLR 2024, arXiv
2311.16424).

    x' = mean + std eps - scale grad_x0 loss(x0_hat)

x0_hat moves and the eps of the unguided prediction stays, as in the released code for linear
problems (that for faces and style keeps x instead): x_vp' = sqrt(abar') (x0_hat - scale grad) +
sqrt(1 - abar' - s^2) eps + s noise. So the state moves by the whole of scale grad. There is no
backward pass through the network: the cheapest guidance of all.

Rule "plain" has one step size for all levels: on the squared residual 0.5 is the exact projection
of a mask. Rule "released" is that code's: scale / sqrt(abar') on the unsquared norm (its
configurations have 0.3 for super-resolution and 10 for Gaussian deblurring of 256 pixels).
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
    """Settings of MPGD beside those of `Schedule`.

    Attributes:
      scale: step size.
      rule: how it changes with the level, see above.
      clip_loss: the loss sees x0_hat clipped to [-1, 1].
    """

    GROUP = "mpgd"
    scale: float = setting(0.5, "step size, in the rule's unit", least=0)
    rule: str = setting("plain", "how the step size is made", choices=("plain", "released"))
    clip_loss: bool = setting(False, "the loss sees x0_hat clipped to [-1, 1]")


def guidance(loss: gradients.Loss, scale: float | Array, **settings: Any) -> Guidance:
    """MPGD as guidance of `sample`.

    Args:
      loss: any differentiable x0_hat [B,H,W,C] -> [B].
      scale: step size, a number or [B].
      **settings: further fields of `Settings` by name.

    Raises:
      ConfigError: a setting out of range.
    """
    chosen = Settings(**numbers(scale=scale), **settings)

    def size(grad: Array, x: Array, x0_hat: Array, info: Info) -> float | Array:
        return scale * jnp.sqrt(1 + info.sigma_next**2) if chosen.rule == "released" else scale

    how = {"clip": chosen.clip_loss, "backward": False}
    rule = Descent(functools.partial(gradients.of_step, loss, **how), size)
    return Guidance("mpgd", transition=scheduled(rule, chosen))


def build(settings: Settings, session: Session) -> Guidance:
    """MPGD for the measurements of a command. Raises ValueError where there are none."""
    loss = session.need_measurement("mpgd").loss(squared=settings.rule == "plain")
    return guidance(loss, **vars(settings))
