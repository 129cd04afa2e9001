"""Coordinates of diffusion processes and the change between what networks predict.

Everything in the package lives in x = x0 + sigma * eps. Any process x_t = s(t) (x0 + sigma(t) eps)
is that coordinate times a scale, so a process is four functions: sigma(t), its inverse, its
derivative, and s(t). They accept NumPy arrays (float64 tables, made without starting a backend) and
JAX arrays alike.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.brief import brief
from ogdm_jax.diffusion.steps import per_example, slope
from ogdm_jax.typing import Array

Numbers = TypeVar("Numbers", Array, np.ndarray, float)
Schedule = str | Sequence[float] | np.ndarray  # a name of `betas`, or the betas themselves
SCHEDULES = ("linear", "cosine", "scaled_linear")
# The level that stands for an infinite one, where a path ends in pure noise (t = 1 of a flow, zero
# terminal signal-to-noise ratio). There x0 + sigma eps is sigma eps to float32's rounding, and
# sigma^2 is finite: rules that take ratios of levels (Euler, DDIM, ancestral) start there exactly
# from latents ~ N(0, I).
PURE_NOISE = 2.0**24


def _namespace(v: Any) -> Any:
    return jnp if isinstance(v, jax.Array) else np


@dataclasses.dataclass(frozen=True)
class VP:
    """Variance preserving: beta(t) = beta_min + beta_d t, t in [0, 1] (arXiv 2011.13456; 2206.00364
    table 1).
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, t_min: float = 1e-3) -> "VP":
        """The process with sigma(t_min) = sigma_min and sigma(1) = sigma_max (EDM's ablation
        sampler).
        """
        low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
        beta_d = 2 * (low / t_min - high) / (t_min - 1)
        return cls(float(beta_d), float(high - beta_d / 2))

    def sigma(self, t: Numbers) -> Numbers:
        """The noise level at time t."""
        xp = _namespace(t)
        return xp.sqrt(xp.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))

    def time(self, sigma: Numbers) -> Numbers:
        """Inverse of sigma(t), written without the cancellation of its usual form."""
        log = self._log_scale(sigma)
        root = _namespace(sigma).sqrt(self.beta_min**2 + 2 * self.beta_d * log)
        return 2 * log / (self.beta_min + root)

    def _log_scale(self, sigma: Numbers) -> Numbers:
        """-2 ln s at a noise level."""
        return _namespace(sigma).log1p(sigma**2)

    def sigma_derivative(self, t: Numbers) -> Numbers:
        """The derivative d sigma / d t."""
        sigma = self.sigma(t)
        return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)

    def scale(self, t: Numbers) -> Numbers:
        """s(t)."""
        return _namespace(t).exp(-0.25 * self.beta_d * t**2 - 0.5 * self.beta_min * t)


@dataclasses.dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP: VP's s(t) with the smaller noise 1 - s^2 in x_t (arXiv 2011.13456 eq. 29), so
    sigma = 1 / s - s.
    """

    def sigma(self, t: Numbers) -> Numbers:
        """The noise level at time t."""
        return 2 * _namespace(t).sinh(0.25 * self.beta_d * t**2 + 0.5 * self.beta_min * t)

    def sigma_derivative(self, t: Numbers) -> Numbers:
        """The derivative d sigma / d t."""
        return 0.5 * (self.beta_min + self.beta_d * t) * (self.scale(t) + 1 / self.scale(t))

    def _log_scale(self, sigma: Numbers) -> Numbers:
        return 2 * _namespace(sigma).arcsinh(sigma / 2)


@dataclasses.dataclass(frozen=True)
class VE:
    """Variance exploding: sigma(t) = sqrt(t), s = 1 (arXiv 2011.13456; 2206.00364 table 1)."""

    def sigma(self, t: Numbers) -> Numbers:
        """The noise level at time t."""
        return _namespace(t).sqrt(t)

    def time(self, sigma: Numbers) -> Numbers:
        """The time at which the noise level is sigma."""
        return sigma**2

    def sigma_derivative(self, t: Numbers) -> Numbers:
        """The derivative d sigma / d t."""
        return 0.5 / _namespace(t).sqrt(t)

    def scale(self, t: Numbers) -> Numbers:
        """s(t)."""
        return _namespace(t).ones_like(t)


@dataclasses.dataclass(frozen=True)
class Flow:
    """The straight path (1 - t) x0 + t eps: sigma(t) = t / (1 - t), s(t) = 1 - t, t in [0, 1)
    (arXiv 2209.03003, 2210.02747).
    """

    def sigma(self, t: Numbers) -> Numbers:
        """The noise level at time t."""
        return t / (1 - t)

    def time(self, sigma: Numbers) -> Numbers:
        """The time at which the noise level is sigma; 1 in float32 from PURE_NOISE on."""
        return sigma / (1 + sigma)

    def sigma_derivative(self, t: Numbers) -> Numbers:
        """The derivative d sigma / d t."""
        return (1 - t) ** -2

    def scale(self, t: Numbers) -> Numbers:
        """s(t)."""
        return 1 - t


@dataclasses.dataclass(frozen=True)
class EDM:
    """sigma(t) = t, s = 1: the package's own coordinate (arXiv 2206.00364 section 4)."""

    def sigma(self, t: Numbers) -> Numbers:
        """The noise level at time t."""
        return t

    def time(self, sigma: Numbers) -> Numbers:
        """The time at which the noise level is sigma."""
        return sigma

    def sigma_derivative(self, t: Numbers) -> Numbers:
        """The derivative d sigma / d t."""
        return _namespace(t).ones_like(t)

    def scale(self, t: Numbers) -> Numbers:
        """s(t)."""
        return _namespace(t).ones_like(t)


