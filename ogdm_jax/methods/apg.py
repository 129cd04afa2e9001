"""APG: adaptive projected guidance, classifier-free guidance without its oversaturation (Sadat et
al., arXiv 2410.02416).

    m  = (D(x, y) - D(x, -)) + momentum m_before
    m' = m min(1, norm / ||m||)
    D' = D(x, y) + (w - 1) (m'_orthogonal + eta m'_parallel)

Parallel and orthogonal are to D(x, y), norms are of each image. w = 1 is the conditional model; eta
= 1 without norm and momentum is `cfg`. The paper has eta 0, a momentum of -0.5 to -0.75, and a norm
that is found for each model (2.5 to 15 for latents).

The momentum goes from step to step: m_before is the m of the step before, at its first evaluation;
all evaluations of a step (Heun's second) add to the same one. Under a method that owns transitions,
under churn, with a learned variance and with the solver pc, the difference at the step's start
costs one evaluation more, which `nfe` does not count.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ogdm_jax.config import Group, setting
from ogdm_jax.diffusion.denoiser import Denoiser, Evaluation, decorated
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.methods import cfg
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling.guidance import Guidance, Memory, constant
from ogdm_jax.sampling.schedule import Window, inside, numbers, window_setting
from ogdm_jax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """Settings of APG.

    Attributes:
      weight: w above.
      norm: longest difference; 0: any.
      eta: share of the parallel part.
      momentum: see above; negative as published.
      window: noise levels (low, high) that are guided; None: all.
    """

    GROUP, PREFIX = "apg", ""
    weight: float = setting(4.0, "1 is the conditional model alone")
    norm: float = setting(0.0, "longest difference of the two predictions; 0: any", least=0)
    eta: float = setting(0.0, "share of the part parallel to the prediction; 1 as cfg")
    momentum: float = setting(
        0.0, "of the difference over steps; published: -0.5 to -0.75", above=-1, below=1
    )
    window: Window | None = window_setting()


class _Seen(NamedTuple):
    """What was evaluated: at these arrays, [x0_hat, its difference to the one without]."""

    x: Array
    sigma: Array
    found: list[Array]


def projected(x0_hat: Array, m: Array, settings: Settings, weight: Any) -> Array:
    """D' above, of D(x, y) and m, both [B,H,W,C]; per image, in float32 at least."""
    wide = jnp.promote_types(x0_hat.dtype, jnp.float32)
    d, m = x0_hat.astype(wide), m.astype(wide)
    axes = tuple(range(1, d.ndim))
    total = lambda v: jnp.sum(v, axes, keepdims=True)
    if settings.norm:
        squares = total(m**2)
        long = squares > settings.norm**2
        m = m * jnp.where(long, settings.norm / jnp.sqrt(jnp.where(long, squares, 1.0)), 1.0)
    length = total(d**2)
    some = length != 0  # of nan too, which stays
    parallel = jnp.where(some, total(m * d) / jnp.where(some, length, 1.0), 0.0) * d
    moved = d + (per_example(weight, d) - 1) * (m - (1 - settings.eta) * parallel)
    return moved.astype(x0_hat.dtype)


def guide(
    denoise: Denoiser,
    settings: Settings,
    weight: Any,
    before: Array | None = None,
    seen: _Seen | None = None,
) -> Denoiser:
    """The denoiser under APG; outside the window (a real branch) the conditional one.

    Args:
      denoise: trained with label dropout. Its `corrector` is guided too; its learned variance is
        that of the given labels.
      settings: all but the weight.
      weight: w above; a number or an array.
      before: momentum m of the step before; None: none.
      seen: what `difference` gave at the step's start, so that it is not evaluated twice.
    """

    def mixed(found: list[Array], sigma: Array) -> list[Array]:
        x0_hat, m, *rest = found
        m = m if before is None else m + settings.momentum * before.astype(m.dtype)
        active = per_example(inside(settings.window, sigma), x0_hat) > 0
        return [jnp.where(active, projected(x0_hat, m, settings, weight), x0_hat), *rest]

    def around(
        base: Denoiser, evaluate: Evaluation, x: Array, sigma: Array, label: PyTree
    ) -> list[Array]:
        return mixed(difference(base, evaluate, settings, x, sigma, label), sigma)

    def again(x: Array, sigma: Array, label: PyTree = None) -> Array:
        if seen is not None and x is seen.x and sigma is seen.sigma:
            return mixed(seen.found, sigma)[0]
        return guided(x, sigma, label)

    guided = decorated(denoise, around)
    return guided if seen is None else dataclasses.replace(guided, evaluate=again)


def difference(
    denoise: Denoiser,
    evaluate: Evaluation,
    settings: Settings,
    x: Array,
    sigma: Array,
    label: PyTree,
) -> list[Array]:
    """[x0_hat, its difference to the one without condition, what else evaluate gives]; outside the
    window the difference is 0 and not evaluated.
    """

    def both() -> list[Array]:
        (x0_hat, without), *rest = cfg.with_and_without(denoise, evaluate, x, sigma, label)
        active = per_example(inside(settings.window, sigma), x0_hat)
        return [x0_hat, active * (x0_hat - without), *(v[0] for v in rest)]

    def alone() -> list[Array]:
        x0_hat, *rest = evaluate(x, sigma, label)
        return [x0_hat, jnp.zeros_like(x0_hat), *rest]

    if settings.window is None:
        return both()
    return jax.lax.cond(jnp.any(inside(settings.window, sigma)), both, alone)


def guidance(
    weight: float | Array = Settings.weight,
    norm: float = 0.0,
    eta: float = 0.0,
    momentum: float = 0.0,
    window: Window | None = None,
) -> Guidance:
    """APG as guidance of `sample`; the weight is an array, so that another one compiles nothing.

    Args:
      weight, norm, eta, momentum, window: see `Settings`; the weight may be an array, too.

    Raises:
      ConfigError: a setting out of range.
    """
    more = {"norm": norm, "eta": eta, "momentum": momentum, "window": window}
    chosen = Settings(**numbers(weight=weight), **more)

    def transform(denoise: Denoiser, constants: PyTree) -> Denoiser:
        return guide(denoise, chosen, constants["weight"])

    def step(
        denoise: Denoiser, constants: PyTree, memory: Array, x: Array, sigma: Array, label: PyTree
    ) -> tuple[Denoiser, Array]:
        found = difference(denoise, lambda *at: [denoise(*at)], chosen, x, sigma, label)
        seen = _Seen(x, sigma, found)
        after = found[1].astype(x.dtype) + chosen.momentum * memory
        return guide(denoise, chosen, constants["weight"], memory, seen), after

    memory = Memory(jnp.zeros_like, step) if chosen.momentum else None
    constants = {"weight": constant(weight)}
    return Guidance("apg", transform, constants=constants, outermost=-1, memory=memory)


def build(settings: Settings, session: Session) -> Guidance:
    """APG of a command's model.

    Raises:
      ValueError: a model without classes, or one that never saw hidden labels.
    """
    cfg.check_hidden_labels("apg", session)
    return guidance(**vars(settings))
