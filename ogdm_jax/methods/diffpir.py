"""DiffPIR (Zhu et al., CVPR workshop 2023, arXiv 2305.08995): a proximal step, then noise of the
next level. No gradient.

    x0 = argmin ||y - A x0||^2 + rho ||x0 - D||^2,      rho = 2 strength std^2 / sigma^2
    x' = x0 + sigma' (sqrt(share) eps + sqrt(1 - share) (x - x0) / sigma)

It brings a transition of its own, whatever the solver's eta.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from ogdm_jax.config import setting
from ogdm_jax.diffusion.steps import per_example, spread
from ogdm_jax.inverse.operators import Operator, image_shape
from ogdm_jax.methods.ddnm import refuse_churn
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Evaluate, Guidance, Moments, Preset
from ogdm_jax.sampling.schedule import Schedule, numbers, scheduled
from ogdm_jax.typing import Array

PRESETS: dict[str, Preset] = {}


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """Settings of DiffPIR beside those of `Schedule`.

    Attributes:
      strength: the published lambda: weight of the model against the measurement.
      share: the published zeta, near 1: share of fresh noise in the next level's.
    """

    GROUP: ClassVar[str] = "diffpir"
    strength: float = setting(8.0, "weight of the model against the measurement")
    share: float = setting(1.0, "share of fresh noise in the next level's", least=0, most=1)


def guidance(
    operator: Operator, y: Array, std: float, strength: float | Array = 8.0, **settings: Any
) -> Guidance:
    """DiffPIR as guidance of `sample`.

    Args:
      operator: with known singular values.
      y: [B,...] measurements.
      std: of their Gaussian noise (0: an exact projection).
      strength: the published lambda; a number or [B].
      **settings: further fields of `Settings` by name.

    Raises:
      ConfigError: a setting out of range.
      ValueError: an operator without singular values; when sampling, churn.
    """
    operator.need_spectrum("diffpir")
    chosen = Settings(**numbers(strength=strength), **settings)
    rule = Proximal(operator, y, std, strength, chosen.share)
    return Guidance("diffpir", transition=scheduled(rule, chosen))


def build(settings: Settings, session: Session) -> Guidance:
    """DiffPIR for the measurements of a command.

    Raises:
      ValueError: no measurements, or such that DiffPIR has no answer to.
    """
    measured = session.need_gaussian("diffpir")
    return guidance(measured.operator, measured.y, measured.noise, **vars(settings))


@dataclasses.dataclass(frozen=True, eq=False)
class Proximal:
    """The transition rule of DiffPIR; fields as the arguments of `guidance`."""

    operator: Operator
    y: Array
    std: float
    strength: float | Array
    share: float

    def __call__(
        self, evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """(x_next, the x0_hat that explains y)."""
        refuse_churn("diffpir", info)
        basis = self.operator.need_spectrum("diffpir")(image_shape(x))
        d = basis.to(evaluate(x))
        s, sigma = jnp.asarray(basis.values, x.dtype), per_example(info.sigma, x)
        rho = spread(2 * self.strength * jnp.maximum(self.std, 1e-3) ** 2, x) / sigma**2
        x0 = basis.back((s * basis.measured(self.y) + rho * d) / (s**2 + rho))
        e = (x - x0) / sigma
        mixed = jnp.sqrt(self.share) * noise + jnp.sqrt(1 - self.share) * e
        return x0 + per_example(info.sigma_next, x) * mixed, x0
