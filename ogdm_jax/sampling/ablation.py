"""EDM's ablation sampler: any time grid, noise schedule sigma(t) and scaling s(t).

arXiv 2206.00364, sections 3 and 4.

The ODE of x = s(t) (x0 + sigma(t) eps) is solved in t, so discretisation error depends on schedule
and scaling; with the defaults this is `sample(solver="heun")`. All coefficients are tables made in
float64 before anything is traced.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import grids, process
from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser
from ogdm_jax.sampling import churn as churning
from ogdm_jax.sampling.sampler import step_noise, widened
from ogdm_jax.typing import Array, Denoise

# Ends of the grids as published; VP's are its levels at the times 0.001 and 1.
RANGES = {
    "vp": tuple(float(process.VP().sigma(t)) for t in (1e-3, 1.0)),
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
    "edm": (0.002, 80.0),
}
# name -> s and ds / dsigma of a level
SCALINGS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "vp": lambda sigma: (1 / np.sqrt(1 + sigma**2), -sigma / np.sqrt(1 + sigma**2) ** 3),
    "flow": lambda sigma: (1 / (1 + sigma), -((1 + sigma) ** -2)),
    "none": lambda sigma: (np.ones_like(sigma), np.zeros_like(sigma)),
}
Clock = process.VP | process.VE | process.EDM | process.Flow
_CHOICES = {
    "solver": ("euler", "heun"),
    "grid": tuple(RANGES),
    "schedule": ("vp", "ve", "linear", "flow"),
    "scaling": tuple(SCALINGS),
}


@dataclasses.dataclass(frozen=True)
class Design:
    """One of the samplers of EDM's table 1 and appendix C; the defaults are EDM's own.

    Attributes:
      solver: "euler", or "heun", whose second point lies at the fraction alpha of the step.
      grid: "vp", "ve", "iddpm" or "edm", where the levels lie; or the decreasing levels themselves,
        without a final 0.
      schedule: sigma(t): "vp", "ve" (sqrt t), "linear" (t) or "flow" (t / (1 - t)).
      scaling: s(t): "vp" (1 / sqrt(1 + sigma^2)), "flow" (1 / (1 + sigma)) or "none" (1). With both
        "flow" and the levels of grids.flow, Heun's rule is that of dz/dt = v(z, t), from t = 1.
      alpha: in (0, 1]; 1 is Heun, 1/2 the midpoint rule.
      sigma_min: lowest level of the grid; None: the published one.
      sigma_max: highest level of the grid; None: the published one.
      rho: exponent of the edm grid.
      t_min: VP time of sigma_min.

    Raises:
      ValueError: an unknown name, or alpha outside (0, 1].
    """

    solver: str = "heun"
    grid: str | np.ndarray = "edm"
    schedule: str = "linear"
    scaling: str = "none"
    alpha: float = 1.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) and value not in allowed:
                raise ValueError(f"{name}={value!r}; expected one of {', '.join(allowed)}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}; expected a number in (0, 1]")

    def levels(self, n: int, low: float, high: float) -> np.ndarray:
        """[n] levels of the grid between two levels, without the final 0."""
        if isinstance(self.grid, str):
            own = {"vp": (self.t_min,), "edm": (self.rho,)}.get(self.grid, ())
            return getattr(grids, self.grid)(n, low, high, *own)[:-1]
        levels = np.asarray(self.grid, np.float64)
        decreasing = levels.ndim == 1 and levels.size > 0 and (np.diff(levels) < 0).all()
        if not (decreasing and levels[-1] > 0):
            raise ValueError(
                "grid: expected a name, or decreasing positive levels without a final 0"
            )
        return levels

    def range(self, denoise: Denoiser) -> tuple[float, float]:
        """The lowest and the highest level, clipped to the denoiser's."""
        if isinstance(self.grid, str):
            low, high = RANGES[self.grid]
        else:
            low, high = np.min(self.grid), np.max(self.grid)
        low = float(low) if self.sigma_min is None else self.sigma_min
        high = float(high) if self.sigma_max is None else self.sigma_max
        return grids.clip_range(denoise, low, high)

    def clock(self, low: float, high: float) -> Clock:
        """sigma(t) with its inverse and derivative."""
        if self.schedule == "vp":
            return process.VP.between(low, high, self.t_min)
        return {"ve": process.VE, "linear": process.EDM, "flow": process.Flow}[self.schedule]()


