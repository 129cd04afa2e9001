"""Multistep solvers in lambda = -log sigma that predict x0: DPM-Solver++(2M) of the ODE and of the
reverse SDE, and UniPC.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import steps
from ogdm_jax.sampling.churn import Info
from ogdm_jax.sampling.solvers import Phase, Problem, Step, random_body
from ogdm_jax.typing import Array, PyTree

TERMS = 18  # of the series below: 1 / 18! is float64's rounding


def dpmpp_2m(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """DPM-Solver++(2M) (arXiv 2211.01095) of the ODE; with eta of the SDE, where each step is a
    transition that guidance may own (but not by another x0_hat, which the next step would
    extrapolate). sigma_before = sigma makes the first step first order.
    """

    def body(x: Array, carry: PyTree, info: Info) -> Step:
        x0_before, sigma_before = carry
        levels = info.sigma, info.sigma_next, jnp.where(info.step == 0, info.sigma, sigma_before)
        if p.noisy:

            def moments(x0: Array, x: Array, info: Info) -> tuple[Array, Array]:
                return steps.dpmpp_2m_moments(x, x0, x0_before, *levels, p.eta)

            x, _, x0_hat = random_body(p, moments, x, (), info)
        else:
            x0_hat = p.x0(x, info.sigma)
            x = steps.dpmpp_2m(x, x0_hat, x0_before, *levels)
        return x, (x0_hat, info.sigma), x0_hat

    return [Phase(body, 0, n)], (jnp.zeros_like(x), jnp.zeros((x.shape[0],), x.dtype))


def unipc(p: Problem, x: Array, n: int) -> tuple[list[Phase], PyTree]:
    """UniPC (arXiv 2302.04867), data prediction, multistep: UniP predicts the state at the next
    level, the evaluation there corrects it (UniC) before the next prediction. N evaluations.

    Step k of 1..N has the order min(order, k, N + 1 - k), as released: the step to 0 is Euler's.
    Options: order; bh, the B(h) of the paper, h (bh1) or e^h - 1 (bh2), which differ where one
    weight is 1/2 in place of its equation: prediction of order 2, correction of order 1. The state
    of a trajectory is the predicted one, at which x0_hat was evaluated.
    """
    order = p.options["order"]
    predict, correct = weights(p.sigmas, order, p.options["bh"])

    def moved(x: Array, models: tuple[Array, ...], weights: Iterable[Array], step: Array) -> Array:
        level = lambda i: jnp.full(x.shape[:1], p.sigmas[i])
        moved = steps.euler_update(x, models[0], level(step), level(step + 1))
        for weight, model in zip(weights, models[1:]):
            moved += weight * (model - models[0])
        return moved

    def body(x: Array, carry: PyTree, info: Info) -> Step:
        # The corrected state of the level before, and earlier levels' x0_hats, newest first.
        before, models = carry
        step, x0_hat = info.step, p.x0(x, info.sigma)
        last = jnp.maximum(step - 1, 0)
        *history, end = correct[last]
        corrected = moved(before, models, history, last) + end * (x0_hat - models[0])
        x = jnp.where(step > 0, corrected, x)
        models = (x0_hat, *models)[:order]
        return moved(x, models, predict[step], step), (x, models), x0_hat

    zero = jnp.zeros_like(x)
    return [Phase(body, 0, n)], (zero, (zero,) * order)


# Outside of jit one program, not sixty.
@partial(jax.jit, static_argnames=("order", "bh"), inline=True)
def weights(sigmas: Array, order: int, bh: str) -> tuple[Array, Array]:
    """UniPC's weights on a grid: x' = Euler's + sum_j w_j (m_j - m_0), m_0 the x0_hat at the step's
    start.

    Args:
      sigmas: [N+1] levels that do not rise; equal ones lower the order of the steps that see them.
      order: at most 3.
      bh: "bh1" or "bh2".

    Returns:
      (of the prediction [N, order - 1]: m_1, m_2 of the levels before; of the correction
      [N, order]: those, and last the x0_hat at the step's end).
    """
    n = len(sigmas) - 1
    moving = (sigmas[1:] > 0) & (sigmas[1:] < sigmas[:-1])
    h = jnp.where(moving, jnp.log(sigmas[:-1] / jnp.where(moving, sigmas[1:], sigmas[:-1])), 1.0)

    def earlier(v: Array, by: int) -> Array:
        return jnp.concatenate([v[:1].repeat(min(by, n)), v[: max(n - by, 0)]])

    # Positions of the earlier levels and of the step's end, in units of h from the step's start.
    nodes = [-earlier(h, 1) / h, -(earlier(h, 1) + earlier(h, 2)) / h]
    steps_ = np.arange(1, n + 1)
    allowed = np.minimum(np.minimum(order, steps_), n + 1 - steps_)
    usable = jnp.where(moving & earlier(moving, 1), jnp.where(earlier(moving, 2), 3, 2), 1)
    allowed = jnp.minimum(allowed, usable)
    sides = [math.factorial(k) * phi for k, phi in enumerate(_phi(-h), 1)]
    half = 0.5 * (h if bh == "bh1" else -jnp.expm1(-h))
    zero, end = jnp.zeros_like(h), jnp.ones_like(h)
    predict, correct = [], []
    for at in (1, 2, 3)[:order]:
        behind = nodes[: at - 1]
        predicted = [half / nodes[0]] if at == 2 else _solved(behind, sides, h)
        corrected = [half] if at == 1 else _solved([*behind, end], sides, h)
        missing = [zero] * (order - at)
        predict.append(jnp.stack([*predicted, *missing, zero], 1)[:, : order - 1])
        correct.append(jnp.stack([*corrected[:-1], *missing, corrected[-1]], 1))

    def chosen(rows: list[Array]) -> Array:
        return jnp.take_along_axis(jnp.stack(rows), allowed[None, :, None] - 1, 0)[0]

    return chosen(predict), chosen(correct)


def _solved(nodes: list[Array], sides: list[Array], h: Array) -> list[Array]:
    """The numbers h rho_j / r_j where sum_j rho_j r_j^(k-1) = side_k for k = 1..K, from the
    coefficients of Lagrange's polynomials.
    """
    found = []
    for j, node in enumerate(nodes):
        others = nodes[:j] + nodes[j + 1 :]
        polynomial: list[Any] = [1.0]  # its coefficients, of the highest power first
        for other in others:
            above, below = [*polynomial, 0.0], [0.0, *polynomial]
            polynomial = [a - other * b for a, b in zip(above, below)]
        value = sum(c * side for c, side in zip(polynomial, sides[len(others) :: -1]))
        found.append(h * value / (node * math.prod(node - other for other in others)))
    return found


def _phi(z: Array) -> tuple[Array, Array, Array]:
    """phi_2, phi_3, phi_4 of z <= 0, phi_k(z) = sum_j z^j / (j + k)!.

    phi_{k+1} = (phi_k - 1 / k!) / z cancels where z is small: there the series, and downwards.
    """
    small = jnp.abs(z) < 1
    series, safe = jnp.zeros_like(z), jnp.where(small, -1.0, z)
    for j in reversed(range(TERMS)):
        series = jnp.where(small, z, 0.0) * series + 1 / math.factorial(j + 4)
    upwards = (((jnp.expm1(safe) / safe - 1) / safe - 1 / 2) / safe - 1 / 6) / safe
    fourth = jnp.where(small, series, upwards)
    third = z * fourth + 1 / 6
    return z * third + 1 / 2, third, fourth
