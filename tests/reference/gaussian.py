"""guided-diffusion's chain in its own coordinate x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
(2006.11239, 2102.09672).

Everything else in the package works on x_t / sqrt(abar_t), where `precondition.adm` makes the same
networks denoisers
for every sampler. Here is the chain as DDPM programs write it: their one-step transitions, and
their losses, with the bound that trains a variance. t counts the kept steps of a respaced chain;
the network is told the original step.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion.bound import pixel_log_likelihood
from ogdm_jax.diffusion.process import Discrete, space_timesteps
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.typing import Array

EpsModel = Callable[
    [Array, Array], Array
]  # (x_t [B,H,W,C], model time [B]) -> output [B,H,W,C], or 2C with variance
Gradient = Callable[[Array, Array], Array]  # (x_t, model time) -> grad_x log p(y | x_t), [B,H,W,C]


class Moments(NamedTuple):
    """A Gaussian transition to the step below, and the x0 behind it: [B,H,W,C] each."""

    mean: Array
    log_variance: Array
    x0: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A DDPM and what its network predicts.

    Attributes:
      table: the kept steps.   steps: T of the whole process.
      predict: "eps" or "x0".
      variance: "small" (posterior), "large" (beta, the posterior's at t = 0) or "learned": the
        network's further C channels v give log variance = f log beta + (1 - f) log posterior, f =
        (v + 1) / 2 (2102.09672 eq. 15).
      rescale: tell the network t 1000 / T instead of t.
    """

    table: Discrete
    steps: int = 1000
    predict: str = "eps"
    variance: str = "large"
    rescale: bool = False

    def __post_init__(self):
        for field, options in (
            ("predict", ("eps", "x0")),
            ("variance", ("small", "large", "learned")),
        ):
            if getattr(self, field) not in options:
                raise ValueError(
                    f"Chain.{field}: {getattr(self, field)!r} given; expected one of "
                    f"{', '.join(options)}"
                )

    @classmethod
    def make(
        cls,
        schedule: str | Sequence[float] = "linear",
        steps: int = 1000,
        spacing: str | Sequence[int] = "",
        **more,
    ) -> "Chain":
        """The chain of `process.betas(schedule, steps)`, respaced by `process.space_timesteps` if
        spacing is given.
        """
        keep = space_timesteps(steps, spacing) if spacing else None
        return cls(Discrete.make(schedule, steps, keep), steps, **more)

    def model_time(self, t: Array) -> Array:
        """What the network is told at kept step t [B]: float32 [B]."""
        times = self.table.timesteps * (1000.0 / self.steps if self.rescale else 1.0)
        return jnp.asarray(times, jnp.float32)[t]

    def _at(self, values: np.ndarray, t: Array, x: Array) -> Array:
        return per_example(jnp.asarray(values, x.dtype)[t], x)

    @property
    def log_posterior_variance(self) -> np.ndarray:
        """[T'] log of the posterior's variance; entry 0, which is log 0, repeats entry 1 (a single
        step: beta).
        """
        variance = self.table.posterior_variance
        return np.log(
            np.append(variance[1:2] if len(variance) > 1 else self.table.betas, variance[1:])
        )

    # -- the forward process

    def q_sample(self, x0: Array, t: Array, noise: Array) -> Array:
        """x_t ~ q(x_t | x0) (2006.11239 eq. 4)."""
        bar = self.table.alpha_bar
        return self._at(np.sqrt(bar), t, x0) * x0 + self._at(np.sqrt(1 - bar), t, x0) * noise

    def posterior(self, x0: Array, x: Array, t: Array) -> Moments:
        """q(x_{t-1} | x_t, x0) (2006.11239 eq. 6, 7), the log variance of t = 0 replaced by that of
        t = 1.
        """
        bar, before, beta = self.table.alpha_bar, self.table.alpha_bar_before, self.table.betas
        clean = self._at(beta * np.sqrt(before) / (1 - bar), t, x)
        noisy = self._at((1 - before) * np.sqrt(1 - beta) / (1 - bar), t, x)
        log_variance = jnp.broadcast_to(self._at(self.log_posterior_variance, t, x), x.shape)
        return Moments(clean * x0 + noisy * x, log_variance, x0)

    def x0_from_eps(self, x: Array, eps: Array, t: Array) -> Array:
        """x_t / sqrt(abar) - sqrt(1 / abar - 1) eps."""
        bar = self.table.alpha_bar
        return self._at(np.sqrt(1 / bar), t, x) * x - self._at(np.sqrt(1 / bar - 1), t, x) * eps

    def eps_from_x0(self, x: Array, x0: Array, t: Array) -> Array:
        """The inverse of x0_from_eps."""
        bar = self.table.alpha_bar
        return (self._at(np.sqrt(1 / bar), t, x) * x - x0) / self._at(np.sqrt(1 / bar - 1), t, x)

    # -- the reverse process

    def p_moments(self, model: EpsModel, x: Array, t: Array, clip: bool = True) -> Moments:
        """The model's transition p(x_{t-1} | x_t). clip: clamp x0 to [-1, 1] before the mean is
        formed.
        """
        return self._transition(model(x, self.model_time(t)), x, t, clip)

    def _transition(self, output: Array, x: Array, t: Array, clip: bool) -> Moments:
        channels = x.shape[-1]
        x0 = output[..., :channels]
        if self.predict == "eps":
            x0 = self.x0_from_eps(x, x0, t)
        if clip:
            x0 = jnp.clip(x0, -1, 1)
        small = self.log_posterior_variance
        log_variance = self._at(small, t, x)
        if self.variance == "large":
            log_variance = self._at(
                np.log(np.append(np.exp(small[:1]), self.table.betas[1:])), t, x
            )
        elif self.variance == "learned":
            if output.shape[-1] != 2 * channels:
                raise ValueError(
                    f"Chain: the network has {output.shape[-1]} output channels; expected "
                    f"{2 * channels}, "
                    "half of them for the learned variance"
                )
            fraction = (output[..., channels:] + 1) / 2
            log_variance = (
                fraction * self._at(np.log(self.table.betas), t, x) + (1 - fraction) * log_variance
            )
        return Moments(self.posterior(x0, x, t).mean, jnp.broadcast_to(log_variance, x.shape), x0)

    def p_sample(
        self,
        model: EpsModel,
        x: Array,
        t: Array,
        noise: Array,
        clip: bool = True,
        gradient: Gradient | None = None,
    ) -> Array:
        """x_{t-1} by ancestral sampling (2006.11239 alg. 2), without noise at t = 0.

        gradient: of a classifier; moves the mean by variance * gradient (2105.05233 alg. 1).
        """
        mean, log_variance, _ = self.p_moments(model, x, t, clip)
        if gradient is not None:
            variance = jnp.exp(log_variance)
            if self.variance == "small":  # 0 at t = 0, where its logarithm repeats the next one
                variance = per_example(t > 0, x) * variance
            mean = mean + variance * gradient(x, self.model_time(t))
        return mean + per_example(t > 0, x) * jnp.exp(0.5 * log_variance) * noise

    def ddim_sample(
        self,
        model: EpsModel,
        x: Array,
        t: Array,
        noise: Array | None = None,
        eta: float = 0.0,
        clip: bool = True,
        gradient: Gradient | None = None,
    ) -> Array:
        """x_{t-1} by DDIM (2010.02502 eq. 12), eps re-derived from the (clamped) x0.

        gradient: of a classifier; changes eps by -sqrt(1 - abar) gradient (2105.05233 alg. 2),
          after the clamp.
        """
        x0 = self.p_moments(model, x, t, clip).x0
        bar, before = self.table.alpha_bar, self.table.alpha_bar_before
        eps = self.eps_from_x0(x, x0, t)
        if gradient is not None:
            eps = eps - self._at(np.sqrt(1 - bar), t, x) * gradient(x, self.model_time(t))
            x0 = self.x0_from_eps(x, eps, t)
        std = eta * np.sqrt((1 - before) / (1 - bar)) * np.sqrt(1 - bar / before)
        mean = (
            self._at(np.sqrt(before), t, x) * x0
            + self._at(np.sqrt(1 - before - std**2), t, x) * eps
        )
        if noise is None and eta:
            raise ValueError(
                f"ddim_sample: eta={eta} draws noise, but noise is None; expected noise shaped "
                "like x"
            )
        return mean if noise is None else mean + per_example(t > 0, x) * self._at(std, t, x) * noise

    def ddim_reverse(self, model: EpsModel, x: Array, t: Array, clip: bool = True) -> Array:
        """x_{t+1} by the DDIM ODE run backwards (eta = 0); from the last step to pure noise."""
        x0 = self.p_moments(model, x, t, clip).x0
        above = np.append(self.table.alpha_bar[1:], 0.0)
        eps = self.eps_from_x0(x, x0, t)
        return self._at(np.sqrt(above), t, x) * x0 + self._at(np.sqrt(1 - above), t, x) * eps

    # -- losses, one number per example

    def bound(self, output: Array, x0: Array, x: Array, t: Array, clip: bool = False) -> Array:
        """[B] term t of the variational bound in bits per dimension (2102.09672 eq. 4-7), from the
        network's output.

        KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), and at t = 0 -log p(x0 | x_1) of 8-bit pixels.
        """
        true, ours = self.posterior(x0, x, t), self._transition(output, x, t, clip)
        kl = gaussian_kl(true.mean, true.log_variance, ours.mean, ours.log_variance)
        last = -pixel_log_likelihood(x0, ours.mean, 0.5 * ours.log_variance)
        return jnp.where(t == 0, _mean(last), _mean(kl)) / math.log(2)

    def losses(
        self, model: EpsModel, x0: Array, t: Array, noise: Array, bound_scale: float = 1.0
    ) -> dict[str, Array]:
        """{"loss", "mse", and "vb" where the variance is learned}, [B] each: L_hybrid of 2102.09672
        eq. 16.

        mse = mean over pixels of (prediction - target)^2; vb = bound_scale * bound, whose gradient
        reaches the variance channels only. guided-diffusion's scale is 1, and T' / 1000 with
        rescale_learned_sigmas.
        """
        x = self.q_sample(x0, t, noise)
        output = model(x, self.model_time(t))
        mean, rest = output[..., : x.shape[-1]], output[..., x.shape[-1] :]
        found = {"mse": _mean(jnp.square((noise if self.predict == "eps" else x0) - mean))}
        if self.variance == "learned":
            frozen = jnp.concatenate([jax.lax.stop_gradient(mean), rest], axis=-1)
            found["vb"] = bound_scale * self.bound(frozen, x0, x, t)
        return found | {"loss": sum(found.values())}


def _mean(values: Array) -> Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def gaussian_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Array:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)) in nats, elementwise."""
    gap = log_variance1 - log_variance2
    return 0.5 * (jnp.exp(gap) - 1 - gap + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2))
