"""Kicks: what training-free guidance makes of a stochastic transition x' ~ N(mean, std^2 I), and
what it is made of.

A kick is `kick(evaluate, transition, x, noise, info) -> (x_next, x0_hat)`, see `sampling.sample`.
Here are the parts that DPS and DSG (methods/dsg.py) share with the methods they are compared with,
and those methods:

- directions: how the gradient of a loss is taken: through the network, at x0_hat only, or smoothed
  by noise;
- `on_steps`, `time_travel`: any kick on some steps only, or several times over;
- `mpgd`, `ddnm`, `diffpir`, `freedom`, `lgd`.

A loss is any differentiable x0_hat [B,H,W,C] -> [B]; images never look at each other.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from ogdm_jax import randomness
from ogdm_jax.diffusion.steps import per_example, spread
from ogdm_jax.inverse.operators import Operator, Spectrum
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.solvers import Kick, plain_kick
from ogdm_jax.typing import Array

Evaluate = Callable[[Array], Array]
Loss = Callable[[Array], Array]


class Direction(Protocol):
    """How a gradient is taken: (evaluate, x, info) -> (x0_hat, loss [B], gradient like x)."""

    def __call__(self, evaluate: Evaluate, x: Array, info: Info) -> tuple[Array, Array, Array]: ...


def through_network(loss: Loss, clip: bool = False) -> Direction:
    """The gradient of loss(D(x)) with respect to x: one evaluation and one backward pass of the
    network.

    clip: the loss sees x0_hat clipped to [-1, 1], as in DPS's and DSG's code for linear problems;
    the gradient of clipped pixels is 0.
    """
    return _pulled(lambda x0_hat, info: loss(clipped(x0_hat, clip)))


def at_x0(loss: Loss, clip: bool = False) -> Direction:
    """The gradient at x0_hat, without a backward pass through the network (MPGD, arXiv
    2311.16424).
    """

    def direction(evaluate: Evaluate, x: Array, info: Info) -> tuple[Array, Array, Array]:
        x0_hat = evaluate(x)
        values, pull = jax.vjp(lambda x0: loss(clipped(x0, clip)), x0_hat)
        return x0_hat, values, pull(jnp.ones_like(values))[0]

    return direction


def smoothed(loss: Loss, samples: int = 8, clip: bool = False) -> Direction:
    """LGD-MC (Song et al., ICML 2023): the gradient of -log mean_j exp(-loss(x0_hat + r z_j)), z_j
    ~ N(0, I), r = sigma / sqrt(1 + sigma^2).

    One backward pass through the network. The loss has to be a negative log-likelihood for the
    weights to mean
    anything: ||y - A(x0)||^2 / (2 std^2).

    Raises:
      ValueError: samples < 1; at the call, no key.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}; expected at least 1")

    def total(x0_hat: Array, info: Info) -> Array:
        if info.key is None:
            raise ValueError("key=None; expected a key, because Monte-Carlo guidance draws noise")
        width = info.sigma / jnp.sqrt(1 + info.sigma**2)

        def one(sample: Array) -> Array:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(
                randomness.fold_in_each(info.key, "lgd"), sample
            )
            z = randomness.normal(keys, x0_hat.shape[1:], x0_hat.dtype)
            return loss(clipped(x0_hat + per_example(width, x0_hat) * z, clip))

        values = jax.vmap(one)(jnp.arange(samples))
        return jnp.log(float(samples)) - jax.nn.logsumexp(-values, axis=0)

    return _pulled(total)


def _pulled(total: Callable[[Array, Info], Array]) -> Direction:
    def direction(evaluate: Evaluate, x: Array, info: Info) -> tuple[Array, Array, Array]:
        def value(x: Array) -> tuple[Array, Array]:
            x0_hat = evaluate(x)
            return total(x0_hat, info), x0_hat

        # A pull-back of ones and not the gradient of a sum: no sum over images, which may lie on
        # several devices.
        values, pull, x0_hat = jax.vjp(value, x, has_aux=True)
        if values.shape != x.shape[:1]:
            raise ValueError(
                f"loss: gives shape {values.shape}; expected one number per image, {x.shape[:1]}"
            )
        return x0_hat, values, pull(jnp.ones_like(values))[0]

    return direction


