"""sample(): from noise to images along a grid of noise levels, as one scan. An image depends on its
own key alone.

| solver | rule | evaluations for N steps | random |
|---|---|---|---|
| euler | probability-flow ODE, order 1 | N | churn |
| heun | order 2, EDM's sampler (arXiv 2206.00364 algorithms 1, 2) | 2 N - 1 | churn; eta > 0 |
| ddim | arXiv 2010.02502; eta = 0 is euler, eta = 1 is DDPM | N | eta > 0 |
| ancestral | DDPM (arXiv 2006.11239), with a choice of variance | N | always |
| spndm, fpndm | linear multistep (arXiv 2202.09778) | N + 1, N + 9 | no |
| plms | Stable Diffusion's PNDM (`solvers.plms`) | N + 1 | no |
| dpmpp_2m | DPM-Solver++(2M) (arXiv 2211.01095) | N | no |
| dpmpp_2m_sde | the same of the reverse SDE; eta = 0 is dpmpp_2m | N | eta > 0 (default 1) |
| unipc | UniPC of order 1 to 3 (arXiv 2302.04867), see `multistep.unipc` | N | no |
| pc | score_sde's predictor-corrector, `langevin.pc` | N (1 + corrector_steps) | always |
| dopri5 | adaptive Runge-Kutta 5(4), between the grid's ends (adaptive.py) | counted | no |

Beside it, as functions of their own: `ablation.ablation`, EDM's sampler on any grid, schedule and
scaling; `discrete.ddim` and `discrete.pndm`, the samplers of published discrete models on their
index grids.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ogdm_jax import randomness
from ogdm_jax.brief import brief
from ogdm_jax.config import Sample
from ogdm_jax.config.groups import SOLVER_OPTIONS
from ogdm_jax.diffusion import grids, process
from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser
from ogdm_jax.sampling import adaptive, langevin, multistep, solvers
from ogdm_jax.sampling.churn import Churn, ChurnRule, Info
from ogdm_jax.sampling.guidance import Guidance, Parts, combine
from ogdm_jax.typing import Array, Denoise, PyTree

__all__ = ["SOLVERS", "Churn", "ChurnRule", "Info", "Trajectory", "nfe", "sample"]

SOLVERS = {
    "euler": solvers.euler,
    "heun": solvers.heun,
    "ddim": solvers.ddim,
    "ancestral": solvers.ancestral,
    "spndm": solvers.spndm,
    "fpndm": solvers.fpndm,
    "dpmpp_2m": multistep.dpmpp_2m,
    "plms": solvers.plms,
    "dpmpp_2m_sde": multistep.dpmpp_2m,
    "unipc": multistep.unipc,
    "pc": langevin.pc,
    adaptive.NAME: adaptive.dopri5,
}


class Trajectory(NamedTuple):
    """states [N+1,B,H,W,C], states[i] at sigmas[i]; x0_hats [N,B,H,W,C], the first evaluation of
    each step.
    """

    states: Array
    x0_hats: Array
    __repr__ = brief


def nfe(solver: str, steps: int, **options: Any) -> int:
    """Network evaluations of `sample` with this many steps and these options of the solver.

    Raises:
      ValueError: unknown solver, one that chooses its steps, or an option that it does not have.
    """
    options = _options(solver, options)
    if solver == adaptive.NAME:
        raise ValueError(
            f"solver={solver!r} chooses its steps; expected a solver with fixed steps, or "
            "sample(..., with_nfe=True), which counts them"
        )
    steps *= 1 + options.get("corrector_steps", 0)
    more = {"heun": steps - 1, "spndm": 1, "fpndm": 9, "plms": 1}
    return steps + more.get(solver, 0)


def sample(
    denoise: Denoise,
    latents: Array | np.ndarray,
    sigmas: Array | np.ndarray,
    solver: str = "heun",
    key: Array | None = None,
    churn: Any = None,
    label: PyTree = None,
    guidance: Guidance | Sequence[Guidance] | None = (),
    trajectory: bool = False,
    *,
    eta: float | Array | None = None,
    variance: str | float | Array | None = None,
    clip: bool = False,
    round_sigma: Callable[[Array], Array] | None = None,
    noise_fn: Callable[[Array], Array] | None = None,
    variable: str | None = None,
    with_nfe: bool = False,
    **options: Any,
) -> Array | tuple[Any, ...]:
    """Carries latents * sigmas[0] down the grid. Pure; wrap it in jax.jit to compile it once.

    Args:
      denoise: a `Denoiser`, or a plain function (x [B,...], sigma [B], label) -> x0_hat. The grid
        is clipped to the denoiser's levels (several may become one: better make the grid with
        grids.clip_range) and rounded by its `round_sigma`; `corrector` makes Heun's second
        evaluation, `variance` gives ancestral steps with a learned variance.
      latents: [B,H,W,C] ~ N(0, I). The state has their dtype, in float32 at least: float64 latents
        give a float64 sampler; bfloat16 and float16 ones are returned as such, but a thousand small
        steps would be lost in their rounding.
      sigmas: [N+1] decreasing, last 0 (grids.py). Only their number is static.
      solver: a name of SOLVERS.
      key: key of either style, needed by random settings: one (image i uses fold_in(key, i)) or
        [B], one per image.
      churn: None, a number S_churn, a mapping of `Churn`'s fields, or a `ChurnRule`; for euler and
        heun.
      label: the images' condition: [B] int32, float vectors [B,K], a pytree of rows, or None.
      guidance: one or several sampling methods, see `guidance.Guidance`.
      trajectory: also return a `Trajectory`.
      eta: noise of ddim and dpmpp_2m_sde (0 to 1), or of heun, which then steps down to
        sqrt(sigma'^2 - std^2) and adds std * noise; None: 1 for dpmpp_2m_sde, 0 for the others.
      variance: of ancestral, see `steps.posterior_std`; or "learned", what the denoiser's
        `variance` says. None: "learned" where the denoiser has one, else "small".
      clip: x0_hat is clamped to [-1, 1] at every evaluation and slopes follow it (the clip_denoised
        of guided-diffusion); see `Parts.transform` for its place among transforms.
      round_sigma: replaces the denoiser's own; [..] -> [..].
      noise_fn: step (int32 scalar) -> [B,H,W,C], replaces the noise drawn from key.
      variable: of dopri5, what its tolerance is of: a name of `adaptive.VARIABLES`; None: "angle".
        It takes only the ends of the grid: it integrates from sigmas[0] to sigmas[-2], and an Euler
        step goes to sigmas[-1]. An image that cannot reach the tolerance is NaN.
      with_nfe: also return how often the solver evaluates the denoiser for each image, int32 [B]:
        dopri5's differ. What guidance adds (CFG's second evaluation, repeats) is not counted.
      **options: what one solver alone has: snr, corrector_steps and sde of pc, order and bh of
        unipc, rtol and atol of dopri5; meaning, range and default are those of config.sample.

    Returns:
      [B,H,W,C]; or a tuple of that, the Trajectory where asked for, and the evaluations where asked
      for.

    Raises:
      ValueError: unknown solver; a bad grid; a random setting without key; a setting the solver
        does not use.
    """
    options, eta = _options(solver, options, variable), _eta(solver, eta)
    check_start(solver, sigmas, variance)
    given, latents = jnp.asarray(latents).dtype, widened(latents)
    parts = combine(guidance, churn)
    random_steps = check_parts(solver, parts, eta, variance)
    model = as_denoiser(denoise)
    denoise = parts.transform(model, clip)
    if (random_steps or parts.churn is not None) and key is None and noise_fn is None:
        raise ValueError(
            f"key=None; expected a key, because solver {solver!r} draws noise with these settings"
        )
    round_sigma = round_sigma or denoise.round_sigma
    sigmas = _known_levels(denoise, _check_grid(solver, sigmas), round_sigma, latents.dtype)
    keys = None if key is None else image_keys(key, latents.shape[0])
    noise = step_noise(key, latents, noise_fn)
    variance = _variance(denoise, variance) if solver == "ancestral" else "small"
    shift, remembers = parts.shift if parts.shifts else None, bool(parts.remembering)
    more = round_sigma, eta, variance, sigmas, options, shift, remembers
    problem = solvers.Problem(denoise, label, noise, parts.transition, parts.churn, *more)
    x, n = latents * sigmas[0], sigmas.shape[0] - 1

    def remember(memory: PyTree, x: Array, sigma: Array) -> tuple[list[solvers.Phase], PyTree]:
        guided, memory = parts.step(model, clip, memory, x, sigma, label)
        now = dataclasses.replace(problem, denoise=guided)
        return SOLVERS[solver](now, x, n)[0], memory

    memory = {g.name: g.memory.init(x) for g in parts.remembering if g.memory is not None}
    how = partial(_step_keys, keys), trajectory, memory, remember if memory else None
    if solver == adaptive.NAME:
        control = _control(options, variable, memory)
        result, kept, count = adaptive.dopri5(denoise, x, sigmas, label, control, trajectory)
    else:
        phases, carry = SOLVERS[solver](problem, x, n)
        result, kept = solvers.run(phases, carry, x, sigmas, *how)
        count = jnp.full(len(x), nfe(solver, n, **options) if with_nfe else 0, jnp.int32)
    return _found(given, x, result, kept, count if with_nfe else None)


def _found(
    given: Any, x: Array, result: Array, kept: tuple[Array, Array] | None, count: Array | None
) -> Array | tuple[Any, ...]:
    """What `sample` returns, images in the type of the latents."""
    path = None if kept is None else Trajectory(jnp.concatenate([x[None], kept[0]]), kept[1])
    images = [tree for tree in (result, path) if tree is not None]
    found = jax.tree.map(lambda v: v.astype(given), images) + ([] if count is None else [count])
    return tuple(found) if len(found) > 1 else found[0]


def _control(options: dict[str, Any], variable: str | None, memory: PyTree) -> adaptive.Control:
    """How dopri5 solves; ValueError for guidance that a solver which tries steps has no use for."""
    if memory:
        raise ValueError(
            f"{next(iter(memory))} with solver {adaptive.NAME!r}: it remembers the step before, "
            "and some steps are refused; expected a solver of fixed steps"
        )
    return adaptive.Control(**options, variable=variable or "angle")


def widened(latents: Array | np.ndarray, name: str = "latents") -> Array:
    """Latents in float32 at least.

    Raises:
      ValueError: latents that are no real numbers.
    """
    latents = jnp.asarray(latents)
    if not jnp.issubdtype(latents.dtype, jnp.floating):
        raise ValueError(f"{name}: {latents.dtype} given; expected floating-point numbers")
    return latents.astype(jnp.promote_types(latents.dtype, jnp.float32))


def step_noise(
    key: Array | None, like: Array, noise_fn: Callable[[Array], Array] | None = None
) -> Callable[[Array], Array]:
    """The function step -> noise like `like` [B,...]: row i from image i's key and the step, or
    what noise_fn gives instead.

    Drawn in float32 and then cast, so that samplers of both precisions see the same noise.
    """
    keys = None if key is None else image_keys(key, like.shape[0])

    def noise(step: Array) -> Array:
        if noise_fn is not None:
            return noise_fn(step).astype(like.dtype)
        assert keys is not None  # of a random setting, see sample()
        drawn = randomness.normal(
            randomness.fold_in_each(_at_step(keys, step), "noise"), like.shape[1:]
        )
        return drawn.astype(like.dtype)

    return noise


def image_keys(key: Array, batch: int) -> Array:
    """A typed key for each image: of one key, or as they are given; ValueError for others."""
    key = randomness.typed(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(
            f"key: shape {key.shape}; expected a scalar key or one per image, ({batch},)"
        )
    return key


def _step_keys(keys: Array | None, step: Array) -> Array | None:
    """[B] keys of guidance in this step. Their name is a part of them: another would give other
    images.
    """
    return None if keys is None else randomness.fold_in_each(_at_step(keys, step), "kick")


def _at_step(keys: Array, step: Array) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)


def _known_levels(
    denoise: Denoiser, sigmas: Array | np.ndarray, round_sigma: Callable[[Array], Array], dtype: Any
) -> Array:
    """The grid in the state's dtype, its levels (not the final 0) clipped and rounded to those the
    network knows.

    Without the clip iDDPM's rounding would take 0.002 to its table's 0, where slopes divide by
    zero.
    """
    sigmas = jnp.asarray(sigmas, dtype)
    low, high = grids.clip_range(denoise, 0.0, float("inf"))
    return jnp.concatenate(
        [round_sigma(jnp.clip(sigmas[:-1], low, high)).astype(dtype), sigmas[-1:]]
    )


def _variance(denoise: Denoiser, variance: str | float | Array | None) -> str | float | Array:
    """The ancestral solver's variance, with None replaced by what the denoiser offers."""
    offered = denoise.variance is not None
    if variance is None:
        return "learned" if offered else "small"
    if isinstance(variance, str) and variance == "learned" and not offered:
        raise ValueError(
            "variance='learned': the denoiser has no learned variance; expected one with it"
        )
    return variance


