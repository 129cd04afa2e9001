"""DPS: diffusion posterior sampling (Chung et al., ICLR 2023, arXiv 2209.14687), and the step that
MPGD, FreeDoM and LGD share with it.

    x' = mean + std eps - scale grad_x loss(x0_hat(x))

The released code uses the unsquared norm of the residual (`measurement_loss(..., squared=False)`)
in the coordinate x_vp = x / sqrt(1 + sigma^2): with coordinate="vp" its scales carry over
(super-resolution, Gaussian, motion and non-linear blur 0.3, inpainting 0.5, phase retrieval 1).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ogdm_jax.config import setting
from ogdm_jax.diffusion.steps import spread
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling import gradients
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Evaluate, Guidance, Moments, Preset
from ogdm_jax.sampling.schedule import Schedule, numbers, scheduled
from ogdm_jax.typing import Array

# Of the released code; 0.3 for the other tasks.
SCALES = {"inpaint": 0.5, "phase_retrieval": 1.0}


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """Settings of DPS beside those of `Schedule`.

    Attributes:
      scale: step size; None: the released one of the task (command line).
      clip_loss: the loss sees x0_hat clipped to [-1, 1] (released code: yes, where linear).
      clip_mean: so does the transition of every step, guided or not (released code: likewise).
    """

    GROUP = "dps"
    scale: float | None = setting(
        None,
        "step size; default: the released one, 0.5 for inpaint, 1 for phase_retrieval, 0.3",
        least=0,
    )
    clip_loss: bool = setting(False, "the loss sees x0_hat clipped to [-1, 1]")
    clip_mean: bool = setting(False, "every step's transition sees x0_hat clipped to [-1, 1]")


PRESETS: dict[str, Preset] = {
    f"dps_{task}": Preset(
        {"scale": SCALES.get(task, 0.3), "clip_loss": True, "clip_mean": True},
        {"task": task, "steps": 1000, "solver": "ancestral", "grid": "respaced"},
    )
    for task in (
        "inpaint",
        "super_resolution",
        "deblur",
        "motion_deblur",
        "nonlinear_deblur",
        "phase_retrieval",
    )
}


def dps_step(mean: Array, std: Array, eps: Array, grad: Array, scale: float | Array) -> Array:
    """DPS: x' = mean + std eps - scale grad (arXiv 2209.14687 algorithm 1; the step of MCG and LGD
    too).

    Args:
      mean: [B,H,W,C] of the transition.
      std: of the transition: a number, [B] or like mean.
      eps: like mean, ~ N(0, I).
      grad: like mean, the loss's gradient.
      scale: step size, a number or [B].

    Returns:
      Like mean.
    """
    return mean + spread(std, mean) * eps - spread(scale, mean) * grad


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """The transition rule x' = mean + std noise - size grad.

    Attributes:
      gradient: (evaluate, x, info) -> (x0_hat, loss [B], grad like x), see `gradients.of_step`.
      size: (grad, x, x0_hat, info) -> step size, a number or [B].
    """

    gradient: Callable[[Evaluate, Array, Info], tuple[Array, Array, Array]]
    size: Callable[[Array, Array, Array, Info], float | Array]

    def __call__(
        self, evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """(x_next, x0_hat)."""
        x0_hat, _, grad = self.gradient(evaluate, x, info)
        mean, std = transition(x0_hat, x)
        return dps_step(mean, std, noise, grad, self.size(grad, x, x0_hat, info)), x0_hat


def guidance(
    loss: gradients.Loss, scale: float | Array, *, coordinate: str = "ve", **settings: Any
) -> Guidance:
    """DPS as guidance of `sample` (arXiv 2209.14687 algorithm 1): the gradient goes through the
    network.

    Args:
      loss: any differentiable x0_hat [B,H,W,C] -> [B].
      scale: step size, a number or [B].
      coordinate: "ve", x' - scale grad as it stands; "vp", as published, see above.
      **settings: further fields of `Settings` by name.

    Raises:
      ConfigError: a setting out of range.
      ValueError: an unknown coordinate.
    """
    if coordinate not in ("ve", "vp"):
        raise ValueError(f"coordinate={coordinate!r}; expected 've' or 'vp'")
    chosen = Settings(**numbers(scale=scale), **settings)

    def size(grad: Array, x: Array, x0_hat: Array, info: Info) -> Array:
        of_image = jnp.broadcast_to(jnp.asarray(scale, info.sigma.dtype), info.sigma.shape)
        return of_image * gradients.vp_factor(info) if coordinate == "vp" else of_image

    rule = Descent(functools.partial(gradients.of_step, loss, clip=chosen.clip_loss), size)
    return Guidance("dps", transition=scheduled(rule, chosen, chosen.clip_mean))


def build(settings: Settings, session: Session) -> Guidance:
    """DPS for the measurements of a command: unsquared norm, VP coordinate, as released.

    Raises:
      ValueError: no measurements.
    """
    measured = session.need_measurement("dps")
    words = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    scale = words.pop("scale")
    if scale is None:
        scale = SCALES.get(measured.task, 0.3)
    return guidance(measured.loss(squared=False), scale, coordinate="vp", **words)