def clipped(x0_hat: Array, clip: bool) -> Array:
    """x0_hat, in [-1, 1] if clip."""
    return jnp.clip(x0_hat, -1, 1) if clip else x0_hat


def on_steps(
    kick: Kick,
    interval: int = 1,
    window: tuple[float, float] | None = None,
    clip_mean: bool = False,
) -> Kick:
    """The kick on some steps, the plain transition on the others: a real branch, so that those cost
    no gradient.

    Args:
      interval: guided are the steps whose index, counted down to 0 at the last step, is a multiple
        of it (as released).
      window: (low, high): guided are noise levels with low <= sigma <= high; None: all.
      clip_mean: the other steps' transitions see x0_hat clipped to [-1, 1].

    Raises:
      ValueError: interval < 1, or an empty window.
    """
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval={interval!r}; expected a whole number of at least 1")
    _check_window("window", window)
    if interval == 1 and window is None:
        return kick

    def sometimes(evaluate, transition, x, noise, info):
        clipping = lambda x0_hat, x: transition(clipped(x0_hat, clip_mean), x)
        guided = (info.steps - 1 - info.step) % interval == 0
        if window is not None:
            guided &= inside(window, info)
        return jax.lax.cond(
            guided,
            lambda x, noise: kick(evaluate, transition, x, noise, info),
            lambda x, noise: plain_kick(evaluate, clipping, x, noise, info),
            x,
            noise,
        )

    return sometimes


def inside(window: tuple[float, float], info: Info) -> Array:
    """Scalar: low <= sigma <= high. A sampler's step is at one level, so the first image speaks for
    all.
    """
    return (info.sigma[0] >= window[0]) & (info.sigma[0] <= window[1])


def _check_window(name: str, window: tuple[float, float] | None) -> None:
    if window is not None and not (len(window) == 2 and 0 <= window[0] < window[1]):
        raise ValueError(f"{name}={window}; expected noise levels (low, high) with 0 <= low < high")


def time_travel(kick: Kick, repeats: int, window: tuple[float, float] | None = None) -> Kick:
    """The kick `repeats` times, each after the first from its result noised back to the step's
    level.

    x <- x' + sqrt(sigma^2 - sigma'^2) z (FreeDoM, arXiv 2303.09833; DSG's style guidance uses 3).
    Where sigma lies outside the window, and where churn raises the level, there is one pass. Noise
    of later passes comes from the step's key.

    Raises:
      ValueError: repeats < 1 or an empty window; at the call, no key.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats={repeats!r}; expected a whole number of at least 1")
    _check_window("repeat_window", window)
    if repeats == 1:
        return kick

    def repeated(evaluate, transition, x, noise, info):
        if info.key is None:
            raise ValueError("key=None; expected a key, because time travel draws noise")
        back = jnp.sqrt(
            jnp.maximum((info.sigma - info.sigma_next) * (info.sigma + info.sigma_next), 0.0)
        )

        def again(i, state):
            x_next, _ = state
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(info.key, i)
            fresh = [
                randomness.normal(randomness.fold_in_each(keys, name), x.shape[1:]).astype(x.dtype)
                for name in ("renoise", "noise")
            ]
            x_again = x_next + per_example(back, x) * fresh[0]
            return kick(evaluate, transition, x_again, fresh[1], info._replace(key=keys))

        more = info.sigma_next[0] < info.sigma[0]
        if window is not None:
            more &= inside(window, info)
        passes = jnp.where(more, repeats, 1)
        return jax.lax.fori_loop(1, passes, again, kick(evaluate, transition, x, noise, info))

    return repeated


def dps_step(mean: Array, std: Array, eps: Array, grad: Array, scale: float | Array) -> Array:
    """DPS: x' = mean + std eps - scale grad (arXiv 2209.14687 algorithm 1; the step of MCG and LGD
    too).

    Args:
      mean, eps, grad: [B,H,W,C].   std: number, [B] or like mean.   scale: number or [B].
    """
    return mean + spread(std, mean) * eps - spread(scale, mean) * grad


def vp_factor(info: Info) -> Array:
    """[B] 1 / sqrt(abar abar'): what a step -grad in VP coordinates (x_vp = sqrt(abar) x, as
    published) is in ours.
    """
    return jnp.sqrt((1 + info.sigma**2) * (1 + info.sigma_next**2))


def descend(
    direction: Direction,
    scale: Callable[[Array, Array, Array, Info], Array],
    clip_mean: bool = False,
) -> Kick:
    """The kick x' = mean + std noise - scale(grad, x, x0_hat, info) grad, scale a number or [B]."""

    def kick(evaluate, transition, x, noise, info):
        x0_hat, _, grad = direction(evaluate, x, info)
        mean, std = transition(clipped(x0_hat, clip_mean), x)
        return dps_step(mean, std, noise, grad, scale(grad, x, x0_hat, info)), x0_hat

    return kick