def check_start(solver: str, sigmas: Array | np.ndarray, variance: Any = None) -> None:
    """Raises ValueError for a solver, or a variance of ancestral steps, that means nothing from
    pure noise, on such a grid.
    """
    if isinstance(sigmas, Tracer):
        return
    if not np.max(np.asarray(sigmas), initial=0.0) >= process.PURE_NOISE:
        return
    if solver not in solvers.FROM_PURE_NOISE:
        raise ValueError(
            f"solver={solver!r} on a grid that starts from pure noise, whose level is infinite; "
            f"expected one of {', '.join(solvers.FROM_PURE_NOISE)}, or a grid with a finite first "
            "level, such as edm"
        )
    if isinstance(variance, str) and variance == "diffusion":  # the first step's is sigma^2
        raise ValueError(
            f"variance={variance!r} on a grid that starts from pure noise, where it is "
            "infinite; expected 'small', 'large' or 'learned'"
        )


def _options(solver: str, given: dict[str, Any], variable: str | None = None) -> dict[str, Any]:
    """All options of a solver, those that are not given by config.sample's defaults.

    Raises:
      ValueError: unknown solver; an option that it does not have, or that is out of range.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}; expected one of {', '.join(SOLVERS)}")
    if variable is not None and solver != adaptive.NAME:
        raise ValueError(
            f"variable={variable!r} with solver {solver!r}; expected {adaptive.NAME!r}"
        )
    known = SOLVER_OPTIONS.get(solver, ())
    for name in given:
        if name not in known:
            owners = [owner for owner, names in SOLVER_OPTIONS.items() if name in names]
            raise ValueError(
                f"{name}={given[name]!r} with solver {solver!r}; expected "
                + (f"solver {owners[0]!r} with it" if owners else f"one of {', '.join(known)}")
            )
    return Sample(solver=solver, **given).options


def _eta(solver: str, eta: float | Array | None) -> float | Array:
    """`eta` of sample, with None replaced by the solver's own."""
    if eta is None:
        return float(solver == "dpmpp_2m_sde")
    return eta.item() if isinstance(eta, np.generic) else eta


