"""EDM's ablation sampler: any time grid, noise schedule sigma(t) and scaling s(t) (arXiv 2206.00364
sections 3 and 4).

The ODE of x = s(t) (x0 + sigma(t) eps) is solved in t, so discretisation error depends on schedule
and scaling; with the defaults this is `sample(solver="heun")`. All coefficients are tables made in
float64 before anything is traced.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import grids, process
from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser
from ogdm_jax.sampling import churn as churning
from ogdm_jax.sampling.sampler import step_noise
from ogdm_jax.typing import Array, Denoise

RANGES = {
    "vp": None,
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
    "edm": (0.002, 80.0),
}  # vp: VP's at t_min and 1


def ablation(
    denoise: Denoise,
    latents: Array,
    n: int = 18,
    solver: str = "heun",
    grid: str | np.ndarray = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    alpha: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    t_min: float = 1e-3,
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
      latents: [B,H,W,C] ~ N(0, I); the state keeps their dtype.
      n: steps (of a named grid).
      solver: "euler", or "heun", whose second point lies at the fraction alpha of the step (1 =
        Heun, 1/2 = midpoint).
      grid: "vp", "ve", "iddpm" or "edm", where the levels lie; or the decreasing levels themselves,
        without a final 0.
      schedule: sigma(t): "vp", "ve" (sqrt t) or "linear" (t).
      scaling: s(t): "vp" (1 / sqrt(1 + sigma^2)) or "none".
      alpha: in (0, 1].
      sigma_min, sigma_max: ends of the grid (default: those published with it), clipped to the
        denoiser's range.
      rho: of the edm grid.   t_min: VP time of sigma_min.
      churn: None, a number, a mapping or `Churn` (constants only).
      key: scalar or [B] typed keys, needed by churn.
      label: [B] int32 or None.
      noise_fn: step -> [B,H,W,C], replaces the noise drawn from key.

    Returns:
      [B,H,W,C].

    Raises:
      ValueError: an unknown name, alpha outside (0, 1], churn without key.
    """
    for name, value, allowed in (
        ("solver", solver, ("euler", "heun")),
        ("grid", grid if isinstance(grid, str) else "edm", tuple(RANGES)),
        ("schedule", schedule, ("vp", "ve", "linear")),
        ("scaling", scaling, ("vp", "none")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(allowed)}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha}; expected a number in (0, 1]")
    rule = churning.as_rule(churn)
    if rule is not None and not isinstance(rule, churning.Churn):
        raise ValueError(
            f"churn={churn!r}; expected Churn's constants: the ablation sampler's tables are fixed "
            "before"
        )
    if rule is not None and key is None and noise_fn is None:
        raise ValueError("key=None; expected a key, because churn draws noise")
    denoise = as_denoiser(denoise)
    low, high = _range(denoise, grid, sigma_min, sigma_max)
    levels = _levels(grid, n, low, high, rho, t_min)
    n = len(levels)
    clock = {
        "vp": process.VP.between(low, high, t_min),
        "ve": process.VE(),
        "linear": process.EDM(),
    }[schedule]
    rounded = _rounding(denoise)
    table = coefficients(clock, scaling == "vp", rounded(levels), rounded, rule, alpha)
    table = jax.tree.map(lambda v: jnp.asarray(v, latents.dtype), table)
    noise = None if rule is None else step_noise(key, latents, noise_fn)

    def slope(x: Array, at: dict[str, Array]) -> Array:
        sigma = jnp.broadcast_to(at["sigma"], x.shape[:1])
        return at["linear"] * x - at["pull"] * denoise(x / at["scale"], sigma, label).astype(
            x.dtype
        )

    def raised(x: Array, step: Array, row: dict[str, Any]) -> Array:
        if noise is None:
            return x
        return row["rescale"] * x + row["noise"] * noise(step)

    def euler_step(x: Array, xs: Any) -> tuple[Array, None]:
        step, row = xs
        x = raised(x, step, row)
        return x + row["h"] * slope(x, row["start"]), None

    def heun_step(x: Array, xs: Any) -> tuple[Array, None]:
        step, row = xs
        x = raised(x, step, row)
        d = slope(x, row["start"])
        d2 = slope(x + alpha * row["h"] * d, row["second"])
        return x + row["h"] * ((1 - 1 / (2 * alpha)) * d + d2 / (2 * alpha)), None

    x = latents * table.pop("first")
    rows = (jnp.arange(n, dtype=jnp.int32), table)
    if solver == "euler":
        return jax.lax.scan(euler_step, x, rows)[0]
    if n > 1:
        x, _ = jax.lax.scan(heun_step, x, jax.tree.map(lambda v: v[:-1], rows))
    return euler_step(x, jax.tree.map(lambda v: v[-1], rows))[0]