def lgd(
    loss: Loss,
    scale: float = 1.0,
    samples: int = 8,
    interval: int = 1,
    window: tuple[float, float] | None = None,
) -> Kick:
    """LGD-MC: DPS's step with the Monte-Carlo smoothed gradient (`smoothed`), scale in VP
    coordinates.
    """
    return on_steps(
        descend(smoothed(loss, samples), lambda g, x, x0, info: scale * vp_factor(info)),
        interval,
        window,
    )


def freedom(
    loss: Loss,
    scale: float = 0.02,
    rule: str = "rms",
    interval: int = 1,
    window: tuple[float, float] | None = None,
    repeats: int = 1,
) -> Kick:
    """FreeDoM (arXiv 2303.09833): DPS's step with its own step sizes, and time travel.

    rule "rms", its text and style guidance: |shift| is scale times the weight 1 - sigma'^2 /
    sigma^2 that x0_hat has in the transition, times rms(x - x0_hat); so the loss's scale cancels.
    rule "time", its face guidance: scale sqrt(abar) on the gradient in VP coordinates (published
    scale: 100 face identity, 20 sketch, 0.2 segmentation, 500 landmarks).

    Raises:
      ValueError: an unknown rule.
    """
    if rule not in ("rms", "time"):
        raise ValueError(f"rule={rule!r}; expected 'rms' or 'time'")

    def step_size(grad: Array, x: Array, x0_hat: Array, info: Info) -> Array:
        if rule == "time":
            return scale * jnp.sqrt(1 + info.sigma_next**2)
        ratio = info.sigma_next / info.sigma
        size = rms(grad)
        positive = size > 0
        weight = scale * jnp.abs((1 - ratio) * (1 + ratio)) * rms(x - x0_hat)
        return jnp.where(positive, weight / jnp.where(positive, size, 1.0), 0.0)

    return on_steps(
        time_travel(descend(through_network(loss), step_size), repeats), interval, window
    )


def rms(v: Array) -> Array:
    """[B] root mean square over an image; its gradient at 0 is not used."""
    return jnp.sqrt(jnp.mean(jnp.square(v).reshape(v.shape[0], -1), axis=1))


def mpgd(
    loss: Loss,
    scale: float,
    interval: int = 1,
    window: tuple[float, float] | None = None,
    clip: bool = False,
) -> Kick:
    """MPGD without autoencoder (arXiv 2311.16424): x' = mean + std noise - scale grad_x0
    loss(x0_hat).

    x0_hat moves and the eps of the unguided prediction stays, as in the released code for linear
    problems (that for faces and style keeps x instead): x_vp' = sqrt(abar') (x0_hat - scale grad) +
    sqrt(1 - abar' - s^2) eps + s noise. So the state moves by the whole of scale grad. No backward
    pass through the network: the cheapest guidance of all.
    clip: the loss sees x0_hat clipped to [-1, 1].
    """
    return on_steps(
        descend(at_x0(loss, clip), lambda grad, x, x0_hat, info: scale), interval, window
    )


def _refuse_churn(method: str, info: Info) -> None:
    if info.churned:
        raise ValueError(
            f"{method} under churn: noise that is only added has no x0_hat to replace; expected no "
            "churn, with "
            "solver='ancestral', or solver='ddim' or 'heun' and eta > 0"
        )


