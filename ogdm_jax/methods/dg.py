"""Discriminator guidance: a trained score is corrected by the gradient of a real-against-generated
log ratio.

DG (Kim et al., arXiv 2211.17091) trains a classifier d(x, t) of noisy real images against noisy
samples of a finished model. At the optimum its logit is log p_data(x; t) - log p_model(x; t), whose
gradient c is what the model's score lacks. For x = x0 + sigma eps the corrected score s + w c is,
by Tweedie's formula, the denoiser

    D'(x, sigma) = D(x, sigma) + w sigma^2 c(x, sigma),     c = grad_x log_ratio(x, sigma)

so one decorator, `guide`, serves every solver. This is not OGDM's discriminator (methods/ogdm.py),
which is trained beside the denoiser on sampler steps and is gone after training; DG's is trained
afterwards by `ogdm_jax.discriminator`, belongs to one checkpoint and one sampler, and acts
only while sampling.

| also written as | with c taken where | form |
|---|---|---|
| eps' | x_vp = a x0 + b eps | eps - w b c |
| x0' | x_vp | x0 + w (b^2 / a) c |
| v' (v = a eps - b x0) | x_vp | v - w (b / a) c |
| DDPM mean' | x_vp | mean + w Sigma c |
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.config import ConfigError, Group, setting
from ogdm_jax.diffusion import clock
from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling import gradients
from ogdm_jax.sampling.churn import Churn, Info
from ogdm_jax.sampling.guidance import Guidance, Preset, constant
from ogdm_jax.sampling.schedule import Window, check_levels, window_setting
from ogdm_jax.typing import Array, Denoise, LogRatio, PyTree

CLOCKS = ("vp", "cosine")
vp_time, vp_scale, vp_sigma = clock.vp_time, clock.vp_scale, clock.vp_sigma
cosine_time, training_sigma = clock.cosine_time, clock.training_sigma


def log_ratio(logit: Callable[..., Array], clip: float = 1e-5, clock: str = "vp") -> LogRatio:
    """A discriminator's logit as a log ratio in x = x0 + sigma eps.

    Args:
      logit: (x_vp [B,...], time [B] in [0, 1], label) -> [B]; x_vp = x / sqrt(1 + sigma^2).
      clip: the probability is clipped to [clip, 1 - clip], as the authors do: where |logit| is
        above 11.5 the gradient is 0, because a saturated discriminator points nowhere. 0: no
        clipping.
      clock: "vp", or "cosine" (see cosine_time).

    Raises:
      ValueError: an unknown clock, or clip outside [0, 0.5).
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock={clock!r}; expected one of {', '.join(CLOCKS)}")
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip={clip}; expected a probability from 0 to below 0.5")

    def ratio(x: Array, sigma: Array, label: Array | None = None) -> Array:
        time = vp_time(sigma)
        x_vp = x * per_example(jax.lax.rsqrt(1 + sigma**2), x)
        value = logit(x_vp, cosine_time(time) if clock == "cosine" else time, label)
        # Nobody trains beyond the clock's end, where a flow starts; there the ratio is constant.
        value = jnp.where(time < 1 + 1e-5, value, 0.0)
        if not clip:
            return value
        limit = float(np.log1p(-clip) - np.log(clip))
        return jnp.clip(value, -limit, limit)

    return ratio


def correction(
    log_ratio: LogRatio, x: Array, sigma: Array, label: Array | None = None
) -> tuple[Array, Array]:
    """(sigma^2 c like x, log ratio [B]): what weight 1 adds to the denoised image. One backward
    pass to x.
    """

    def total(x: Array) -> tuple[Array, Array]:
        value = log_ratio(x, sigma, label)
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"log_ratio: gives shape {value.shape}; expected one number per image, "
                f"{x.shape[:1]}"
            )
        return value.sum(), value

    c, value = jax.grad(total, has_aux=True)(x)
    c = gradients.known(value, c)  # clipping would make it 0
    return per_example(sigma, x) ** 2 * c, value


