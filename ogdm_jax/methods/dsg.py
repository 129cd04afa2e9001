"""DSG: guidance with a spherical Gaussian constraint (Yang et al., ICML 2024, arXiv 2402.03201).

A random step is x' ~ N(mean, std^2 I) in n = H W C numbers, so x' lies close to the sphere of
radius r = sqrt(n) std. Loss guidance pushes it off; DSG takes the step that lowers a loss
L(x0_hat(x)) most on the sphere, mixed with the step that the noise alone would take:

    d* = -r grad / ||grad||        d = (1 - rate) std eps + rate d*        x' = mean + r d / ||d||

Any step with a known mean and std will do (arXiv section 4; derivations for this coordinate beside
each solver): ancestral steps with every choice of variance, ddim and heun with eta > 0 (heun: "down
by Heun, up on the sphere"), and the noise that churn adds. A deterministic step has r = 0 and
cannot be guided. DSG is an optimiser on a sphere and no sampler of the posterior: the spread of its
results shrinks as the rate grows (rate 1 has none).

Differences from the released code: norms are per image (theirs broadcast wrongly for batches above
1); the last step, which has no noise here, is not guided; a zero gradient leaves the noise's
direction at every rate (theirs at rate 1 stays at the mean); fixed eps of 1e-8 and 1e-20 are
replaced by scaling with the largest number.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.config import ConfigError, setting
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.diffusion.steps import per_example, spread
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling import gradients
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.guidance import Evaluate, Guidance, Moments, Preset, plain_step
from ogdm_jax.sampling.schedule import Schedule, numbers, scheduled
from ogdm_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Settings(Schedule):
    """Settings of DSG beside those of `Schedule`.

    Attributes:
      rate: guidance rate g of `spherical_step`.
      strength: replaces rate, see `rate_of_strength`.
      stop_ratio: of the command line: images whose residual ratio ||y - A x0|| / (noise sqrt(m)) is
        at most this take the plain step (the discrepancy principle: 1).
      backward: False takes the gradient at x0_hat, without a backward pass through the network.
      samples: above 0, the gradient is smoothed by so many draws, for which the loss has to be a
        negative log-likelihood (`gradients.smoothed`).
      clip_loss: the loss sees x0_hat clipped to [-1, 1] (released code: yes, where linear).
      clip_mean: so does the transition of every step, guided or not (released code: likewise).
    """

    GROUP = "dsg"
    rate: float = setting(0.2, "guidance rate: 0 is the noise, 1 the gradient", least=0, most=1)
    strength: float | None = setting(
        None, "replaces rate; about equal over numbers of steps, 1 is moderate", least=0
    )
    stop_ratio: float | None = setting(
        None, "no guidance of images whose residual ratio is at most this", least=0
    )
    backward: bool = setting(True, "take the gradient through the network, else at x0_hat")
    samples: int = setting(0, "smooth the gradient by so many draws", least=0, most=1024)
    clip_loss: bool = setting(False, "the loss sees x0_hat clipped to [-1, 1]")
    clip_mean: bool = setting(False, "every step's transition sees x0_hat clipped to [-1, 1]")

    def _check_together(self) -> None:
        super()._check_together()
        if self.samples and not self.backward:
            raise ConfigError(
                f"dsg.samples: {self.samples} given with dsg.backward False; expected 0, or "
                "dsg.backward True"
            )


def _linear(task: str, steps: int, rate: float, interval: int = 1) -> Preset:
    """A row of table 3: released for linear problems, with clipping."""
    solver = {"solver": "ancestral"} if steps == 1000 else {"solver": "ddim", "eta": 1.0}
    clip = {"clip_loss": True, "clip_mean": True}
    return Preset(
        {"rate": rate, "interval": interval} | clip,
        {"task": task, "steps": steps, "grid": "respaced"} | solver,
    )


def _steering(task: str, rate: float, grid: str = "ddim", **settings: Any) -> Preset:
    sampling = {"task": task, "steps": 100, "solver": "ddim", "eta": 1.0, "grid": grid}
    return Preset({"rate": rate, "interval": 1} | settings, sampling)


def _levels(low: int, high: int) -> tuple[float, float]:
    """Levels of Stable Diffusion's schedule for indices of its 100 steps, t = 10 index + 1."""
    sigma = Discrete.make(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).sigma
    return float(sigma[10 * low + 1]), float(sigma[10 * high + 1])


