"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), also within a limited interval
(arXiv 2404.07724).

    D_w(x, sigma, y) = D(x, sigma, -) + w (D(x, sigma, y) - D(x, sigma, -))

for a denoiser trained with label dropout (config.data.label_dropout > 0). w = 1 is the conditional
model, w = 0 the unconditional one; the papers also write 1 + w or s for it. Outside the interval
the conditional model answers alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ogdm_jax.config import ConfigError, Group, setting
from ogdm_jax.diffusion.denoiser import Denoiser, Evaluation, as_denoiser, decorated
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling.guidance import Guidance, constant
from ogdm_jax.sampling.schedule import Window, check_levels, inside, numbers, window_setting
from ogdm_jax.typing import Array, Denoise, PyTree


def guide(
    denoise: Denoise,
    weight: Any = 1.5,
    sigma_min: float = 0.0,
    sigma_max: float = float("inf"),
    channels: int | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    """The denoiser under classifier-free guidance where sigma_min <= sigma <= sigma_max.

    Both evaluations run as one batch of twice the size; outside the interval (a real branch, where
    every example is outside) there is only one.

    Args:
      denoise: trained with label dropout. Its `corrector` is guided too; its range of levels,
        rounding and learned variance (that of the given labels) are handed on. Under `dg.guide` is
        the published order; over it, the log ratio is asked for the label -1 as well.
      weight: w above; a number, an array, or a function of sigma [B].
      sigma_min, sigma_max: the interval, per example; 2404.07724 finds 0.28 to 2.9 best on
        ImageNet-512.
      channels: only the first so many are guided, the others stay conditional; None: all.
        The published DiT samples guide three of a latent's four channels.
      rescale: phi of arXiv 2305.08891 section 3.4: the guided output of the network gets this share
        of the way to the standard deviation that the conditional one has in an image; 0.7 there,
        for models of zero terminal signal-to-noise ratio. 0: none.

    Raises:
      ValueError: an empty interval; at the call, no labels.
    """
    check_levels(sigma_min, sigma_max)
    denoise = as_denoiser(denoise)
    if isinstance(weight, int | float) and weight == 1:
        return denoise

    def guided(
        base: Denoiser, evaluate: Evaluation, x: Array, sigma: Array, label: PyTree
    ) -> list[Array]:
        """The [x0_hat, ...] of evaluate for the given labels, with x0_hat guided."""
        active = inside((sigma_min, sigma_max), sigma)

        def both() -> list[Array]:
            (conditional, plain), *rest = with_and_without(base, evaluate, x, sigma, label)
            chosen = weight(sigma) if callable(weight) else weight
            w = jnp.where(active, jnp.asarray(chosen, sigma.dtype), 1)
            mixed = plain + per_example(w, plain) * (conditional - plain)
            if channels is not None:
                mixed = jnp.concatenate([mixed[..., :channels], conditional[..., channels:]], -1)
            if rescale:
                kept = per_example(base.parts(sigma)[0], x) * x  # the rest is c_out times F
                spread = lambda x0_hat: jnp.std(x0_hat - kept, (1, 2, 3))
                factor = 1 + rescale * (spread(conditional) / spread(mixed) - 1)
                mixed = kept + per_example(factor, kept) * (mixed - kept)
            return [mixed, *(v[0] for v in rest)]

        if sigma_min <= 0 and sigma_max == float("inf"):
            return both()
        return jax.lax.cond(jnp.any(active), both, lambda: evaluate(x, sigma, label))

    return decorated(denoise, guided)


def with_and_without(
    denoise: Denoiser, evaluate: Evaluation, x: Array, sigma: Array, label: PyTree
) -> list[list[Array]]:
    """What `evaluate` says of the images under their condition and under none, in one batch of
    twice the size: [[x0_hat, x0_hat without], ...].

    Raises:
      ValueError: no labels.
    """
    if label is None:
        raise ValueError(
            "label=None; classifier-free guidance expects labels of a conditional denoiser"
        )
    twice = lambda v: jnp.concatenate([v, v]) if jnp.ndim(v) else v
    labels = jax.tree.map(lambda *pair: jnp.concatenate(pair), label, denoise.unconditional(label))
    return [jnp.split(v, 2) for v in evaluate(twice(x), twice(sigma), labels)]


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """Settings of classifier-free guidance.

    Attributes:
      weight: w above.
      window: noise levels (low, high) of the interval; None: all.
      channels: how many of the channels are guided; 0: all.
      below: another weight below a noise level, (level, weight); None: the same.
      rescale: of `guide`.
    """

    GROUP, PREFIX = "cfg", ""
    weight: float = setting(1.5, "1 is the conditional model alone")
    window: Window | None = window_setting()

    channels: int = setting(
        0,
        "guide the first N channels only; 3 as DiT's samples were published; 0: all",
        least=0,
        expected="a number of channels, or 0 for all",
    )
    below: tuple[float, float] | None = setting(
        None, "LEVEL,WEIGHT: another weight at noise levels up to LEVEL; default: the same"
    )
    rescale: float = setting(
        0.0,
        "share of the way back to the conditional output's standard deviation; 0.7 as published "
        "for zero terminal SNR",
        least=0,
        most=1,
    )

    def _check_together(self) -> None:
        if self.rescale and self.weight == 1 and self.below is None:
            raise ConfigError(
                f"cfg.rescale: {self.rescale:g} given with cfg.weight 1, where nothing is guided; "
                "expected another weight"
            )
        if self.below is not None:
            if not self.below[0] > 0:
                raise ConfigError(
                    f"cfg.below: {self.below} given; expected LEVEL,WEIGHT with a level above 0"
                )


def guidance(
    weight: float | Array = 1.5,
    window: Window | None = None,
    channels: int = 0,
    below: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Guidance:
    """Classifier-free guidance as guidance of `sample`; the weight is an array, so that another one
    compiles nothing.

    Args:
      weight: w above; a number, or an array, traced or [B].
      window: noise levels (low, high) of the interval; None: all.
      channels: how many of the channels are guided; 0: all.
      below: (level, weight): another weight at noise levels up to this one; None: the same. DG's
        best figures on DiT have 1.25, and 3 at the last 200 of 1,000 steps.
      rescale: of `guide`.

    Raises:
      ConfigError: an interval that is not 0 <= low < high.
    """
    more = {"channels": channels, "below": below, "rescale": rescale}
    chosen = Settings(**numbers(weight=weight), window=window, **more)
    low, high = chosen.window or (0.0, float("inf"))

    def transform(denoise: Denoiser, constants: PyTree) -> Denoiser:
        def weight(sigma: Array) -> Array:
            return jnp.where(sigma <= constants["level"], constants["below"], constants["weight"])

        guided = weight if chosen.below else constants["weight"]
        return guide(denoise, guided, low, high, chosen.channels or None, rescale)

    held: dict[str, Any] = {"weight": weight}
    if chosen.below:
        held |= {"level": chosen.below[0], "below": chosen.below[1]}
    constants = {name: constant(value) for name, value in held.items()}
    return Guidance("cfg", denoiser=transform, constants=constants, outermost=-1)


def build(settings: Settings, session: Session) -> Guidance:
    """Classifier-free guidance of a command's model.

    Raises:
      ValueError: a model without classes, or one that never saw hidden labels.
    """
    check_hidden_labels("cfg", session)
    have = session.model.image_shape[-1]
    if settings.channels > have:
        raise ConfigError(
            f"--cfg.channels: {settings.channels} given, the images have {have}; expected "
            "fewer, or 0 for all"
        )
    return guidance(*vars(settings).values())


def check_hidden_labels(method: str, session: Session) -> None:
    """Raises ValueError for a model without classes, or one that never saw hidden labels."""
    trouble = ""
    if session.model.text is not None:  # compared with the negative text
        return
    if not session.model.label_dim:
        trouble = "the model is unconditional; expected one trained with data.conditional"
    elif not session.config.data.label_dropout:
        trouble = "the model never saw hidden labels; expected data.label_dropout above 0"
    elif session.labels is not None and (session.labels < 0).all():
        trouble = "the images have no class (--label -1), so both of its evaluations are one; "
        trouble += "expected a class"
    if trouble:
        raise ValueError(f"--guidance {method}: {trouble}")
