"""DiffPIR (Zhu et al., CVPR workshop 2023, arXiv 2305.08995): a proximal step, then noise of the
next level. No gradient.

    x0 = argmin ||y - A x0||^2 + rho ||x0 - D||^2,      rho = strength std^2 / (4 sigma^2)
    x' = x0 + sigma' (sqrt(share) eps + sqrt(1 - share) (x - x0) / sigma)

The authors' rho = lambda sigma_n^2 / sigma_k^2 has the noise sigma_n of images in [0, 1], half of
ours, and the level sigma_k of images in [-1, 1]. As in their code the last step takes D as it is;
without noise (std 0) x0 is an exact projection, at the last step too. The guided steps are
transitions of the method's own, whatever the solver's eta.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ogdm_jax.config import ConfigError, setting
from ogdm_jax.diffusion.steps import per_example, spread
from ogdm_jax.inverse.operators import Operator, image_shape
from ogdm_jax.methods.ddnm import SMALLEST, known_std
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Evaluate, Guidance, Moments
from ogdm_jax.sampling.schedule import Schedule, numbers, scheduled
from ogdm_jax.typing import Array

STRENGTHS = {"inpaint": 1.0}  # of the released code; 8 for the other tasks


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """Settings of DiffPIR beside those of `Schedule`.

    Attributes:
      strength: the published lambda: weight of the model against the measurement; None: the
        released one of the task (command line), see STRENGTHS.
      share: the published zeta: share of fresh noise in the next level's (released: 1 for
        inpainting, 0.3 for deblurring, 0.25 for super-resolution).
    """

    GROUP = "diffpir"
    strength: float | None = setting(
        None,
        "weight of the model against the measurement; default: the released one, 1 for inpaint, 8",
        least=0,
    )
    share: float = setting(1.0, "share of fresh noise in the next level's", least=0, most=1)


def guidance(
    operator: Operator, y: Array, std: float | Array, strength: float | Array = 8.0, **settings: Any
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
      ValueError: an operator without singular values, a std below 0; when sampling, y of another
        shape, churn or Heun's solver.
    """
    operator.need_spectrum("diffpir")
    chosen = Settings(**numbers(strength=strength), **settings)
    rule = Proximal(operator, y, known_std("diffpir", std), strength, chosen.share)
    return Guidance("diffpir", transition=scheduled(rule, chosen), replaces_x0=True)


def build(settings: Settings, session: Session) -> Guidance:
    """DiffPIR for the measurements of a command.

    Raises:
      ValueError: no measurements, or such that DiffPIR has no answer to; an eta or a variance that
        no step uses.
    """
    measured, sampling = session.need_gaussian("diffpir"), session.sampling
    own = "with diffpir, whose noise is that of --diffpir.share; expected"
    if sampling.solver == "ddim" and sampling.eta < 1 and settings.everywhere:
        raise ConfigError(f"--eta: {sampling.eta:g} {own} --eta 1")
    if sampling.solver == "ancestral" and sampling.variance != "auto" and settings.everywhere:
        raise ConfigError(f"--variance: {sampling.variance} {own} --variance auto")
    if settings.strength is not None and not measured.noise:
        raise ConfigError(
            f"--diffpir.strength: {settings.strength:g} given with --task.noise 0, where x0 is an "
            "exact projection; expected it only with noise"
        )
    words = dict(vars(settings))
    if settings.strength is None:
        words["strength"] = STRENGTHS.get(measured.task, 8.0)
    return guidance(measured.operator, measured.y, measured.noise, **words)


@dataclasses.dataclass(frozen=True, eq=False)
class Proximal:
    """The transition rule of DiffPIR; fields as the arguments of `guidance`."""

    operator: Operator
    y: Array
    std: float | Array
    strength: float | Array
    share: float

    def __call__(
        self, evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """(x_next, the x0_hat that explains y)."""
        basis = self.operator.need_spectrum("diffpir")(image_shape(x))
        x0_hat = evaluate(x)
        d, sigma = basis.to(x0_hat), per_example(info.sigma, x)
        y = basis.measured(self.operator.measured(self.y, x))
        s, next_sigma = jnp.asarray(basis.values, x.dtype), per_example(info.sigma_next, x)
        rho = spread(self.strength * self.std**2 / 4, x) / sigma**2
        solved = (s > SMALLEST) | (rho > 0)  # else neither y nor the model says anything new
        total = jnp.where(solved, s**2 + rho, 1.0)
        explained = jnp.where(solved, (s * y + rho * d) / total, d)
        x0 = basis.back(explained)
        x0 = jnp.where((next_sigma > 0) | (self.std == 0), x0, x0_hat)
        e = (x - x0) / sigma
        mixed = jnp.sqrt(self.share) * noise + jnp.sqrt(1 - self.share) * e
        return x0 + next_sigma * mixed, x0