# Table 3 of the appendix (arXiv 2402.03201); the row of deblurring in 20 steps is not known to us:
# 0.1 as for 50. Face identity is guided while t > 100 of the linear schedule; style at the indices
# 30 to 69 of Stable Diffusion's grid, of which 40 to 69 are repeated.
PRESETS: dict[str, Preset] = {
    "inpaint_1000": _linear("inpaint", 1000, 0.2, 5),
    "super_resolution_1000": _linear("super_resolution", 1000, 0.2, 20),
    "deblur_1000": _linear("deblur", 1000, 0.2, 5),
    "inpaint_100": _linear("inpaint", 100, 0.2),
    "super_resolution_100": _linear("super_resolution", 100, 0.1, 2),
    "deblur_100": _linear("deblur", 100, 0.1),
    "inpaint_50": _linear("inpaint", 50, 0.2),
    "super_resolution_50": _linear("super_resolution", 50, 0.1),
    "deblur_50": _linear("deblur", 50, 0.1),
    "inpaint_20": _linear("inpaint", 20, 0.2),
    "super_resolution_20": _linear("super_resolution", 20, 0.2),
    "deblur_20": _linear("deblur", 20, 0.1),
    "face_id": _steering("face_id", 0.05, window=(float(Discrete.make().sigma[101]), float("inf"))),
    "style": _steering(
        "style",
        0.1,
        "leading",
        window=_levels(30, 69),
        repeats=3,
        repeat_window=_levels(40, 69),
    ),
}


def _unit(v: Array) -> tuple[Array, Array]:
    """(v / ||v||, whether it is not 0 [B,1,..]) per image: safe at 0, and for huge and tiny v; nan
    and inf have no direction and give nan.
    """
    axes = tuple(range(1, v.ndim))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(v), axes, keepdims=True))
    known = largest != 0  # of nan too, which stays
    scaled = v / jnp.where(known, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(jnp.where(known, jnp.square(scaled), 1.0), axes, keepdims=True))
    return scaled / norm, known


def spherical_step(mean: Array, std: Array, eps: Array, grad: Array, rate: float | Array) -> Array:
    """DSG's step (arXiv 2402.03201 eq. of algorithm 1): always at distance sqrt(n) std from the
    mean.

    Args:
      mean: [B,H,W,C] of the transition.
      std: of the transition: a number, [B], or like mean (a learned variance: the radius is then
        its root of squares).
      eps: like mean, ~ N(0, I).
      grad: like mean, any positive multiple of a loss's gradient; only its direction counts.
      rate: g in [0, 1], a number or [B]: 0 is the noise's direction on the sphere, 1 pure descent
        without randomness; published 0.05 to 0.2. The angle to the noise has cosine g / sqrt(g^2 +
        (1 - g)^2) towards -grad.

    Returns:
      Like mean. Norms are taken in float32 at least. Zero gradient: mean + r eps / ||eps||; that
      and zero noise: mean. A gradient with nan or inf: nan.

    Raises:
      ValueError: a rate outside [0, 1].
    """
    if isinstance(rate, int | float | np.number) and not 0 <= rate <= 1:
        raise ValueError(f"rate={rate}; expected a number from 0 to 1")
    wide = jnp.promote_types(mean.dtype, jnp.float32)
    mean_, eps, grad = (v.astype(wide) for v in (mean, eps, grad))
    std = spread(std, mean_)
    root_n = math.sqrt(math.prod(mean.shape[1:]))
    if std.shape == mean.shape:
        radius = jnp.sqrt(jnp.sum(jnp.square(std), tuple(range(1, mean.ndim)), keepdims=True))
        eps = eps * std * jnp.where(radius != 0, root_n / jnp.where(radius != 0, radius, 1.0), 0.0)
    else:
        radius = root_n * std
    downhill, known = _unit(grad)
    rate = jnp.where(known, spread(rate, mean_), 0.0)
    # std cancels: nothing is divided by it
    d, moved = _unit((1 - rate) * eps - rate * root_n * downhill)
    return (mean_ + radius * jnp.where(moved, d, _unit(eps)[0])).astype(mean.dtype)


def rate_of_cosine(cosine: float | Array) -> float | Array:
    """The rate at which the step's cosine with -grad is this: c / (c + sqrt(1 - c^2))."""
    return cosine / (cosine + (1 - cosine**2) ** 0.5)