def guide(
    denoise: Denoise,
    log_ratio: LogRatio,
    weight: Any = 1.0,
    sigma_min: float = 0.0,
    sigma_max: float = float("inf"),
    corrector_weight: Any = None,
    gating: str = "example",
    through: bool = False,
) -> Denoiser:
    """D'(x, sigma) = D(x, sigma) + w sigma^2 grad_x log_ratio(x, sigma) where sigma_min <= sigma <=
    sigma_max.

    arXiv 2211.17091, adjusted score s + w c, in the denoiser's form. Outside the window the
    discriminator is not evaluated at all (a real branch, where all examples are outside).

    Args:
      denoise: the denoiser; a classifier-free-guided one is fine, and so is one guided by another
        discriminator. Its `corrector` is guided too; its learned variance stays.
      log_ratio: (x, sigma [B], label) -> [B], log p_data - log p_model (see `log_ratio`, or any
        closed form).
      weight: number, array (traced ones can change without a new compilation), or function of sigma
        [B].
      sigma_min, sigma_max: window of guided levels, per example. The authors' time_min = 0.01 is
        0.044688.
      corrector_weight: for Heun's second evaluation; None = weight. The authors publish 2 and 0.
        Their code raises an IndexError for any second weight but 0; here it is evaluated where Heun
        does, at (x', sigma').
      gating: "example"; "batch" is the authors' rule, by the smallest level of the batch (differs
        only under churn).

      through: whether derivatives see the correction, as a likelihood needs; else it is a constant
        to them: a second derivative of the discriminator costs more than it steers.

    Raises:
      ValueError: an empty window or an unknown gating.
    """
    check_levels(sigma_min, sigma_max)
    if gating not in ("example", "batch"):
        raise ValueError(f"gating={gating!r}; expected 'example' or 'batch'")
    denoise = as_denoiser(denoise)
    window = (sigma_min, sigma_max, gating, through)
    second = weight if corrector_weight is None else corrector_weight
    if _is_zero(weight) and _is_zero(second):
        return denoise
    guided = _decorate(denoise, _Guided(denoise, log_ratio, weight, *window))
    if corrector_weight is None and denoise.corrector is None:
        return guided  # one denoiser for both evaluations
    base = denoise.corrector or denoise
    corrector = base
    if not _is_zero(second):
        corrector = _decorate(base, _Guided(base, log_ratio, second, *window))
    return dataclasses.replace(guided, corrector=corrector)


def _is_zero(weight: Any) -> bool:
    return isinstance(weight, int | float) and weight == 0


@dataclasses.dataclass(frozen=True)
class _Guided:
    """The evaluation of a guided denoiser; `parts` are what `Boost` needs."""

    base: Denoiser
    log_ratio: LogRatio
    weight: Any
    low: float
    high: float
    gating: str
    through: bool

    def __call__(self, x: Array, sigma: Array, label: PyTree = None) -> Array:
        if _is_zero(self.weight):
            return self.base(x, sigma, label)
        x0_hat, added, _ = self.parts(x, sigma, label)
        return x0_hat + added.astype(x0_hat.dtype)

    def variance(self, x: Array, sigma: Array, label: PyTree = None) -> tuple[Array, Array]:
        """(guided x0_hat, the base's fraction)."""
        assert self.base.variance is not None  # `_decorate` has looked
        x0_hat, fraction = self.base.variance(x, sigma, label)
        added, _ = self._correction(x, sigma, label)
        return x0_hat + added.astype(x0_hat.dtype), fraction

    def parts(self, x: Array, sigma: Array, label: PyTree = None) -> tuple[Array, Array, Array]:
        """(x0_hat, what is added to it, log ratio [B]); 0 and +inf outside the window."""
        return self.base(x, sigma, label), *self._correction(x, sigma, label)

    def _correction(self, x: Array, sigma: Array, label: PyTree) -> tuple[Array, Array]:
        weight = self.weight(sigma) if callable(self.weight) else self.weight
        w = jnp.broadcast_to(jnp.asarray(weight, sigma.dtype), sigma.shape)
        level = jnp.full_like(sigma, jnp.min(sigma)) if self.gating == "batch" else sigma
        active = (level >= self.low) & (level <= self.high) & (w != 0)

        def inside() -> tuple[Array, Array]:
            at = x if self.through else jax.lax.stop_gradient(x)
            added, ratio = correction(self.log_ratio, at, sigma, label)
            added = jnp.where(active.reshape((-1,) + (1,) * (x.ndim - 1)), added.astype(x.dtype), 0)
            return per_example(w, x) * added, jnp.where(active, ratio.astype(x.dtype), jnp.inf)

        def outside() -> tuple[Array, Array]:
            nothing = jnp.zeros_like(x)  # of the axes of x, under shard_map too
            return nothing, nothing.reshape(len(x), -1)[:, 0] + jnp.inf

        return jax.lax.cond(jnp.any(active), inside, outside)


def _decorate(base: Denoiser, guided: _Guided) -> Denoiser:
    return dataclasses.replace(
        base, evaluate=guided, variance=base.variance and guided.variance, noise=None
    )


