"""Sampling grids: n decreasing noise levels and a final 0, float64 NumPy [n + 1]; sample() casts
them.

Every grid starts no backend and reads no device. k = i / (n - 1), i = 0..n-1 (k = 0 for n = 1: one
step from the top).
"""

from collections.abc import Sequence

import numpy as np

from ogdm_jax.diffusion import process
from ogdm_jax.diffusion.denoiser import as_denoiser
from ogdm_jax.typing import Denoise

SPACINGS = ("uniform", "quad", "even", "trailing", "leading", "linspace")  # of `ddim_timesteps`


def _fractions(n: int) -> np.ndarray:
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n={n!r}; expected an integer number of steps of at least 1")
    return np.arange(n) / max(n - 1, 1)


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}; expected 0 < sigma_min < sigma_max < "
            "inf"
        )


def edm(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """(sigma_max^(1/rho) + k (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho (arXiv 2206.00364 eq. 5),
    then 0.

    Raises:
      ValueError: n < 1, not 0 < sigma_min < sigma_max, or rho <= 0.
    """
    k = _fractions(n)
    _check_range(sigma_min, sigma_max)
    if not rho > 0:
        raise ValueError(f"rho={rho}; expected a positive number")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append((top + k * (bottom - top)) ** rho, 0.0)


def vp(
    n: int, sigma_min: float | None = None, sigma_max: float | None = None, t_min: float = 1e-3
) -> np.ndarray:
    """sigma_vp(1 + k (t_min - 1)): equal steps of VP time (arXiv 2206.00364 table 1), then 0.

    Args:
      n: steps.
      sigma_min, sigma_max: ends; beta_d and beta_min are recomputed from them. Defaults: those of
        beta_d = 19.9, beta_min = 0.1, which are 0.01048599 and 152.16697.
      t_min: time of sigma_min.
    """
    k = _fractions(n)
    standard = process.VP()
    sigma_min = float(standard.sigma(t_min)) if sigma_min is None else sigma_min
    sigma_max = float(standard.sigma(1.0)) if sigma_max is None else sigma_max
    _check_range(sigma_min, sigma_max)
    return np.append(
        process.VP.between(sigma_min, sigma_max, t_min).sigma(1 + k * (t_min - 1)), 0.0
    )


def ve(n: int, sigma_min: float = 0.02, sigma_max: float = 100.0) -> np.ndarray:
    """sigma_max (sigma_min / sigma_max)^k: equal ratios (arXiv 2206.00364 table 1), then 0."""
    k = _fractions(n)
    _check_range(sigma_min, sigma_max)
    return np.append(sigma_max * (sigma_min / sigma_max) ** k, 0.0)


def iddpm(
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 81.0,
    steps: int = 1000,
    c1: float = 1e-3,
    c2: float = 8e-3,
) -> np.ndarray:
    """Levels of the improved-DDPM table within [sigma_min, sigma_max], at index round((len - 1) k),
    then 0.

    Raises:
      ValueError: n < 1, a bad range, or fewer than n levels in it.
    """
    k = _fractions(n)
    _check_range(sigma_min, sigma_max)
    levels = process.iddpm_levels(steps, c1, c2)
    levels = levels[(levels >= sigma_min) & (levels <= sigma_max)]
    if len(levels) < n:
        raise ValueError(
            f"n={n}; expected at most {len(levels)}, the levels of the table in the range"
        )
    return np.append(levels[np.round((len(levels) - 1) * k).astype(np.int64)], 0.0)


def flow(n: int, shift: float = 1.0) -> np.ndarray:
    """Equal steps of t from 1 to 0 on the straight path (1 - t) x0 + t eps, sigma = t / (1 - t).

    The first level is process.PURE_NOISE: there the path is the latents.

    shift: t' = shift t / (1 + (shift - 1) t) (arXiv 2403.03206 section 5.3.2, more steps in the
      noise of large pictures), which multiplies sigma by `shift`.

    Raises:
      ValueError: n < 1 or shift <= 0.
    """
    _fractions(n)
    if not shift > 0:
        raise ValueError(f"shift={shift}; expected a positive number")
    t = np.arange(n - 1, -1, -1) / n
    return np.append(process.PURE_NOISE, shift * process.Flow().sigma(t))


def ddim_timesteps(
    n: int, steps: int = 1000, spacing: str = "uniform", offset: int = 0
) -> np.ndarray:
    """Kept indices of a discrete process, ascending [n].

    Args:
      n: how many.
      steps: T.
      spacing: "uniform", floor(i T / n), and "quad", floor(linspace(0, sqrt(0.8 T), n)^2) (arXiv
        2010.02502 D.2; both never reach the last index); "even", round(i (T - 1) / (n - 1)), and
        "trailing", round(T - i T / n) - 1 from the last down (arXiv 2305.08891 table 2), which do;
        "linspace", which is "even" but for how halves are rounded; "leading", i floor(T / n) +
        offset, Stable Diffusion's with offset 1. One step is the last index in all of them: the
        published rules would keep index 0 alone, where there is nothing left to denoise.
      offset: of "leading".

    Raises:
      ValueError: n outside 1..T, an unknown spacing, or indices that coincide.
    """
    k = _fractions(n)
    if n > steps:
        raise ValueError(f"n={n}; expected at most {steps}, the steps of the process")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing={spacing!r}; expected {', '.join(SPACINGS)}")
    if n == 1:
        return np.asarray([steps - 1])
    if spacing == "trailing":
        return np.round(steps - np.arange(n) * steps / n).astype(np.int64)[::-1] - 1
    if spacing == "uniform":
        return np.arange(n) * steps // n
    if spacing == "linspace":
        return np.round(np.linspace(0, steps - 1, n)).astype(np.int64)
    if spacing == "leading":
        kept = np.arange(n) * (steps // n) + offset
        if kept[-1] >= steps:
            raise ValueError(
                f"n={n}; expected fewer steps: leading spacing of {steps} with offset {offset} "
                "goes beyond the last"
            )
        return kept
    if spacing == "even":
        return process.space_timesteps(steps, [n])
    kept = np.floor((np.sqrt(0.8 * steps) * k) ** 2 + 1e-9).astype(np.int64)
    if len(np.unique(kept)) < n:
        raise ValueError(
            f"n={n}; expected fewer steps: quad spacing of {steps} keeps some index twice"
        )
    return kept


def ddim(
    n: int,
    betas: process.Schedule | process.Discrete = "linear",
    spacing: str = "uniform",
    steps: int = 1000,
    *,
    offset: int = 0,
    further: bool = False,
    end: str = "zero",
) -> np.ndarray:
    """Noise levels sqrt(1 / alpha_bar - 1) of a respaced discrete process, then 0 (arXiv
    2010.02502).

    Args:
      n: steps.
      betas: "linear", "cosine", "scaled_linear", the betas themselves, or a table of all steps.
      spacing: as in `ddim_timesteps`.
      steps: T, where betas is a name.
      offset: of `ddim_timesteps`.
      further: the highest n of n + 1 steps, as diffusers has them for DPM-Solver++ and UniPC.
      end: "zero", or "first": the grid ends at the level of step 0, as where Stable Diffusion's
        files say set_alpha_to_one false. Of a spacing that keeps step 0 the published last step
        goes from there to there: here it is left out, and the grid has n - 1 steps.

    Raises:
      ValueError: see `ddim_timesteps`.
    """
    given = isinstance(betas, process.Discrete)
    count = len(betas.timesteps) if given else len(process.betas(betas, steps))
    kept = ddim_timesteps(n + further, count, spacing, offset)[int(further) :]
    last = [0] if end == "first" and kept[0] > 0 else []
    kept = np.append(last, kept).astype(np.int64)
    table = betas if given else process.Discrete.make(process.betas(betas, steps), keep=kept)
    levels = (table.sigma[kept] if given else table.sigma)[::-1]
    return levels if end == "first" else np.append(levels, 0.0)


def respaced(
    spacing: str | Sequence[int], betas: process.Schedule = "linear", steps: int = 1000
) -> np.ndarray:
    """Noise levels of guided-diffusion's timestep_respacing, then 0: "ddim25", "250", "10,15,20" or
    "" (all steps). "1" is one step from the top, and not the published index 0.

    Raises:
      ValueError: unknown betas, or a spacing that the steps do not allow
        (`process.space_timesteps`).
    """
    table = process.betas(betas, steps)
    keep = process.space_timesteps(len(table), spacing) if spacing else None
    if keep is not None and len(keep) == 1:
        keep = ddim_timesteps(1, len(table))
    return np.append(process.Discrete.make(table, keep=keep).sigma[::-1], 0.0)


def clip_range(denoise: Denoise, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """(sigma_min, sigma_max) within the range of levels that the denoiser is made for."""
    denoise = as_denoiser(denoise)
    return max(sigma_min, float(denoise.sigma_min)), min(sigma_max, float(denoise.sigma_max))