def ablation(
    denoise: Denoise,
    latents: Array,
    n: int = 18,
    design: Design = Design(),
    *,
    churn: Any = None,
    key: Array | None = None,
    label: Array | None = None,
    noise_fn: Callable[[Array], Array] | None = None,
) -> Array:
    """Samples by the superset of samplers of EDM's appendix C.

    dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x / s; sigma); the last step is always
    Euler's.

    Args:
      denoise: D(x, sigma, label); its range of levels and its rounding are obeyed.
      latents: [B,H,W,C] ~ N(0, I); the state has their dtype, in float32 at least.
      n: steps (of a named grid).
      design: solver, grid, schedule and scaling.
      churn: None, a number, a mapping or `Churn` (constants only).
      key: scalar or [B] typed keys, needed by churn.
      label: [B] int32 or None.
      noise_fn: step -> [B,H,W,C], replaces the noise drawn from key.

    Returns:
      [B,H,W,C].

    Raises:
      ValueError: churn without key, or churn that depends on the images.
    """
    rule = _constant_churn(churn)
    if rule is not None and key is None and noise_fn is None:
        raise ValueError("key=None; expected a key, because churn draws noise")
    denoise, given, latents = as_denoiser(denoise), jnp.asarray(latents).dtype, widened(latents)
    table = _table(design, denoise, n, rule, latents.dtype)
    noise = None if rule is None else step_noise(key, latents, noise_fn)
    alpha = design.alpha

    def slope(x: Array, at: dict[str, Array]) -> Array:
        sigma = jnp.broadcast_to(at["sigma"], x.shape[:1])
        x0_hat = denoise(x / at["scale"], sigma, label)
        return at["linear"] * x - at["pull"] * x0_hat.astype(x.dtype)

    def one_step(x: Array, xs: Any, heun: bool) -> tuple[Array, None]:
        step, row = xs
        if noise is not None:
            x = row["rescale"] * x + row["noise"] * noise(step)
        d = slope(x, row["start"])
        if heun:
            d2 = slope(x + alpha * row["h"] * d, row["second"])
            d = (1 - 1 / (2 * alpha)) * d + d2 / (2 * alpha)
        return x + row["h"] * d, None

    euler_step, heun_step = (functools.partial(one_step, heun=heun) for heun in (False, True))
    x = latents * table.pop("first")
    n = len(table["h"])
    rows = (jnp.arange(n, dtype=jnp.int32), table)
    if design.solver == "euler":
        return jax.lax.scan(euler_step, x, rows)[0].astype(given)
    if n > 1:
        x, _ = jax.lax.scan(heun_step, x, jax.tree.map(lambda v: v[:-1], rows))
    return euler_step(x, jax.tree.map(lambda v: v[-1], rows))[0].astype(given)


def _constant_churn(churn: Any) -> churning.Churn | None:
    """The churn as EDM's constants, from which the tables are made before anything is traced."""
    rule = churning.as_rule(churn)
    if rule is not None and not isinstance(rule, churning.Churn):
        raise ValueError(
            f"churn={churn!r}; expected Churn's constants: the ablation sampler's tables are made "
            "before any image is seen"
        )
    return rule


def _table(
    design: Design, denoise: Denoiser, n: int, churn: churning.Churn | None, dtype: Any
) -> dict[str, Any]:
    """`coefficients` of a design, rounded to a dtype."""
    low, high = design.range(denoise)
    levels = design.levels(n, low, high)

    def rounded(levels: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            return np.asarray(denoise.round_sigma(cast(Array, levels)), np.float64)

    clock, scaling = design.clock(low, high), design.scaling
    table = coefficients(clock, scaling, rounded(levels), rounded, churn, design.alpha)
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), table)


def coefficients(
    clock: Clock,
    scaling: str,
    levels: np.ndarray,
    rounded: Callable[[np.ndarray], np.ndarray],
    churn: churning.Churn | None,
    alpha: float,
) -> dict[str, Any]:
    """Float64 tables with a row per step.

    "h" is the step size, "start" and "second" are the ODE's coefficients at the two points,
    "rescale" and "noise" are churn's factors; "first" scales the latents.

    Args:
      clock: sigma(t), its inverse and derivative.
      scaling: a name of SCALINGS.
      levels: [n] rounded levels, the final 0 left out.
      rounded: rounds levels to those the network knows.
      churn: constants or None.
      alpha: fraction of the step where the second point lies.
    """

    def point(t: Any) -> dict[str, Any]:
        sigma, d_sigma = clock.sigma(t), clock.sigma_derivative(t)
        scale, d_scale = SCALINGS[scaling](sigma)
        return {
            "sigma": sigma,
            "scale": scale,
            "linear": d_sigma / sigma + d_sigma * d_scale / scale,
            "pull": d_sigma * scale / sigma,
        }

    t = clock.time(levels)
    sigma, t_hat = clock.sigma(t), t
    if churn is not None:
        gamma = churning.gamma_of(churn.S_churn, len(t))
        gamma = np.where((sigma >= churn.S_min) & (sigma <= churn.S_max), gamma, 0.0)
        t_hat = clock.time(rounded(np.asarray(sigma * (1 + gamma))))
    before, start = point(t), point(t_hat)
    h = np.append(t[1:], 0.0) - t_hat
    second = t_hat + alpha * h
    second[-1] = t_hat[-1]  # unused by the last step, which would divide by sigma(0) = 0
    added = np.sqrt(np.maximum(start["sigma"] ** 2 - sigma**2, 0.0))
    return {
        "first": before["sigma"][0] * before["scale"][0],
        "h": h,
        "start": start,
        "second": point(second),
        "rescale": start["scale"] / before["scale"],
        "noise": added * start["scale"] * (1.0 if churn is None else churn.S_noise),
    }
