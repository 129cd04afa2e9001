"""Churn: noise added before a step, per example (arXiv 2206.00364 algorithm 2). A part of
guidance.

A rule may keep a carry from step to step and may evaluate the predictor itself: discriminator
guidance raises the churn of exactly those images whose log ratio was negative in the step before.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.config import ConfigError
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.typing import Array, PyTree


class Info(NamedTuple):
    """Where a sampler stands.

    Attributes:
      step: int32 scalar, counted up from 0.
      steps: how many there are (static).
      sigma: [B] level of the state.
      sigma_next: [B] level of the next state.
      key: [B] typed keys of this step, one per image, or None.
      churned: static: the transition is churn's noise, from sigma up to sigma_next, and no step
        downwards.
      constants: the guidance's own, see `guidance.Guidance`.
      rows: the guidance's own rows of this batch.
    """

    step: Array
    steps: int
    sigma: Array
    sigma_next: Array
    key: Array | None
    churned: bool = False
    constants: PyTree = None
    rows: PyTree = None


class ChurnRule(Protocol):
    """What `sample(churn=...)` calls; `Churn` is the plain one."""

    def init(self, batch: int) -> PyTree:
        """The carry before the first step; a leaf per example leads with [batch], so that images
        stay independent.
        """
        ...

    def amounts(self, carry: PyTree, info: Info) -> tuple[Array, Array]:
        """(gamma [B], noise scale [B]): sigma rises to (1 + gamma) sigma by noise of this scale."""
        ...

    def evaluate(
        self, denoise: Denoiser, carry: PyTree, x: Array, sigma: Array, label: PyTree, info: Info
    ) -> tuple[Array, PyTree]:
        """The predictor's evaluation at the raised sigma: (x0_hat, new carry)."""
        ...


@dataclasses.dataclass(frozen=True)
class Churn:
    """EDM's constants: gamma = min(S_churn / N, sqrt(2) - 1) where S_min <= sigma <= S_max, else 0.

    Attributes:
      S_churn: overall amount; 0 is none.
      S_min: lowest noise level at which it acts.
      S_max: highest noise level at which it acts.
      S_noise: scale of the noise, slightly above 1 to make up for lost detail.
    """

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = float("inf")
    S_noise: float = 1.0

    def init(self, batch: int) -> PyTree:
        """No carry."""
        return ()

    def amounts(self, carry: PyTree, info: Info) -> tuple[Array, Array]:
        """(gamma [B], S_noise [B])."""
        inside = (info.sigma >= self.S_min) & (info.sigma <= self.S_max)
        gamma = gamma_of(self.S_churn, info.steps)
        return jnp.where(inside, gamma, 0.0).astype(info.sigma.dtype), jnp.full_like(
            info.sigma, self.S_noise
        )

    def evaluate(
        self, denoise: Denoiser, carry: PyTree, x: Array, sigma: Array, label: PyTree, info: Info
    ) -> tuple[Array, PyTree]:
        """(x0_hat, carry)."""
        return denoise(x, sigma, label).astype(x.dtype), carry


def gamma_of(s_churn: float | Array, steps: int) -> float | Array:
    """min(S_churn / N, sqrt(2) - 1); S_churn a number or [B]."""
    if isinstance(s_churn, int | float):
        return min(s_churn / steps, float(np.sqrt(2) - 1))
    return jnp.minimum(s_churn / steps, np.sqrt(2) - 1)


def as_rule(churn: Any) -> ChurnRule | None:
    """None, a number S_churn, a mapping of Churn's fields, or a rule -> a rule; None where nothing
    would be added.

    Raises:
      ValueError: an unknown field, a negative number, or something that is no rule.
    """
    if isinstance(churn, int | float | np.number | jax.Array):
        churn = Churn(churn.item() if isinstance(churn, np.number) else cast(float, churn))
    elif isinstance(churn, Mapping):
        fields = [f.name for f in dataclasses.fields(Churn)]
        unknown = set(churn) - set(fields)
        if unknown:
            raise ValueError(
                f"churn: unknown setting {', '.join(sorted(unknown))}; expected {', '.join(fields)}"
            )
        churn = Churn(**churn)
    if isinstance(churn, Churn):
        for field in dataclasses.fields(churn):
            value = getattr(churn, field.name)
            if isinstance(value, int | float | np.number) and not value >= 0:
                raise ValueError(f"churn: {field.name}={value}; expected a number of at least 0")
        if isinstance(churn.S_churn, int | float) and churn.S_churn == 0:
            return None
    if churn is not None and not all(
        hasattr(churn, name) for name in ("init", "amounts", "evaluate")
    ):
        raise ValueError(
            f"churn={churn!r}; expected None, a number, a mapping of Churn's fields, or a ChurnRule"
        )
    return churn


def parse(text: str, field: str = "--churn") -> Churn | None:
    """The churn of S_churn,S_min,S_max,S_noise such as "40,0.05,50,1.003"; None of "".

    Raises:
      ConfigError: anything else; the sentence names the field.
    """
    if not text:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    good = len(numbers) == 4 and all(n >= 0 for n in numbers)
    good = good and numbers[1] <= numbers[2]
    if not good or np.isinf([numbers[0], numbers[1], numbers[3]]).any():
        raise ConfigError(
            f"{field}: {text!r} given; expected four numbers S_churn,S_min,S_max,S_noise of at "
            "least 0, S_min <= S_max (which may be inf)"
        )
    return Churn(*numbers)


def added_std(sigma: Array, sigma_hat: Array, noise_scale: Array) -> Array:
    """sqrt(sigma_hat^2 - sigma^2) noise_scale, what churn adds between two levels (arXiv 2206.00364
    algorithm 2); [B].

    Factored: where gamma is 0 a fused multiply-add would leave the rounding of sigma^2, whose root
    is visible noise.
    """
    return jnp.sqrt(jnp.maximum((sigma_hat - sigma) * (sigma_hat + sigma), 0.0)) * noise_scale
