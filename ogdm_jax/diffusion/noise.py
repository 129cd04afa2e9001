"""How noise levels are drawn in training, and what a squared error weighs at each (2206.00364,
table 1 and section 5).

A noise distribution is a function of one number per example, a standard normal or a uniform one,
so that tests, checkpoints of other programs and stratified draws can supply that number.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from ogdm_jax import randomness
from ogdm_jax.brief import brief
from ogdm_jax.diffusion import process
from ogdm_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class NoiseDistribution:
    """A distribution of noise levels.

    Attributes:
      kind_of_draw: "normal" (standard) or "uniform" ([0, 1)): what `sigma` is a function of.
      sigma: draw [...] -> noise level, increasing or decreasing in the draw.
      weight: sigma -> lambda(sigma), the factor of the squared error at that level.
      stratified: `sample` spreads the draws of a batch evenly over the quantiles.
      levels: float64 [T], ascending, of a distribution that draws from so many levels; else None.
    """

    kind_of_draw: str
    sigma: Callable[[Array], Array]
    weight: Callable[[Array], Array]
    stratified: bool = False
    levels: np.ndarray | None = dataclasses.field(default=None, compare=False)
    __repr__ = brief

    def __post_init__(self) -> None:
        if self.kind_of_draw not in ("normal", "uniform"):
            raise ValueError(
                f"NoiseDistribution.kind_of_draw: {self.kind_of_draw!r} given; expected "
                "'normal' or 'uniform'"
            )

    @property
    def reaches_pure_noise(self) -> bool:
        """Whether draws come up to process.PURE_NOISE."""
        if self.kind_of_draw == "normal":
            return False
        with jax.ensure_compile_time_eval():
            return bool(self.sigma(jnp.asarray([0.0, 1.0])).max() >= process.PURE_NOISE)

    def sample(
        self,
        keys: Array,
        index: Array | None = None,
        batch: int | None = None,
        key: Array | None = None,
    ) -> Array:
        """Noise levels [B], one per key.

        Args:
          keys: [B] typed keys.
          index: [B] the examples' places in the global batch, needed where it is stratified.
          batch: size of the global batch, needed where it is stratified.
          key: of the whole batch, optional: moves all strata by one common number, so that no level
            is an edge.

        Raises:
          ValueError: a stratified distribution without index and batch.
        """
        if not self.stratified:
            draw = randomness.normal if self.kind_of_draw == "normal" else randomness.uniform
            return self.sigma(draw(keys))
        if index is None or batch is None:
            raise ValueError(
                "NoiseDistribution.sample: no index and batch given; a stratified one expects both"
            )
        # Stratum i of n, moved by a number common to the batch: one draw in every n-th part of the
        # circle of quantiles.
        u = (index.astype(jnp.float32) + randomness.uniform(keys)) / batch
        if key is not None:
            u = jnp.mod(
                u + jax.random.uniform(randomness.fold_in_name(key, "strata"), dtype=u.dtype), 1.0
            )
        if self.kind_of_draw == "uniform":
            return self.sigma(u)
        tiny = jnp.finfo(u.dtype).eps / 2
        return self.sigma(jax.scipy.special.ndtri(jnp.clip(u, tiny, 1 - tiny)))


def bins(noise: NoiseDistribution, count: int = 6) -> tuple[float, ...]:
    """The count - 1 levels that part a distribution into bins of equal probability, to two digits.

    They depend on the distribution alone, so that runs of one can be compared. Levels that fall
    together, as of a clipped or a discrete distribution, count once.
    """
    shares = np.arange(1, count) / count
    draws = special.ndtri(shares) if noise.kind_of_draw == "normal" else shares
    levels = np.asarray(noise.sigma(jnp.asarray(draws, jnp.float32)), np.float64)
    return tuple(sorted({float(f"{level:.2g}") for level in levels}))


def _inverse_square(sigma: Array) -> Array:
    return 1 / jnp.square(sigma)


def _edm_weight(sigma: Array, sigma_data: float) -> Array:
    return (jnp.square(sigma) + sigma_data**2) / jnp.square(sigma * sigma_data)


def _log_normal(draw: Array, mean: float, std: float, clip: tuple[float, float] | None) -> Array:
    sigma = jnp.exp(mean + std * draw)
    return sigma if clip is None else jnp.clip(sigma, *clip)


def _velocity_weight(sigma: Array) -> Array:
    return jnp.square(1 + 1 / sigma)


def edm(
    mean: float = -1.2,
    std: float = 1.2,
    sigma_data: float = 0.5,
    clip: tuple[float, float] | None = None,
    stratified: bool = False,
) -> NoiseDistribution:
    """EDM's log-normal levels: ln sigma ~ N(mean, std^2) (2206.00364, section 5).

    Weight (sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2.

    clip: (least, greatest) level, as in OGDM's code. Raises ValueError for a std or sigma_data that
      is not positive.
    """
    for name, value in (("std", std), ("sigma_data", sigma_data)):
        _check_positive(f"noise.edm: {name}", value)
    sigma = functools.partial(_log_normal, mean=mean, std=std, clip=clip)
    return NoiseDistribution(
        "normal", sigma, functools.partial(_edm_weight, sigma_data=sigma_data), stratified
    )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} {value} given; expected a positive number")


def logit_normal(
    mean: float = 0.0,
    std: float = 1.0,
    clip: tuple[float, float] | None = None,
    stratified: bool = False,
) -> NoiseDistribution:
    """Logit-normal times of a straight path (2403.03206 section 3.1): logit t ~ N(mean, std^2).

    As sigma = t / (1 - t), logit t is ln sigma: these are log-normal levels as in `edm`. Weight
    (1 + 1 / sigma)^2 = 1 / t^2: then the weighted error of x0_hat is |v_hat - v|^2, the loss of
    flow matching, summed over pixels.

    clip: (least, greatest) level. Raises ValueError for a std that is not positive.
    """
    _check_positive("noise.logit_normal: std", std)
    sigma = functools.partial(_log_normal, mean=mean, std=std, clip=clip)
    return NoiseDistribution("normal", sigma, _velocity_weight, stratified)


def _flow(draw: Array) -> Array:
    t = jnp.maximum(1 - draw, 1 / process.PURE_NOISE)
    return t / jnp.maximum(draw, t / process.PURE_NOISE)


def flow(stratified: bool = False) -> NoiseDistribution:
    """Uniform times t = 1 - u of a straight path (2209.03003, 2210.02747), with `logit_normal`'s
    weight. Levels in (0, process.PURE_NOISE].
    """
    return NoiseDistribution("uniform", _flow, _velocity_weight, stratified)


def _vp(draw: Array, clock: process.VP, epsilon_t: float) -> Array:
    return clock.sigma(1 + draw * (epsilon_t - 1))


def vp(
    beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5, stratified: bool = False
) -> NoiseDistribution:
    """Score SDE's VP levels: sigma(t) with t uniform in [epsilon_t, 1] (2011.13456).

    t = 1 + u (epsilon_t - 1); weight 1 / sigma^2.
    """
    sigma = functools.partial(_vp, clock=process.VP(beta_d, beta_min), epsilon_t=epsilon_t)
    return NoiseDistribution("uniform", sigma, _inverse_square, stratified)


def subvp(epsilon_t: float = 1e-5, stratified: bool = False) -> NoiseDistribution:
    """As `vp`, with the levels of score SDE's sub-VP process."""
    sigma = functools.partial(_vp, clock=process.SubVP(), epsilon_t=epsilon_t)
    return NoiseDistribution("uniform", sigma, _inverse_square, stratified)


def _of_table(draw: Array, levels: np.ndarray) -> Array:
    last = len(levels) - 1
    return jnp.asarray(levels, draw.dtype)[
        jnp.minimum(jnp.floor(draw * len(levels)).astype(jnp.int32), last)
    ]


def _v_weight(sigma: Array) -> Array:
    return 1 + _inverse_square(sigma)


def _min_snr_weight(sigma: Array, most: float) -> Array:
    return jnp.minimum(_inverse_square(sigma), most)


def ddpm(
    betas: process.Schedule | process.Discrete = "linear",
    steps: int = 1000,
    stratified: bool = False,
    *,
    min_snr: float = 0.0,
) -> NoiseDistribution:
    """Levels sqrt(1 / alpha_bar_t - 1) of a discrete process, t uniform over its steps (2006.11239
    alg. 1).

    Weight 1 / sigma^2: of an eps-predicting network sum_pixels (x0_hat - x0)^2 / sigma^2 = sum
    (eps_hat - eps)^2. That is h w c times L_simple, which is a mean over pixels.

    min_snr: where above 0, the weight is min(1 / sigma^2, min_snr) (2303.09556 takes 5), with any
      prediction, since all are the error of x0_hat here.

    Raises ValueError for unknown betas.
    """
    levels = process.as_table(betas, steps).sigma
    sigma = functools.partial(_of_table, levels=levels)
    weight = functools.partial(_min_snr_weight, most=min_snr) if min_snr > 0 else _inverse_square
    return NoiseDistribution("uniform", sigma, weight, stratified, levels)


def v(
    betas: process.Schedule | process.Discrete = "linear",
    steps: int = 1000,
    stratified: bool = False,
) -> NoiseDistribution:
    """`ddpm`'s levels with the weight 1 + 1 / sigma^2 of a v-predicting network: the loss is
    |v_hat - v|^2, summed over pixels (2202.00512 section 4, "SNR + 1").

    It does not vanish at the step of pure noise that zero terminal SNR brings.
    """
    return dataclasses.replace(ddpm(betas, steps, stratified), weight=_v_weight)


def _log_uniform(draw: Array, sigma_min: float, sigma_max: float) -> Array:
    return sigma_min * jnp.exp(draw * math.log(sigma_max / sigma_min))


def ve(
    sigma_min: float = 0.02, sigma_max: float = 100.0, stratified: bool = False
) -> NoiseDistribution:
    """Score SDE's VE levels: sigma = sigma_min (sigma_max / sigma_min)^u (2011.13456).

    Weight 1 / sigma^2.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"noise.ve: range ({sigma_min}, {sigma_max}) given; expected 0 < sigma_min < sigma_max"
        )
    sigma = functools.partial(_log_uniform, sigma_min=sigma_min, sigma_max=sigma_max)
    return NoiseDistribution("uniform", sigma, _inverse_square, stratified)


def _angle(draw: Array, low: float, high: float, sigma_data: float) -> Array:
    return sigma_data * jnp.tan(low + draw * (high - low))


def angle_uniform(
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    stratified: bool = False,
) -> NoiseDistribution:
    """Angles theta = arctan(sigma / sigma_data) uniform between those of sigma_min and sigma_max.

    EDM's weight. theta is the angle of the variance-preserving path cos(theta) x0 / sd +
    sin(theta) eps (self-perceptual loss, a distribution of the second noise level).
    """
    if not 0 < sigma_min < sigma_max or not sigma_data > 0:
        raise ValueError(
            f"noise.angle_uniform: range ({sigma_min}, {sigma_max}) and sigma_data {sigma_data} "
            "given; expected 0 < sigma_min < sigma_max and a positive sigma_data"
        )
    low, high = math.atan(sigma_min / sigma_data), math.atan(sigma_max / sigma_data)
    sigma = functools.partial(_angle, low=low, high=high, sigma_data=sigma_data)
    return NoiseDistribution(
        "uniform", sigma, functools.partial(_edm_weight, sigma_data=sigma_data), stratified
    )