@dataclasses.dataclass(frozen=True)
class Boost:
    """Boosting, a churn rule: images that the discriminator finds too model-like get more noise and
    more guidance.

    The carry is each image's last log ratio (+inf before the first). On every churn_every-th step,
    images whose carry is negative get S_churn = churn; on every factor_every-th step, images whose
    log ratio is negative there and then get factor times the predictor's correction. These are the
    periods of the released code; the paper says every odd step. Use it with solver "heun" or
    "euler" on a denoiser whose outermost decorator is `guide`.

    Attributes:
      base: churn of the other steps and images; its S_min and S_max hold for all.
      churn: S_churn of boosted images; 0: that of base, and boosting only weighs.
      noise: S_noise of boosted images.
      churn_every: see above.
      factor: see above.
      factor_every: see above.
    """

    base: Churn = Churn()
    churn: float = 4.0
    noise: float = 1.0
    churn_every: int = 5
    factor: float = 2.0
    factor_every: int = 2

    def init(self, batch: int) -> PyTree:
        """+inf for each image."""
        return jnp.full((batch,), jnp.inf, jnp.float32)

    def amounts(self, carry: PyTree, info: Info) -> tuple[Array, Array]:
        """(gamma [B], noise scale [B])."""
        gamma, scale = self.base.amounts((), info)
        if not self.churn:
            return gamma, scale
        hit = (carry < 0) & (info.step % self.churn_every == 0)
        more = Churn(self.churn, self.base.S_min, self.base.S_max).amounts((), info)[0]
        return jnp.where(hit, more, gamma), jnp.where(
            hit, jnp.asarray(self.noise, scale.dtype), scale
        )

    def evaluate(
        self, denoise: Denoiser, carry: PyTree, x: Array, sigma: Array, label: PyTree, info: Info
    ) -> tuple[Array, PyTree]:
        """(x0_hat, the log ratios)."""
        if not isinstance(guided := denoise.evaluate, _Guided):
            raise ValueError(
                "churn=Boost: the denoiser has no log ratio; expected dg.guide as its outermost "
                "decorator"
            )
        x0_hat, added, ratio = guided.parts(x, sigma, label)
        twice = (ratio < 0) & (info.step % self.factor_every == 0)
        factor = jnp.where(twice, jnp.asarray(self.factor, x.dtype), 1)
        return x0_hat + per_example(factor, x) * added.astype(x0_hat.dtype), ratio.astype(
            carry.dtype
        )


def default_weight(solver: str, corrector_weight: float = 0.0) -> float:
    """The weight that adds c once to the score: 1, but with Heun's two slopes, whose mean counts,
    what makes their mean 1: the authors' 2 where the second is not guided.
    """
    return 2.0 - corrector_weight if solver == "heun" else 1.0


def weight_under(weight: float, corrector_weight: float, was: str, solver: str) -> float:
    """What acts under one solver as the weights (of the first and second evaluation) did under the
    one that they were chosen for.
    """
    if (was == "heun") == (solver == "heun"):
        return weight
    if was == "heun":
        return (weight + corrector_weight) / 2
    return 2 * weight - corrector_weight


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """Settings of discriminator guidance on the command line; None: as the discriminator's training
    folder says.

    Attributes:
      discriminator: its training folder.
      weight: of Heun's first evaluation, and of solvers with one; default: the one that the
        folder's evaluation found best, or `default_weight`; both follow the solver.
      corrector_weight: of Heun's second evaluation.
      time_min, time_max: window on the VP clock, as the authors give it.
      window: noise levels (low, high) that are guided, in place of those times.
      boost: boosting, see `Boost`.
      boost_churn: S_churn of boosted images; 0: boosting doubles weights only.
      rule: see `guidance`.
    """

    GROUP, PREFIX = "dg", ""
    discriminator: str = setting("", "training folder of the discriminator")
    weight: float | None = setting(
        None, "weight; default: the folder's best, else 2 with heun and 1 with the others"
    )
    corrector_weight: float | None = setting(None, "weight of Heun's second evaluation")
    time_min: float | None = setting(None, "start of the window on the VP clock", least=0, most=1)
    time_max: float | None = setting(None, "end of the window on the VP clock", least=0, most=1)
    window: Window | None = window_setting()
    boost: bool | None = setting(None, "more noise and weight for images that look generated")
    boost_churn: float | None = setting(None, "S_churn of boosted images; 0: weights only", least=0)
    rule: str = setting(
        "score",
        "shift the score, or the mean of ancestral steps, as published for DiT's latents",
        choices=("score", "mean"),
    )

    def _check_together(self) -> None:
        low, high = self.time_min, self.time_max
        if low is not None and high is not None and low >= high:
            raise ConfigError(
                f"dg.time_min: {low} given with dg.time_max {high}; expected a window, LOW < HIGH"
            )


