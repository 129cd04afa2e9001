"""DDNM+: the measured coordinates of x0_hat are replaced by the measurement (Wang et al., ICLR
2023, arXiv 2212.00490 section 3.3). No gradient at all.

In the singular basis of A = U S V^T, with D = x0_hat and sigma' the level of the next state:

    std / s_i <= sigma'   x'_i = y_i / s_i + sqrt(sigma'^2 - std^2 / s_i^2) eps
    std / s_i >  sigma'   x'_i = D_i + l_i (y_i / s_i - D_i) + eta sigma' eps,
                          l_i = sqrt(1 - eta^2) sigma' s_i / std
    s_i = 0               the solver's own step

The noise of y is the same at every step: it is a part of the next level's whole noise sigma', as
in the authors' code (sigma_t = sqrt(1 - abar'), a = sqrt(abar')), and never of one transition's
std, which it would outgrow. Without noise (std 0) the solver steps from the rectified image, so
that what was measured is met exactly. Published with 100 steps: below std / s_i the noise of y
enters once more at each of them, and 1000 inflate what a blur hides threefold (eta 1 stays bounded;
DiffPIR and DSG do not depend on the number). In coordinates that were not measured the solver's
step is exact for the prior; the authors' D + sigma' (eta eps + sqrt(1 - eta^2) e) loses spread with
the number of steps.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ogdm_jax.config import ConfigError, setting
from ogdm_jax.diffusion.steps import per_example, spread
from ogdm_jax.inverse.operators import Operator, image_shape
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Evaluate, Guidance, Moments
from ogdm_jax.sampling.schedule import Schedule, scheduled
from ogdm_jax.typing import Array

SMALLEST = 1e-4  # singular value that counts as measured: below, y_i / s_i is rounding alone


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """Settings of DDNM+ beside those of `Schedule`.

    Attributes:
      eta: share of fresh noise, see above (released: 0.85); acts only where y has noise.
    """

    GROUP = "ddnm"
    eta: float = setting(
        0.85, "share of fresh noise at levels below the measurement's noise", least=0, most=1
    )


def known_std(method: str, std: float | Array) -> float | Array:
    """The noise of measurements, a float where it is known already; ValueError for none."""
    if isinstance(std, Tracer):
        return std
    if np.ndim(std) or not std >= 0:
        raise ValueError(f"{method}: std={std}; expected a number of at least 0, the noise of y")
    return float(std)


def guidance(operator: Operator, y: Array, std: float | Array = 0.0, **settings: Any) -> Guidance:
    """DDNM+ as guidance of `sample`.

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
    basis_of, chosen = operator.need_spectrum("ddnm"), Settings(**settings)
    std = known_std("ddnm", std)

    def rule(
        evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """(x_next, the x0_hat with what was measured)."""
        basis = basis_of(image_shape(x))
        s = jnp.asarray(basis.values, x.dtype)
        seen = s > SMALLEST
        inverse = jnp.where(seen, 1 / jnp.where(seen, s, 1.0), 0.0)
        x0_hat = evaluate(x)
        d, clean = basis.to(x0_hat), inverse * basis.measured(operator.measured(y, x))
        if isinstance(std, float) and std == 0:
            rectified = basis.back(d + jnp.where(seen, clean - d, 0.0))
            mean, step_std = transition(rectified, x)
            return mean + spread(step_std, x) * noise, rectified
        level = per_example(info.sigma_next, x)
        of_y = jnp.asarray(std, x.dtype) * inverse  # y's noise in the coordinates of the image
        below = level < of_y
        kept = math.sqrt(1 - chosen.eta**2) * level / jnp.where(below, of_y, 1.0)
        rectified = d + jnp.where(below, kept, 1.0) * (clean - d)
        left = jnp.sqrt(jnp.maximum((level - of_y) * (level + of_y), 0.0))
        moved = rectified + jnp.where(below, chosen.eta * level, left) * basis.to(noise)
        mean, step_std = transition(x0_hat, x)
        plain = basis.to(mean + spread(step_std, x) * noise)
        rectified = jnp.where(seen, rectified, d)
        return basis.back(jnp.where(seen, moved, plain)), basis.back(rectified)

    return Guidance("ddnm", transition=scheduled(rule, chosen), replaces_x0=True)


def build(settings: Settings, session: Session) -> Guidance:
    """DDNM+ for the measurements of a command.

    Raises:
      ValueError: no measurements, or such that DDNM has no answer to.
    """
    measured = session.need_gaussian("ddnm")
    if settings.eta != Settings.eta and not measured.noise:
        raise ConfigError(
            f"--ddnm.eta: {settings.eta:g} given with --task.noise 0, where it does nothing; "
            "expected it only with noise"
        )
    return guidance(measured.operator, measured.y, measured.noise, **vars(settings))
