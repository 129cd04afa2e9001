"""Averages of parameters with power-function profiles, and any of them from a few that were kept.

arXiv 2312.02696, section 3 and appendix C. At time t such an average is the integral of theta(tau)
p(tau) with

    p(tau) = (gamma + 1) / t * (tau / t)^gamma,    0 <= tau <= t.

Its width relative to t (the standard deviation of p over t) names it: 0.1 looks back over about the
last tenth of a run, however long the run is. Times are optimiser steps; theta(tau) = theta_k, the
parameters after step k, for tau in (k - 1, k], so that what a run tracks is this integral exactly.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.typing import Array, PyTree

Numbers = float | np.ndarray


def exponent(std: float) -> float:
    """Gamma of a profile of relative width std, in (0, 12^-1/2): the largest root of
    (gamma + 2)^2 (gamma + 3) = (gamma + 1) / std^2.
    """
    squared = float(std) ** -2
    cubic = np.polynomial.Polynomial([12 - squared, 16 - squared, 7, 1])
    return float(cubic.roots().real.max())


def width(gamma: float) -> float:
    """The relative width of a profile: sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def update(average: PyTree, params: PyTree, gamma: float, step: Array) -> PyTree:
    """The average after a step: average + w (params - average), w = 1 - (1 - 1 / step)^(gamma + 1).

    w is computed without cancellation: as 1 - beta in float32 it would be off by some percent after
    a million steps.

    Args:
      average: before the step; after the first step nothing is left of it.
      params: after the step.
      gamma: of the profile.
      step: its number, from 1 on, int32.
    """
    weight = -jnp.expm1((gamma + 1) * jnp.log1p(-1.0 / step.astype(jnp.float32)))
    return jax.tree.map(lambda a, p: a + weight * (p - a), average, params)


def products(times: Numbers, gammas: Numbers, t: Numbers, gamma: Numbers) -> np.ndarray:
    """The integrals of p q over all tau for pairs of profiles, in closed form; shapes broadcast.

    (gamma + 1)(gamma' + 1) / (gamma + gamma' + 1) / max(t, t') * (min / max)^(gamma of the max).
    """
    earlier, later = np.minimum(times, t), np.maximum(times, t)
    power = np.where(times < t, gamma, gammas)  # that of the later one
    scale = (gammas + 1) * (gamma + 1) / (gammas + gamma + 1)
    return scale / later * (earlier / later) ** power


def coefficients(
    times: Sequence[int], stds: Sequence[float], t: int, wanted: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """How averages that were kept add up to others at time t: least squares between the profiles.

    The sum of each column is made 1 afterwards, as in the authors' code.

    Args:
      times: steps of the n averages, at most t.
      stds: their relative widths, [n].
      t: step of those that are wanted.
      wanted: their relative widths, [m].

    Returns:
      float64 [n, m], and [m] how far the sum is from the profile: the L2 norm of the difference
      over that of the profile. Errors of the kept ones grow by about the norm of a column: below 1
      where stds of 0.05 and 0.1 were kept and at least 0.05 is wanted, 5 for 0.03.
    """
    at, gammas = np.asarray(times, np.float64)[:, None], np.array([[exponent(s)] for s in stds])
    goal = np.array([[exponent(s) for s in wanted]])
    gram = products(at, gammas, at.T, gammas.T)
    right = products(at, gammas, float(t), goal)
    # One by one, so that no average depends on which others are wanted beside it.
    found = np.stack([np.linalg.solve(gram, one) for one in right.T], axis=1)
    found = found / found.sum(axis=0)
    norms = products(float(t), goal, float(t), goal)[0]
    rest = norms - 2 * np.sum(right * found, axis=0) + np.sum(found * (gram @ found), axis=0)
    return found, np.sqrt(np.maximum(rest, 0) / norms)