# What networks predict. x = x0 + sigma eps; x_vp = a x with a = 1 / sqrt(1 + sigma^2), b = sigma a,
# a^2 + b^2 = 1.


def eps_from_x0(x: Array, x0: Array, sigma: Array) -> Array:
    """(x - x0) / sigma.  x, x0 [B,...], sigma [B] > 0."""
    return slope(x, x0, sigma)


def x0_from_eps(x: Array, eps: Array, sigma: Array) -> Array:
    """The clean image x - sigma eps."""
    return x - per_example(sigma, x) * eps


def score_from_x0(x: Array, x0: Array, sigma: Array) -> Array:
    """The score grad log p(x; sigma) = (x0 - x) / sigma^2 (arXiv 2206.00364 eq. 3); sigma > 0."""
    return (x0 - x) / per_example(sigma, x) ** 2


def x0_from_score(x: Array, score: Array, sigma: Array) -> Array:
    """The clean image x + sigma^2 score."""
    return x + per_example(sigma, x) ** 2 * score


def vp_scale(sigma: Numbers) -> Numbers:
    """The factor a = sqrt(alpha_bar) = 1 / sqrt(1 + sigma^2) from x to x_vp."""
    return 1 / _namespace(sigma).sqrt(1 + sigma**2)


def v_from_x0(x: Array, x0: Array, sigma: Array) -> Array:
    """The velocity v = a eps - b x0 (arXiv 2202.00512 appendix D).

    x is in this package's coordinate, not scaled by a.
    """
    a, s = per_example(vp_scale(sigma), x), per_example(sigma, x)
    return a * ((x - x0) / s - s * x0)


def x0_from_v(x: Array, v: Array, sigma: Array) -> Array:
    """x0 = a x_vp - b v = a^2 x - a sigma v."""
    a = per_example(vp_scale(sigma), x)
    return a**2 * x - a * per_example(sigma, x) * v


# Discrete processes (DDPM, guided-diffusion).


def betas(schedule: Schedule = "linear", steps: int = 1000) -> np.ndarray:
    """Variances beta_1..beta_T, float64 [T].

    Args:
      schedule: "linear", 1e-4 to 0.02 scaled by 1000 / T (arXiv 2006.11239); "cosine", at most
        0.999 (arXiv 2102.09672 eq. 17); "scaled_linear", squares of equal steps from sqrt 0.00085
        to sqrt 0.012, scaled likewise (Stable Diffusion, whose code calls it "linear"); or the
        numbers themselves.
      steps: T, not used when the numbers are given.

    Raises:
      ValueError: unknown name, T < 1 or numbers outside (0, 1].
    """
    if not isinstance(schedule, str):
        values = np.asarray(schedule, np.float64)
        if values.ndim != 1 or values.size == 0 or not ((values > 0) & (values <= 1)).all():
            raise ValueError(
                f"betas: shape {values.shape}; expected a non-empty row of numbers in (0, 1]"
            )
        return values
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1")
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, steps) * 1000 / steps
    if schedule == "cosine":
        t = np.arange(steps + 1) / steps
        bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    if schedule == "scaled_linear":
        return np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2 * 1000 / steps
    raise ValueError(
        f"schedule={schedule!r}; expected {', '.join(map(repr, SCHEDULES))} or a row of betas"
    )


