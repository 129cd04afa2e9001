"""Pi-GDM: pseudoinverse-guided diffusion (Song et al., ICLR 2023), a linear baseline beside DDNM
that takes the gradient through the network.

With p(x0 | x) taken for N(x0_hat, r^2 I), log p(y | x) has the gradient

    g = J^T A^T (r^2 A A^T + std^2 I)^-1 (y - A x0_hat),    J = d x0_hat / d x,

and the solver steps from x0_hat + sigma^2 g, which is Tweedie's formula for the score plus g. With
r^2 = sigma^2 s^2 / (sigma^2 + s^2), the variance of x0 given x where images have variance s^2
(published: s = 1), that is the posterior's mean exactly for Gaussian images. Without noise the
inverse is A's pseudo-inverse over r^2, and the size of r cancels in what J = r^2 / sigma^2 gives
back. The authors' code adds a multiple of g to a DDIM step in place of Tweedie's.

At a very high level r^2 / sigma^2 vanishes and a network's J does not: its error is multiplied by
the level, without a bound where a grid starts from pure noise. Leave those out by the window.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ogdm_jax.config import setting
from ogdm_jax.diffusion.steps import per_example, spread
from ogdm_jax.inverse.operators import Operator, image_shape
from ogdm_jax.methods.ddnm import SMALLEST, known_std
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Evaluate, Guidance, Moments
from ogdm_jax.sampling.schedule import Schedule, scheduled
from ogdm_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """Settings of Pi-GDM beside those of `Schedule`.

    Attributes:
      data_std: s above.
    """

    GROUP = "pigdm"
    data_std: float = setting(
        1.0, "spread of clean images, from which that of x0 given x follows; published: 1", above=0
    )


def guidance(operator: Operator, y: Array, std: float | Array = 0.0, **settings: Any) -> Guidance:
    """Pi-GDM as guidance of `sample`.

    Args:
      operator: with known singular values.
      y: [B,...] measurements.
      std: of their Gaussian noise.
      **settings: fields of `Settings` by name.

    Raises:
      ConfigError: a setting out of range.
      ValueError: an operator without singular values, a std below 0; when sampling, y of another
        shape, churn or Heun's solver.
    """
    basis_of, chosen = operator.need_spectrum("pigdm"), Settings(**settings)
    std = known_std("pigdm", std)

    def rule(
        evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """(x_next, the mean of the clean image given x and y)."""
        basis = basis_of(image_shape(x))
        s = jnp.asarray(basis.values, x.dtype)
        x0_hat, pull = jax.vjp(evaluate, x)
        # sigma^2 (r^2 s^2 + std^2)^-1 with r^2 = sigma^2 / share: no square that could vanish
        share = per_example(1 + (info.sigma / chosen.data_std) ** 2, x)
        level = jnp.asarray(std, x.dtype) / per_example(info.sigma, x)
        seen = s > SMALLEST
        inverse = jnp.where(seen, s / jnp.where(seen, s**2 / share + level**2, 1.0), 0.0)
        residual = basis.measured(operator.measured(y, x)) - s * basis.to(x0_hat)
        x0 = x0_hat + pull(basis.back(inverse * residual))[0]
        mean, step_std = transition(x0, x)
        return mean + spread(step_std, x) * noise, x0

    return Guidance("pigdm", transition=scheduled(rule, chosen), replaces_x0=True)


def build(settings: Settings, session: Session) -> Guidance:
    """Pi-GDM for the measurements of a command.

    Raises:
      ValueError: no measurements, or such that Pi-GDM has no answer to.
    """
    measured = session.need_gaussian("pigdm")
    return guidance(measured.operator, measured.y, measured.noise, **vars(settings))
