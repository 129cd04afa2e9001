"""Which steps are guided, and how often: the settings that methods with a transition share."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import randomness
from ogdm_jax.config import ConfigError, Group, setting
from ogdm_jax.config.fields import is_number
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.gradients import clipped
from ogdm_jax.sampling.guidance import Evaluate, Moments, TransitionRule, plain_step
from ogdm_jax.typing import Array

Window = tuple[float, float]


def window_setting(help: str = "LOW,HIGH noise levels that are guided; default: all") -> Any:
    """A field for a window of a method's Settings: two rising levels from 0 on, inf among them."""
    levels = "LOW,HIGH noise levels with 0 <= LOW < HIGH"
    return setting(None, help, least=0, most=math.inf, rising=True, expected=levels)


@dataclasses.dataclass(frozen=True)
class Schedule(Group):
    """Settings of methods with a transition: their Settings extend this class.

    Attributes:
      interval: guided are the steps whose index, counted down to 0 at the last step, is a multiple
        of it (as released); the others cost no gradient.
      window: (low, high): guided are noise levels with low <= sigma <= high; None: all.
      repeats: time travel: passes of each guided step, each after the first from its result noised
        back to the step's level.
      repeat_window: noise levels with time travel; None: all.
    """

    GROUP, PREFIX = "guidance", ""
    interval: int = setting(1, "guide every so many steps, counted back from the last", least=1)
    window: Window | None = window_setting()
    repeats: int = setting(1, "time travel: passes of each guided step", least=1, most=1000)
    repeat_window: Window | None = window_setting("LOW,HIGH noise levels with time travel")

    def _check_together(self) -> None:
        if self.repeat_window is not None and self.repeats == 1:
            raise ConfigError(
                f"{self.GROUP}.repeat_window: {self.repeat_window} given; expected "
                f"{self.GROUP}.repeats of at least 2 with it"
            )

    @property
    def everywhere(self) -> bool:
        """Whether every step is guided."""
        return self.interval == 1 and self.window is None


def numbers(**settings: Any) -> dict[str, Any]:
    """Those settings that are plain numbers: an array (one number per image, or traced) has no
    limits that could be checked.
    """
    plain = lambda value: is_number(value) or isinstance(value, np.number)
    return {name: value for name, value in settings.items() if plain(value)}


def scheduled(rule: TransitionRule, schedule: Schedule, clip: bool = False) -> TransitionRule:
    """The rule on the steps of a schedule and the plain step on the others.

    Args:
      rule: of the guided steps.
      schedule: see there.
      clip: the transition of every step sees x0_hat clipped to [-1, 1].
    """
    return Scheduled(rule, schedule, clip)


@dataclasses.dataclass(frozen=True, eq=False)
class Scheduled:
    """A transition rule on some steps, several times over: see `scheduled`."""

    rule: TransitionRule
    schedule: Schedule
    clip: bool

    def __call__(
        self, evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """One step: guided where the schedule says so. A real branch, so that the other steps cost
        no gradient.
        """
        moments = lambda x0_hat, x: transition(clipped(x0_hat, self.clip), x)
        if self.schedule.everywhere:
            return self._passes(evaluate, moments, x, noise, info)
        guided = (info.steps - 1 - info.step) % self.schedule.interval == 0
        # A sampler's step is at one level, so the first image speaks for all.
        guided &= inside(self.schedule.window, info.sigma[0])
        return jax.lax.cond(
            guided,
            lambda x, noise: self._passes(evaluate, moments, x, noise, info),
            lambda x, noise: plain_step(evaluate, moments, x, noise, info),
            x,
            noise,
        )

    def _passes(
        self, evaluate: Evaluate, transition: Moments, x: Array, noise: Array, info: Info
    ) -> tuple[Array, Array]:
        """Time travel (FreeDoM, arXiv 2303.09833): x <- x' + sqrt(sigma^2 - sigma'^2) z, and again.

        One pass where sigma lies outside the window, and where churn raises the level. Noise of
        later passes comes from the step's key.
        """
        repeats = self.schedule.repeats
        if repeats == 1:
            return self.rule(evaluate, transition, x, noise, info)
        keys_of_step = info.key
        if keys_of_step is None:
            raise ValueError("key=None; expected a key, because time travel draws noise")
        gap = (info.sigma - info.sigma_next) * (info.sigma + info.sigma_next)
        back = jnp.sqrt(jnp.maximum(gap, 0.0))

        def again(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_of_step, i)
            renoise, fresh = (
                randomness.normal(randomness.fold_in_each(keys, name), x.shape[1:]).astype(x.dtype)
                for name in ("renoise", "noise")
            )
            x_again = state[0] + per_example(back, x) * renoise
            return self.rule(evaluate, transition, x_again, fresh, info._replace(key=keys))

        more = info.sigma_next[0] < info.sigma[0]
        more &= inside(self.schedule.repeat_window, info.sigma[0])
        first = self.rule(evaluate, transition, x, noise, info)
        return jax.lax.fori_loop(1, jnp.where(more, repeats, 1), again, first)


def check_levels(sigma_min: float, sigma_max: float) -> None:
    """Raises ValueError for levels between which there is none."""
    if not sigma_min <= sigma_max:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}; expected sigma_min <= sigma_max"
        )


def inside(window: Window | None, sigma: Array) -> Array:
    """Where guidance acts, like sigma: low <= sigma <= high; everywhere without a window."""
    low, high = window or (0.0, math.inf)
    return (sigma >= low) & (sigma <= high)
