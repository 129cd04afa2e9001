"""Autoguidance: a weaker model as guide (Karras et al., arXiv 2406.02507).

    D_w(x, sigma, y) = D_weak + w (D - D_weak)

The weak model is a smaller or less trained one of the same data and conditions, such as an earlier
checkpoint; w = 1 is the model alone, the paper's best are 1.4 to 2.4 (EDM2). With classifier-free
guidance D is the guided model, and the weak one answers for the given condition alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ogdm_jax.config import ConfigError, Group, setting
from ogdm_jax.diffusion.denoiser import Denoiser, Evaluation, as_denoiser, decorated
from ogdm_jax.diffusion.steps import per_example
from ogdm_jax.latents import difference
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling.guidance import Guidance, constant
from ogdm_jax.sampling.schedule import Window, inside, numbers, window_setting
from ogdm_jax.typing import Array, Denoise, PyTree


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """Settings of autoguidance.

    Attributes:
      workdir: the weak model's training folder.
      step: its checkpoint; None: the newest.
      weight: w above.
      window: noise levels (low, high) that are guided; None: all.
    """

    GROUP, PREFIX = "autoguidance", ""
    workdir: str = setting("", "training folder of the weak model; the model's own with a step")
    step: int | None = setting(None, "checkpoint of the weak model; default: the newest", least=0)
    weight: float = setting(1.5, "1 is the model alone")
    window: Window | None = window_setting()


def guide(denoise: Denoise, weak: Denoise, weight: Any, window: Window | None = None) -> Denoiser:
    """The denoiser guided by a weaker one; outside the window (a real branch, where every example
    is outside) that is not evaluated.

    Args:
      denoise: the denoiser. Its `corrector` is guided too; its learned variance stays.
      weak: (x, sigma, label) -> x0_hat.
      weight: w above; a number or an array.
      window: noise levels (low, high) that are guided, per example; None: all.
    """

    def guided(
        _: Denoiser, evaluate: Evaluation, x: Array, sigma: Array, label: PyTree
    ) -> list[Array]:
        (x0_hat, *rest), active = evaluate(x, sigma, label), inside(window, sigma)

        def inner() -> Array:
            other = weak(x, sigma, label).astype(x0_hat.dtype)
            w = per_example(jnp.where(active, jnp.asarray(weight, sigma.dtype), 1), x0_hat)
            return other + w * (x0_hat - other)

        if window is None:
            return [inner(), *rest]
        return [jax.lax.cond(jnp.any(active), inner, lambda: x0_hat), *rest]

    return decorated(as_denoiser(denoise), guided)


def guidance(
    weak: Callable[..., Any],
    weight: float | Array = 1.5,
    window: Window | None = None,
    *,
    params: PyTree = None,
) -> Guidance:
    """Autoguidance as guidance of `sample`; another weight compiles nothing.

    Args:
      weak: the weak denoiser; where params are given, a function of them that returns it.
      weight: w above; a number, or an array, traced or [B].
      window: noise levels (low, high) that are guided; None: all.
      params: the weak model's weights, an argument of the compiled sampler.

    Raises:
      ConfigError: a weight or a window that cannot be.
    """
    chosen = Settings(**numbers(weight=weight), window=window)

    def transform(denoise: Denoiser, constants: PyTree) -> Denoiser:
        other = weak if params is None else weak(constants["params"])
        return guide(denoise, other, constants["weight"], chosen.window)

    constants = {"params": params, "weight": constant(weight)}
    return Guidance("autoguidance", denoiser=transform, constants=constants)


def build(settings: Settings, session: Session) -> Guidance:
    """Autoguidance by the model of a training folder.

    Raises:
      ValueError: no folder, or a model of other images, classes or latents.
    """
    if not settings.workdir:
        raise ConfigError(
            "--autoguidance.workdir: not given; expected the training folder of a weaker model"
        )
    assert session.open_model is not None  # every command has it
    weak = session.open_model(settings.workdir, settings.step, "--autoguidance.workdir")
    for what in ("image_shape", "label_dim"):
        here, there = getattr(session.model, what), getattr(weak.model, what)
        if here != there:
            raise ConfigError(
                f"--autoguidance.workdir: {settings.workdir!r} has {what} {there}; expected {here} "
                "as the model that it guides"
            )
    if differs := difference(session.model.latents, weak.model.latents):
        raise ConfigError(
            f"--autoguidance.workdir: {settings.workdir!r} was trained on other numbers than the "
            f"model that it guides ({differs}); expected both alike"
        )
    return guidance(
        lambda params: weak.model.denoiser(*params),
        settings.weight,
        settings.window,
        params=(weak.params, weak.buffers),
    )
