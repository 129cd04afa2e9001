"""dopri5: the probability-flow ODE by an adaptive Runge-Kutta method of order 5(4).

It is scipy's RK45, with which score_sde (arXiv 2011.13456) and STF (arXiv 2302.00670) report "NFE
adaptive": the same tableau (Dormand and Prince, 1980), error norm (root mean square of error /
(atol + rtol |y|)) and step rule (0.9 error^(-1/5), within 0.2 and 10), inside jit by diffrax.

The tolerance is on the state, and a step is long only on a clock on which the state moves
smoothly. Of y = x scale(t) with sigma(t):

| variable | sigma(t) | scale(t) | whose |
|---|---|---|---|
| angle | s tan t, s = 0.5 | cos(t) / s | TrigFlow's (arXiv 2410.11081): dy/dt is EDM's -F |
| ve | exp t | 1 | score_sde's and STF's VE, whose time is log sigma, scaled |
| vp | VP time, beta 0.1 to 20 | 1 / sqrt(1 + sigma^2) | score_sde's and STF's VP |

Evaluations an image at rtol = atol = 1e-5 from sigma 80 to 0.002: exact denoiser of the digits
(spread 0.05) angle 98, vp 125, ve 137, x over sigma itself 297; a network trained on them angle
104, ve 128, vp 220; ends within 1e-4 of the exact ones. So angle is the default.

Every image has its own steps (`jax.vmap`), where scipy's control takes the whole batch as one
state: so an image depends on nothing but itself, and one that is NaN spoils no other. A batch takes
as long as its slowest image: no more than under a common control with the network above, 23 % more
with the exact denoiser.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from ogdm_jax.diffusion import steps
from ogdm_jax.diffusion.denoiser import Denoiser, same_level
from ogdm_jax.diffusion.process import VP
from ogdm_jax.typing import Array, PyTree

NAME = "dopri5"
MOST_STEPS = 1000  # of an image; who needs more has a tolerance below what its numbers can show
_SPREAD = 0.5  # of the angle: EDM's sigma_data
_VP = VP()


class Variable(NamedTuple):
    """What is integrated, and over what; see the table above.

    Attributes:
      time: sigma -> t.
      sigma: t -> sigma.
      scale: t -> y / x.
      slope: (t, x, x0_hat) -> dy/dt, written without the cancellations of its general form.
    """

    time: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    scale: Callable[[Array], Array]
    slope: Callable[[Array, Array, Array], Array]


def _vp_slope(t: Array, x: Array, x0: Array) -> Array:
    beta, variance = _VP.beta_min + _VP.beta_d * t, _VP.sigma(t) ** 2
    return 0.5 * beta * _VP.scale(t) * ((x - x0) / variance - x0)


VARIABLES = {
    "angle": Variable(
        lambda sigma: jnp.arctan(sigma / _SPREAD),
        lambda t: _SPREAD * jnp.tan(t),
        lambda t: jnp.cos(t) / _SPREAD,
        lambda t, x, x0: (jnp.cos(t) ** 2 * x - x0) / (_SPREAD * jnp.sin(t)),
    ),
    "ve": Variable(jnp.log, jnp.exp, jnp.ones_like, lambda t, x, x0: x - x0),
    "vp": Variable(_VP.time, _VP.sigma, _VP.scale, _vp_slope),
}


def variable_of(grid: str) -> str:
    """The variable that goes with the name of a grid: of vp and ve their own, else angle."""
    return grid if grid in VARIABLES else "angle"


class Control(NamedTuple):
    """How an ODE is solved.

    Attributes:
      rtol: relative to the state, which is about 1 in the variables angle and vp.
      atol: absolute.
      variable: a name of VARIABLES.
    """

    rtol: float | Array = 1e-5
    atol: float | Array = 1e-5
    variable: str = "angle"


class Solved(NamedTuple):
    """The end of one image's ODE, [...] each, or [n, ...] at n clock times.

    Attributes:
      state: NaN where the slope is not finite, or the tolerance needs more than MOST_STEPS.
      nfe: evaluations of the slope, int32: 1, and 6 a step, refused ones among them; a refused
        first step costs one more, which is not counted. (scipy's RK45 spends 2 and 6 a step.)
    """

    state: PyTree
    nfe: Array


def check_control(control: Control, denoise: Denoiser) -> None:
    """Raises ValueError for a tolerance that is none, an unknown variable, or a network of discrete
    levels: its slope jumps between them, and no step is small enough.
    """
    for name, value in (("rtol", control.rtol), ("atol", control.atol)):
        if isinstance(value, int | float) and not 0 < value < 1:
            raise ValueError(f"{name}={value}; expected a tolerance above 0 and below 1")
    if control.variable not in VARIABLES:
        known = ", ".join(VARIABLES)
        raise ValueError(f"variable={control.variable!r}; expected one of {known}")
    if denoise.round_sigma is not same_level:
        raise ValueError(
            f"solver {NAME!r}: this network answers at discrete noise levels only, between which "
            "its ODE jumps; expected a continuous model, or a solver of fixed steps such as heun"
        )


def solve(
    slope: Callable[[Any, PyTree], PyTree],
    state: PyTree,
    times: Array,
    control: Control,
    norm: Callable[[PyTree], Any] | None = None,
    every: bool = False,
) -> Solved:
    """Integrates d state / dt = slope(t, state) of one image from times[0] to times[-1].

    Args:
      slope: of a state without a batch axis; vmap this function, not that one.
      state: arrays.
      times: [n], rising or falling.
      control: the tolerances.
      norm: of the scaled error; None: its root mean square.
      every: the states at all times, by the method's interpolation, and not at the last only.
    """
    import diffrax  # takes half a second, and no other solver needs it

    # Where steps must be this small the slope is NaN or jumps: stop, for other images wait.
    least = 1e-6 * jnp.abs(times[-1] - times[0])
    own: dict[str, Any] = {"norm": norm} if norm else {}
    step_sizes = diffrax.PIDController(
        control.rtol, control.atol, dtmin=cast(Any, least), force_dtmin=False, **own
    )
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, _: slope(t, y)),
        diffrax.Dopri5(),
        times[0],
        times[-1],
        0.01 * (times[-1] - times[0]),
        state,
        saveat=diffrax.SaveAt(ts=times) if every else diffrax.SaveAt(t1=True),
        stepsize_controller=step_sizes,
        max_steps=MOST_STEPS,
        throw=False,
    )
    good = found.result == diffrax.RESULTS.successful
    good &= jnp.isfinite(cast(Array, found.ts)).all()
    ends = found.ys if every else jax.tree.map(lambda leaf: leaf[0], found.ys)
    return Solved(
        jax.tree.map(lambda leaf: jnp.where(good, leaf, jnp.nan), ends),
        (1 + 6 * found.stats["num_steps"]).astype(jnp.int32),
    )


def one_image(
    denoise: Denoiser, variable: Variable, label: PyTree
) -> Callable[[Array, Any], Array]:
    """(t, y) -> dy/dt of one image [H,W,C], with its own label.

    The slope raises ValueError where something in `denoise` has a number for each image of a batch.
    """
    rows = jax.tree.map(lambda leaf: leaf[None], label)

    def slope(t: Array, y: Array) -> Array:
        x, sigma = y / variable.scale(t), variable.sigma(t).astype(y.dtype)
        x0_hat = denoise(x[None], sigma[None], rows)
        if x0_hat.shape != (1, *x.shape):
            raise ValueError(
                f"guidance: it answers for a batch of {x0_hat.shape[0]}, but dopri5 and "
                "likelihoods evaluate every image by itself; expected one weight for all images"
            )
        return variable.slope(t, x, x0_hat[0].astype(y.dtype))

    return slope


def dopri5(
    denoise: Denoiser, x: Array, sigmas: Array, label: PyTree, control: Control, trajectory: bool
) -> tuple[Array, tuple[Array, Array] | None, Array]:
    """From sigmas[0] to the lowest level before the last, and from there by one Euler step to the
    last: to 0 that is x0_hat, score_sde's denoising at the end of its samplers.

    Args:
      denoise: under every transform.
      x: [B,...] state at sigmas[0].
      sigmas: [N + 1]; between the ends it says only where a trajectory is read.
      label: the images' condition, rows.
      control: the tolerances and the variable.
      trajectory: also the states after each level, and x0_hat at each.

    Returns:
      (x, None or (states [N,B,...], x0_hats [N,B,...]), evaluations of each image [B]; those that
      only a trajectory needs are not among them).

    Raises:
      ValueError: see `check_control`.
    """
    check_control(control, denoise)
    variable, levels = VARIABLES[control.variable], sigmas[:-1]
    times = variable.time(levels)

    def one(x: Array, label: PyTree) -> Solved:
        slope = one_image(denoise, variable, label)
        return solve(slope, x * variable.scale(times[0]), times, control, every=trajectory)

    states, count = jax.vmap(one)(x, label)
    full = lambda level: jnp.full((x.shape[0],), level)

    def x0_at(level: Array, x: Array) -> Array:
        return denoise(x, full(level), label).astype(x.dtype)

    if not trajectory:
        before = states / variable.scale(times[-1])
        x0_hat = x0_at(levels[-1], before)
        end = steps.euler_update(before, x0_hat, full(levels[-1]), full(sigmas[-1]))
        return end, None, count + 1
    scales = variable.scale(times).reshape((-1,) + (1,) * x.ndim)
    states = jnp.moveaxis(states, 1, 0) / scales
    states = states.at[0].set(x)
    x0_hats = jax.lax.map(lambda both: x0_at(*both), (levels, states))
    end = steps.euler_update(states[-1], x0_hats[-1], full(levels[-1]), full(sigmas[-1]))
    return end, (jnp.concatenate([states[1:], end[None]]), x0_hats), count + 1