def space_timesteps(steps: int, spacing: str | Sequence[int]) -> np.ndarray:
    """Indices kept of 0..T-1, ascending (guided-diffusion's respacing).

    Args:
      steps: T.
      spacing: "ddimN", every k-th index for an integer k with exactly N of them; or one count per
        equal section of 0..T-1, as "10,15,20", "250" or a list: round(i (size - 1) / (count - 1))
        within each section.

    Raises:
      ValueError: no such integer stride, a section shorter than its count, or a count below 1.
    """
    if isinstance(spacing, str) and spacing.startswith("ddim"):
        wanted = int(spacing[4:]) if spacing[4:].isdigit() else 0
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == wanted:
                return np.arange(0, steps, stride)
        raise ValueError(
            f"spacing={spacing!r}; expected 'ddimN' with an integer stride that keeps N of {steps} "
            "steps"
        )
    counts = [int(c) for c in spacing.split(",")] if isinstance(spacing, str) else list(spacing)
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(
                f"spacing={spacing!r}; expected from 1 to {size} steps in section {i} of {steps}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # A running sum and not stride * j: its rounding decides ties, and networks were trained on
        # those indices.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return np.asarray(kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Discrete:
    """A DDPM of T' kept steps: tables in float64, index t = 0..T'-1 meaning t + 1 noising steps
    done.

    Attributes:
      alpha_bar: [T'] products of 1 - beta over all original steps up to the kept one.
      timesteps: [T'] original index of each kept one; what the network was trained to see.
    """

    alpha_bar: np.ndarray
    timesteps: np.ndarray
    __repr__ = brief

    @classmethod
    def make(
        cls,
        schedule: Schedule = "linear",
        steps: int = 1000,
        keep: Sequence[int] | np.ndarray | None = None,
        zero_terminal: bool = False,
    ) -> Self:
        """The process of `betas(schedule, steps)` on the kept original indices (None: all).

        zero_terminal: move q = sqrt(alpha_bar) so that the last step is pure noise: q' =
          (q - q_T) q_1 / (q_1 - q_T) (arXiv 2305.08891 algorithm 1). Its level is PURE_NOISE here.

        Raises:
          ValueError: an index outside 0..T-1, or a kept step of pure noise (alpha_bar 0, zero
            terminal SNR), whose level sigma is infinite; the steps before it can be kept.
        """
        bar = np.cumprod(1 - betas(schedule, steps))
        if zero_terminal:
            root = np.sqrt(bar)
            bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            bar[-1] = 1 / (1 + PURE_NOISE**2)
        kept = np.arange(len(bar)) if keep is None else np.unique(np.asarray(keep, np.int64))
        if kept.size == 0 or kept[0] < 0 or kept[-1] >= len(bar):
            raise ValueError(f"keep: {kept.tolist()}; expected indices from 0 to {len(bar) - 1}")
        if (bar[kept] <= 0).any():  # below 0: betas above 1, a linear schedule of few steps
            pure = kept[bar[kept] <= 0].tolist()
            raise ValueError(
                f"keep: alpha_bar is 0 at {pure}; expected steps of finite noise level, before "
                "these"
            )
        return cls(bar[kept], kept)

    @property
    def alpha_bar_before(self) -> np.ndarray:
        """alpha_bar of the step before (1 at index 0)."""
        return np.append(1.0, self.alpha_bar[:-1])

    @property
    def betas(self) -> np.ndarray:
        """1 - alpha_bar_t / alpha_bar_{t-1} over kept steps."""
        return 1 - self.alpha_bar / self.alpha_bar_before

    @property
    def sigma(self) -> np.ndarray:
        """[T'] noise level sqrt(1 / alpha_bar - 1) of each index, ascending."""
        return np.sqrt(1 / self.alpha_bar - 1)

    @property
    def posterior_variance(self) -> np.ndarray:
        """beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) (arXiv 2006.11239 eq. 7);
        0 at index 0.
        """
        return self.betas * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    def index(self, sigma: Array) -> Array:
        """Index of the level nearest in log sigma, [B] int32; the grid's own levels are found
        exactly.
        """
        levels = np.log(self.sigma)
        between = jnp.asarray((levels[1:] + levels[:-1]) / 2, sigma.dtype)
        return jnp.searchsorted(between, jnp.log(sigma)).astype(jnp.int32)

    def time(self, sigma: Array) -> Array:
        """Original step of a level, [B], between two of them linear in log sigma, as k-diffusion
        and diffusers' EulerDiscrete have it; beyond the ends theirs.
        """
        levels = jnp.asarray(np.log(self.sigma), sigma.dtype)
        return jnp.interp(jnp.log(sigma), levels, jnp.asarray(self.timesteps, sigma.dtype))


def as_table(betas: Schedule | Discrete, steps: int = 1000) -> Discrete:
    """A table as it is; else the process of these betas."""
    return betas if isinstance(betas, Discrete) else Discrete.make(betas, steps)


def iddpm_levels(steps: int = 1000, c1: float = 1e-3, c2: float = 8e-3) -> np.ndarray:
    """EDM's table u_0 > ... > u_M = 0 of the improved-DDPM cosine schedule, float64 [M + 1] (arXiv
    2206.00364 C.3.4).

    u_{j-1}^2 = (u_j^2 + 1) / max(abar(j-1) / abar(j), c1) - 1, abar(j) = sin^2(pi j / (2 M (c2 +
    1))).
    """
    bar = np.sin(0.5 * np.pi * np.arange(steps + 1) / (steps * (c2 + 1))) ** 2
    levels = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        levels[j - 1] = np.sqrt((levels[j] ** 2 + 1) / max(bar[j - 1] / bar[j], c1) - 1)
    return levels