def _spectrum(operator: Operator, shape: tuple[int, ...], method: str) -> Spectrum:
    if operator.spectrum is None:
        raise ValueError(
            f"{method} with operator {operator.name!r}: its singular values are not known; "
            "expected inpaint, "
            "super_resolution, gaussian_blur or identity, or another method such as spherical or "
            "posterior"
        )
    return operator.spectrum(shape)


def ddnm(operator: Operator, y: Array, std: float = 0.0) -> Kick:
    """DDNM+ (arXiv 2212.00490 section 3.3): the measured coordinates of x0_hat are replaced by the
    measurement.

    In the singular basis of A = U S V^T, coordinate i of x0_hat becomes D_i + l_i (y_i / s_i -
    D_i). What l_i brings in of y's noise, a l_i std / s_i with a the weight of x0_hat in the
    transition, is taken off the transition's noise; l_i = min(1, transition std s_i / (a std))
    keeps that possible. No gradient at all.

    Args:
      operator: with a known spectrum.   y: measurements.   std: their noise.

    Raises:
      ValueError: an operator without spectrum; at the call, churn.
    """

    def kick(evaluate, transition, x, noise, info):
        _refuse_churn("ddnm", info)
        basis = _spectrum(operator, x.shape[1:], "ddnm")
        x0_hat = evaluate(x)
        _, spread_of = transition(x0_hat, x)
        step = spread(spread_of, x)
        down = jnp.sqrt(jnp.maximum(per_example(info.sigma_next, x) ** 2 - step**2, 0.0))
        weight = 1 - down / per_example(info.sigma, x)
        s = jnp.asarray(basis.values, x.dtype)
        seen = s > 1e-4  # below, y_i / s_i would be noise alone
        inverse = jnp.where(seen, 1 / jnp.where(seen, s, 1.0), 0.0)
        carried = (
            weight * std * inverse
        )  # noise of y in this coordinate of the next state, if it were taken over whole
        blend = jnp.where(
            seen, jnp.where(carried > step, step / jnp.where(carried > 0, carried, 1.0), 1.0), 0.0
        )
        d = basis.to(x0_hat)
        rectified = basis.back(d + blend * (inverse * basis.measured(y) - d))
        mean, _ = transition(rectified, x)
        left = jnp.sqrt(jnp.maximum(step**2 - (blend * carried) ** 2, 0.0))
        return mean + basis.back(left * basis.to(noise)), rectified

    return kick


def diffpir(
    operator: Operator, y: Array, std: float, strength: float = 8.0, randomness_share: float = 1.0
) -> Kick:
    """DiffPIR (arXiv 2305.08995): a proximal step, then noise of the next level. No gradient.

    x0 = argmin ||y - A x0||^2 + rho ||x0 - D||^2 with rho = 2 strength std^2 / sigma^2,
    x' = x0 + sigma' (sqrt(xi) eps + sqrt(1 - xi) (x - x0) / sigma): its own transition, whatever
    the solver's eta.

    Args:
      operator: with a known spectrum.   y: measurements.   std: their noise (0: an exact
        projection).
      strength: the published lambda, 8.   randomness_share: the published zeta, near 1.

    Raises:
      ValueError: an operator without spectrum, or a share outside [0, 1]; at the call, churn.
    """
    if not 0 <= randomness_share <= 1:
        raise ValueError(f"randomness_share={randomness_share}; expected a number from 0 to 1")

    def kick(evaluate, transition, x, noise, info):
        _refuse_churn("diffpir", info)
        basis = _spectrum(operator, x.shape[1:], "diffpir")
        d = basis.to(evaluate(x))
        s = jnp.asarray(basis.values, x.dtype)
        rho = 2 * strength * jnp.maximum(std, 1e-3) ** 2 / per_example(info.sigma, x) ** 2
        x0 = basis.back((s * basis.measured(y) + rho * d) / (s**2 + rho))
        e = (x - x0) / per_example(info.sigma, x)
        mixed = jnp.sqrt(randomness_share) * noise + jnp.sqrt(1 - randomness_share) * e
        return x0 + per_example(info.sigma_next, x) * mixed, x0

    return kick
