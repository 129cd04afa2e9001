"""LGD-MC: loss-guided diffusion (Song et al., ICML 2023): DPS's step with a Monte-Carlo smoothed
gradient.

    x' = mean + std eps - scale grad_x [-log mean_j exp(-loss(x0_hat + r z_j))]

in VP coordinates (`gradients.smoothed`, `gradients.vp_factor`).
"""

import dataclasses
import functools
from typing import Any

from ogdm_jax.config import setting
from ogdm_jax.methods.dps import Descent
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling import gradients
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.sampling.schedule import Schedule, numbers, scheduled
from ogdm_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """Settings of LGD-MC beside those of `Schedule`.

    Attributes:
      scale: step size in VP coordinates.
      samples: draws of the smoothed loss.
    """

    GROUP = "lgd"
    scale: float = setting(1e-3, "step size", least=0)
    samples: int = setting(8, "draws of the smoothed loss", least=1, most=1024)


def guidance(loss: gradients.Loss, scale: float | Array, **settings: Any) -> Guidance:
    """LGD-MC as guidance of `sample`.

    Args:
      loss: a negative log-likelihood, x0_hat [B,H,W,C] -> [B]: ||y - A(x0)||^2 / (2 std^2).
      scale: step size in VP coordinates, a number or [B].
      **settings: further fields of `Settings` by name.

    Raises:
      ConfigError: a setting out of range.
    """
    chosen = Settings(**numbers(scale=scale), **settings)
    size = lambda grad, x, x0_hat, info: scale * gradients.vp_factor(info)
    rule = Descent(functools.partial(gradients.of_step, loss, samples=chosen.samples), size)
    return Guidance("lgd", transition=scheduled(rule, chosen))


def build(settings: Settings, session: Session) -> Guidance:
    """LGD-MC for the measurements of a command. Raises ValueError where there are none."""
    return guidance(session.need_measurement("lgd").energy(), **vars(settings))