def _published(weight: float, corrector_weight: float = 0.0, **settings: Any) -> Preset:
    words = {"weight": weight, "corrector_weight": corrector_weight, "time_min": 0.01}
    return Preset(words | settings)


# The authors' defaults and README; ffhq64 and imagenet64 are of a third party. A weight on the
# predictor alone acts like half of it as steps grow; `second` guides both evaluations and is the
# consistent choice.
PRESETS: dict[str, Preset] = {
    "cifar10": _published(2.0),
    "cifar10_conditional": _published(1.0, boost=True),
    "ffhq64": _published(1.0, boost=True, boost_churn=0.0),
    "imagenet64": _published(1.1, boost=True, boost_churn=0.0),
    "second": _published(1.0, 1.0),
}


def mean_shift(
    known: Callable[[PyTree], LogRatio], low: float, high: float, factor: str
) -> Callable[[Array, Array, PyTree, PyTree], Array]:
    """The shift of a `Guidance`: (x, sigma, label, constants) -> factor grad_x log_ratio where
    low <= sigma <= high, else 0.

    Args:
      known: constants -> log_ratio.
      low, high: the guided levels; elsewhere the network is not evaluated.
      factor: name of the factor among the constants.
    """

    def shift(x: Array, sigma: Array, label: PyTree, constants: PyTree) -> Array:
        active = (sigma >= low) & (sigma <= high)

        def inside() -> Array:
            added, _ = correction(known(constants), x, sigma, label)
            scale = jnp.where(active, constants[factor] / sigma**2, 0)
            return per_example(scale, x) * added.astype(x.dtype)

        return jax.lax.cond(jnp.any(active), inside, lambda: jnp.zeros_like(x))

    return shift


def guidance(
    log_ratio: Callable[..., Any],
    weight: float | Array = 1.0,
    sigma_min: float = 0.0,
    sigma_max: float = float("inf"),
    corrector_weight: float | Array | None = None,
    *,
    params: PyTree = None,
    boost: Boost | None = None,
    rule: str = "score",
) -> Guidance:
    """DG as guidance of `sample`: `guide`, and boosting where it is asked for.

    Args:
      log_ratio: as for `guide`; where params are given, a function of them that returns it.
      weight: of Heun's first evaluation and of other solvers; it travels as an array, so that
        another one needs no new compilation.
      sigma_min, sigma_max: lowest and highest guided level.
      corrector_weight: of Heun's second evaluation; None: weight. The authors publish 2 and 0.
      params: the discriminator's weights, an argument of the compiled sampler.
      boost: the churn of the run, see `Boost`; None leaves churn to others.
      rule: "score", or "mean" for the solver "ancestral": mean + w Sigma c (the table above), as
        the authors' sampler of DiT's latents has it, where Sigma is learned.

    Raises:
      ValueError: an empty window, an unknown rule, or boosting beside the rule "mean".
    """
    check_levels(sigma_min, sigma_max)
    if rule not in ("score", "mean") or (rule == "mean" and boost is not None):
        raise ValueError(
            f"rule={rule!r}{' with boost' if boost else ''}; expected 'score', or 'mean' without "
            "boosting"
        )
    constants: dict[str, Any] = {"params": params, "weight": constant(weight)}
    if corrector_weight is not None:
        constants["corrector_weight"] = constant(corrector_weight)

    def known(constants: PyTree) -> LogRatio:
        return log_ratio if params is None else log_ratio(constants["params"])

    def transform(denoise: Denoiser, constants: PyTree, through: bool = False) -> Denoiser:
        second = constants.get("corrector_weight")
        if _is_zero(corrector_weight):  # then the second evaluation asks no discriminator
            second = 0.0
        window = known(constants), constants["weight"], sigma_min, sigma_max
        return guide(denoise, *window, second, through=through)

    if rule == "mean":
        shift = mean_shift(known, sigma_min, sigma_max, "weight")
        return Guidance("dg", shift=shift, constants=constants)
    exact = functools.partial(transform, through=True)
    own = {"exact": exact, "churn": boost, "constants": constants}
    # A boosting one reads its own log ratio, and is outside of another.
    return Guidance("dg", transform, outermost=2 if boost is None else 3, **own)


def build(settings: Settings, session: Session) -> Guidance:
    """DG by the discriminator of a training folder.

    Raises:
      ValueError: no folder, or one that does not fit.
    """
    if not settings.discriminator:
        raise ValueError(
            "--dg.discriminator: not given; expected the training folder of a discriminator"
        )
    assert session.open_discriminator is not None  # every command has it
    return session.open_discriminator(settings)