def _check_grid(solver: str, sigmas: Array | np.ndarray) -> Array | np.ndarray:
    if np.ndim(sigmas) != 1 or np.shape(sigmas)[0] < 2:
        raise ValueError(
            f"sigmas: shape {np.shape(sigmas)}; expected [N + 1] levels with N of at least 1"
        )
    if not isinstance(sigmas, Tracer):
        values = np.asarray(sigmas)
        if not (np.isfinite(values).all() and (np.diff(values) < 0).all() and values[-1] >= 0):
            raise ValueError(
                "sigmas: expected finite numbers that fall at every step, the last one 0"
            )
    n, least = np.shape(sigmas)[0] - 1, solvers.FEWEST_STEPS.get(solver, 1)
    if n < least:
        why = solvers.WHY_SO_MANY[solver]
        raise ValueError(f"solver {solver!r} with {n} steps; expected at least {least}: {why}")
    return sigmas


def check_parts(
    solver: str, parts: Parts, eta: float | Array = 0.0, variance: str | float | Array | None = None
) -> bool:
    """Whether the solver's own steps are random.

    Raises:
      ValueError: settings of `sample` that do not belong together.
    """
    known = isinstance(eta, int | float)
    random_steps = solver in ("ancestral", "pc") or not (known and eta == 0)
    if known and not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}; expected a number from 0 to 1")
    if not (known and eta == 0) and solver not in ("ddim", "heun", "dpmpp_2m_sde"):
        raise ValueError(
            f"eta={eta} with solver {solver!r}; expected solver 'ddim' or 'heun' or "
            "'dpmpp_2m_sde', or eta=0"
        )
    if solver != "ancestral" and not (
        variance is None or isinstance(variance, str) and variance == "small"
    ):
        raise ValueError(
            f"variance={variance!r} with solver {solver!r}; expected solver 'ancestral'"
        )
    if parts.churn is not None and (solver not in ("euler", "heun") or random_steps):
        raise ValueError(
            f"{_named(parts.churn)} with solver {solver!r} and eta={eta}; expected solver 'heun' "
            "or 'euler' with eta=0"
        )
    if parts.shifts and solver != "ancestral":
        raise ValueError(
            f"{parts.shifts[0].name}: rule 'mean' shifts the mean of DDPM's steps, solver "
            f"{solver!r} given; expected solver 'ancestral', or rule 'score'"
        )
    if parts.transition is not None:
        _check_transition(solver, eta, parts.transition, parts.churn, random_steps)
    return random_steps