def coefficients(
    clock: process.VP | process.VE | process.EDM,
    scaled: bool,
    levels: np.ndarray,
    rounded: Callable[[np.ndarray], np.ndarray],
    churn: churning.Churn | None,
    alpha: float,
) -> dict[str, Any]:
    """Float64 tables, one row a step: step size h, the ODE's coefficients at both points, churn's
    factors.

    Args:
      clock: sigma(t), its inverse and derivative.
      scaled: whether s(t) = 1 / sqrt(1 + sigma^2) (else 1).
      levels: [n] rounded levels, the final 0 left out.
      rounded: rounds levels to those the network knows.
      churn: constants or None.
      alpha: fraction of the step where the second point lies.
    """

    def point(t: Any) -> dict[str, Any]:
        sigma, d_sigma = clock.sigma(t), clock.sigma_derivative(t)
        scale = 1 / np.sqrt(1 + sigma**2) if scaled else np.ones_like(t)
        d_scale = -sigma * d_sigma * scale**3 if scaled else np.zeros_like(t)
        return {
            "sigma": sigma,
            "scale": scale,
            "linear": d_sigma / sigma + d_scale / scale,
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
    second[-1] = t_hat[
        -1
    ]  # the last step has no second point, and sigma(0) = 0 would divide by zero
    added = np.sqrt(np.maximum(start["sigma"] ** 2 - sigma**2, 0.0))
    return {
        "first": before["sigma"][0] * before["scale"][0],
        "h": h,
        "start": start,
        "second": point(second),
        "rescale": start["scale"] / before["scale"],
        "noise": added * start["scale"] * (1.0 if churn is None else churn.S_noise),
    }


def _levels(
    grid: str | np.ndarray, n: int, low: float, high: float, rho: float, t_min: float
) -> np.ndarray:
    if not isinstance(grid, str):
        levels = np.asarray(grid, np.float64)
        if (
            levels.ndim != 1
            or levels.size == 0
            or not ((np.diff(levels) < 0).all() and levels[-1] > 0)
        ):
            raise ValueError(
                "grid: expected a name, or decreasing positive levels without a final 0"
            )
        return levels
    named = {
        "vp": lambda: grids.vp(n, low, high, t_min),
        "ve": lambda: grids.ve(n, low, high),
        "iddpm": lambda: grids.iddpm(n, low, high),
        "edm": lambda: grids.edm(n, low, high, rho),
    }
    return named[grid]()[:-1]


def _range(
    denoise: Denoise, grid: str | np.ndarray, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    if not isinstance(grid, str):
        low, high = float(np.min(grid)), float(np.max(grid))
    elif grid == "vp":
        low, high = (float(process.VP().sigma(t)) for t in (1e-3, 1.0))
    else:
        low, high = RANGES[grid]
    return grids.clip_range(
        denoise, low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    )


def _rounding(denoise: Denoiser) -> Callable[[np.ndarray], np.ndarray]:
    """The denoiser's round_sigma as a function of NumPy tables, evaluated before tracing."""

    def rounded(levels: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            return np.asarray(denoise.round_sigma(cast(Array, levels)), np.float64)

    return rounded