def rate_of_strength(strength: float, steps: int, interval: int = 1) -> float:
    """The rate that keeps guidance equally strong whatever the number of steps.

    A step's std falls as 1 / sqrt(steps), so the guided way is about strength = sqrt(steps) cosine
    / interval; a fixed rate guides more with more steps. 1 is moderate; published settings lie
    between 0.4 and 2.4.

    Raises:
      ValueError: a negative strength.
    """
    if strength < 0:
        raise ValueError(f"strength={strength}; expected a number of at least 0")
    return float(rate_of_cosine(min(strength * interval / math.sqrt(steps), 1.0)))


def guidance(
    loss: gradients.Loss,
    rate: float | Array = 0.2,
    interval: int = 1,
    *,
    stop: float | Array | None = None,
    **settings: Any,
) -> Guidance:
    """DSG as guidance of `sample` (arXiv 2402.03201 algorithm 1): `spherical_step` on guided steps,
    plain steps between.

    Squared, unsquared or otherwise increasing functions of the same loss give the same images.

    Args:
      loss: any differentiable x0_hat [B,H,W,C] -> [B]; of measurements:
        `operators.measurement_loss`.
      rate: of `spherical_step`; a number or [B].
      interval: every how many steps are guided, counted back from the last as released (the last
        itself, a step without noise, is not guided but under churn).
      stop: images whose loss is at most this, a number or [B], take the plain step.
      **settings: further fields of `Settings` by name.

    Raises:
      ConfigError: a setting out of range.
      ValueError: when sampling, an interval above 1 that leaves only the last step, whose level 0
        has no noise to guide.
    """
    chosen = Settings(interval=interval, **numbers(rate=rate), **settings)
    if chosen.stop_ratio is not None:
        raise ConfigError(
            f"dsg.stop_ratio: {chosen.stop_ratio:g} given with a plain loss; expected stop, a loss"
        )
    return _of(loss, rate, stop, chosen)


def build(settings: Settings, session: Session) -> Guidance:
    """DSG for the measurements of a command.

    Raises:
      ValueError: no measurements, or stop_ratio without measurement noise.
    """
    measured, stop = session.need_measurement("dsg"), settings.stop_ratio
    loss, unit = measured.loss(), measured.loss_unit
    if stop is not None and not unit:
        raise ValueError(
            f"--dsg.stop_ratio: {stop:g} given; expected a task with measurement noise"
        )
    if settings.samples:  # `gradients.smoothed` wants a likelihood
        loss = measured.energy()
        unit /= math.sqrt(2) * (1.0 if measured.poisson else measured.std)
    if stop is not None:
        stop = (stop * unit) ** 2 * measured.operator.count(measured.y)
    return _of(loss, settings.rate, stop, settings)


def _of(
    loss: gradients.Loss, rate: float | Array, stop: float | Array | None, settings: Settings
) -> Guidance:
    rule = Spherical(loss, rate, stop, settings)
    return Guidance("dsg", transition=scheduled(rule, settings, settings.clip_mean))


@dataclasses.dataclass(frozen=True, eq=False)
class Spherical:
    """The transition rule of DSG's guided steps; fields as the arguments of `guidance`."""

    loss: gradients.Loss
    rate: float | Array
    stop: float | Array | None
    settings: Settings

    def __call__(
        self, evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """(x_next, x0_hat). The step to 0 has no noise, so a sphere of radius 0: nothing to guide,
        and no gradient to pay for.
        """
        interval = self.settings.interval
        if interval > 1 and interval >= info.steps and not info.churned:
            raise ValueError(
                f"dsg.interval: {interval} given for {info.steps} steps, which leaves only the "
                "last one, without noise to guide; expected an interval below the number of steps"
            )
        return jax.lax.cond(
            info.sigma_next[0] > 0,
            lambda x, noise: self._guided(evaluate, transition, x, noise, info),
            lambda x, noise: plain_step(evaluate, transition, x, noise, info),
            x,
            noise,
        )

    def _guided(
        self, evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        settings, rate = self.settings, self.rate
        how = settings.clip_loss, settings.samples, settings.backward
        x0_hat, values, grad = gradients.of_step(self.loss, evaluate, x, info, *how)
        mean, std = transition(x0_hat, x)
        if settings.strength is not None:
            rate = rate_of_strength(settings.strength, info.steps, settings.interval)
        x_next = spherical_step(mean, std, noise, grad, rate)
        if self.stop is not None:
            if settings.samples:  # values are of the smoothed loss
                values = self.loss(gradients.clipped(x0_hat, settings.clip_loss))
            plain = mean + spread(std, x) * noise
            x_next = jnp.where(per_example(values <= self.stop, x) > 0, plain, x_next)
        return x_next, x0_hat