def _check_transition(
    solver: str, eta: float | Array, owner: Guidance, churn: Guidance | None, random_steps: bool
) -> None:
    """Raises ValueError for a solver that the owner of the transition has nothing to do in."""
    expected = "solver='ancestral', or solver='ddim' or 'heun' with eta > 0, or churn with 'heun' "
    expected += "or 'euler', or solver='pc' or 'dpmpp_2m_sde'"
    if owner.replaces_x0 and solver == "dpmpp_2m_sde":
        raise ValueError(
            f"{owner.name} with solver 'dpmpp_2m_sde': it replaces the x0_hat of a step, which the "
            "next step would extrapolate; expected solver='ancestral' or 'pc', or solver='ddim' "
            "with eta > 0"
        )
    if owner.replaces_x0:
        expected = "solver='ancestral', or solver='ddim' with eta > 0"
        if churn is not None:
            raise ValueError(
                f"{owner.name} under churn: noise that is only added has no x0_hat to replace; "
                f"expected no churn, with {expected}"
            )
        if solver == "heun":
            raise ValueError(
                f"{owner.name} with solver 'heun': it replaces the x0_hat of a step, which Heun's "
                f"second evaluation would not see; expected {expected}"
            )
    if not random_steps and churn is None:
        raise ValueError(
            f"{owner.name} with solver {solver!r}, eta={eta}: a deterministic step has no noise to "
            f"guide; expected {expected}"
        )


def _named(churn: Guidance) -> str:
    return "churn" if churn.name == "churn" else f"{churn.name}'s churn"
