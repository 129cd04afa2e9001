"""DDNM+: the measured coordinates of x0_hat are replaced by the measurement (Wang et al., ICLR
2023, arXiv 2212.00490 section 3.3).

In the singular basis of A = U S V^T, coordinate i of x0_hat becomes D_i + l_i (y_i / s_i - D_i).
What l_i brings in of y's noise, a l_i std / s_i with a the weight of x0_hat in the transition, is
taken off the transition's noise; l_i = min(1, transition std s_i / (a std)) keeps that possible. No
gradient at all.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from ogdm_jax.diffusion.steps import per_example, spread
from ogdm_jax.inverse.operators import Operator, image_shape
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Evaluate, Guidance, Moments, Preset
from ogdm_jax.sampling.schedule import Schedule, scheduled
from ogdm_jax.typing import Array

PRESETS: dict[str, Preset] = {}


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """DDNM has the settings of `Schedule` only."""

    GROUP: ClassVar[str] = "ddnm"


def guidance(operator: Operator, y: Array, std: float = 0.0, **settings: Any) -> Guidance:
    """DDNM+ as guidance of `sample`.

    Args:
      operator: with known singular values.
      y: [B,...] measurements.
      std: of their Gaussian noise.
      **settings: fields of `Settings` by name.

    Raises:
      ConfigError: a setting out of range.
      ValueError: an operator without singular values; when sampling, churn.
    """
    operator.need_spectrum("ddnm")
    chosen = Settings(**settings)
    return Guidance("ddnm", transition=scheduled(Replace(operator, y, std), chosen))


def build(settings: Settings, session: Session) -> Guidance:
    """DDNM+ for the measurements of a command.

    Raises:
      ValueError: no measurements, or such that DDNM has no answer to.
    """
    measured = session.need_gaussian("ddnm")
    return guidance(measured.operator, measured.y, measured.noise, **vars(settings))


@dataclasses.dataclass(frozen=True, eq=False)
class Replace:
    """The transition rule of DDNM+; fields as the arguments of `guidance`."""

    operator: Operator
    y: Array
    std: float

    def __call__(
        self, evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """(x_next, the x0_hat with what was measured)."""
        refuse_churn("ddnm", info)
        basis = self.operator.need_spectrum("ddnm")(image_shape(x))
        x0_hat = evaluate(x)
        step = spread(transition(x0_hat, x)[1], x)
        down = jnp.sqrt(jnp.maximum(per_example(info.sigma_next, x) ** 2 - step**2, 0.0))
        weight = 1 - down / per_example(info.sigma, x)
        s = jnp.asarray(basis.values, x.dtype)
        seen = s > 1e-4  # below, y_i / s_i would be noise alone
        inverse = jnp.where(seen, 1 / jnp.where(seen, s, 1.0), 0.0)
        # noise of y in this coordinate of the next state, if it were taken over whole
        carried = weight * self.std * inverse
        kept = jnp.where(carried > step, step / jnp.where(carried > 0, carried, 1.0), 1.0)
        blend = jnp.where(seen, kept, 0.0)
        d = basis.to(x0_hat)
        rectified = basis.back(d + blend * (inverse * basis.measured(self.y) - d))
        mean, _ = transition(rectified, x)
        left = jnp.sqrt(jnp.maximum(step**2 - (blend * carried) ** 2, 0.0))
        return mean + basis.back(left * basis.to(noise)), rectified


def refuse_churn(method: str, info: Info) -> None:
    """Raises ValueError for a method that replaces x0_hat where the transition is churn's noise."""
    if info.churned:
        raise ValueError(
            f"{method} under churn: noise that is only added has no x0_hat to replace; expected no "
            "churn, with solver='ancestral', or solver='ddim' or 'heun' and eta > 0"
        )
