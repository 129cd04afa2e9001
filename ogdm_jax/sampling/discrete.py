"""Samplers on the index grid of a discrete process, as DDPM-type models are published: DDIM and
PNDM.

Inside, the state is x = x_vp / sqrt(alpha_bar) with sigma = sqrt(1 / alpha_bar - 1); there DDIM's
transfer is the Euler step and both samplers are rules of steps.py. Outside, latents and images are
in the model's own coordinate x_vp.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion import grids, precondition, steps
from ogdm_jax.diffusion.process import Discrete, vp_scale
from ogdm_jax.sampling.sampler import Trajectory, sample, widened
from ogdm_jax.typing import Array

# (x_vp [B,H,W,C], t [B] float: an original index) -> eps [B,H,W,C], labels bound.
EpsModel = Callable[[Array, Array], Array]
Node = dict[str, Array]  # of the index grid: t, its level sigma and the scale to x_vp


def ddim(
    eps_model: EpsModel,
    latents: Array,
    n: int,
    table: Discrete | None = None,
    spacing: str = "uniform",
    clip: bool = True,
    **settings: Any,
) -> Array | tuple[Array, Trajectory]:
    """DDIM on n kept indices, from x_vp = latents (arXiv 2010.02502 eq. 12). n evaluations.

    As in the published code the start is N(0, I) at the first kept index, although alpha_bar there
    is not 0.

    Args:
      eps_model: the network, which predicts eps; t is an index of table.timesteps.
      latents: [B,H,W,C] ~ N(0, I).
      n: steps.
      table: the full process (default: linear, 1000 steps).
      spacing: of `grids.ddim_timesteps`.
      clip: clamp x0 to [-1, 1]; slopes are then re-derived from it, as guided-diffusion does.
      **settings: eta, key, guidance, trajectory, ... of `sample`.
    """
    table = Discrete.make() if table is None else table
    sigmas = grids.ddim(n, table, spacing)
    denoise = precondition.adm(lambda x, t, label=None: eps_model(x, t), table, clip=clip)
    # sample() multiplies by sigmas[0].
    start = widened(latents) * float(np.sqrt(1 + sigmas[0] ** 2) / sigmas[0])
    drawn = sample(denoise, start, sigmas, solver="ddim", **settings)
    dtype = jnp.asarray(latents).dtype
    is_count = lambda v: jnp.issubdtype(v.dtype, jnp.integer)
    return jax.tree.map(lambda v: v if is_count(v) else v.astype(dtype), drawn)


def pndm_levels(n: int, table: Discrete, order: int = 2) -> np.ndarray:
    """[n + 1] noise levels that `pndm` steps over, with its errors; the last is not 0."""
    return _one_above(table, _pndm_times(n, table, order))


def _pndm_times(n: int, table: Discrete, order: int) -> np.ndarray:
    if order not in (2, 4):
        raise ValueError(f"order={order}; expected 2 (S-PNDM) or 4 (F-PNDM)")
    if not order <= n < len(table.timesteps):
        raise ValueError(f"n={n}; expected from {order} to {len(table.timesteps) - 1} steps")
    return np.append(grids.ddim_timesteps(n, len(table.timesteps))[::-1].astype(np.float64), -1.0)


def _one_above(table: Discrete, t: np.ndarray) -> np.ndarray:
    """Levels of the indices t + 1, where the published code reads alpha_bar; halves are cut off."""
    return table.sigma[np.maximum(t, -1).astype(np.int64) + 1]


def pndm(
    eps_model: EpsModel, latents: Array, n: int, table: Discrete | None = None, order: int = 2
) -> Array:
    """S-PNDM (order 2, n + 1 evaluations) or F-PNDM (order 4, n + 9) on n indices (arXiv
    2202.09778).

    The published code reads alpha_bar at index t + 1 while the network gets t, and ends at
    alpha_bar[0] and not at 1; both are kept, because published figures were made so. x0 is not
    clipped.

    Args:
      eps_model: as in `ddim`; F-PNDM also asks for half-integer t.
      latents: [B,H,W,C] ~ N(0, I).
      n: steps, floor(i T / n).
      table: the full process (default: linear, 1000 steps).
      order: 2 or 4.

    Raises:
      ValueError: another order, or n below 2 (order 4: below 4) or not below T.
    """
    table = Discrete.make() if table is None else table
    given, latents = jnp.asarray(latents).dtype, widened(latents)
    t = _pndm_times(n, table, order)
    middle = (t[:-1] + t[1:]) / 2

    def node(t: np.ndarray) -> Node:
        sigma = _one_above(table, t)
        found = {"t": t, "sigma": sigma, "scale": vp_scale(sigma)}
        return jax.tree.map(lambda v: jnp.asarray(v, latents.dtype), found)

    def slope(x: Array, at: Node) -> Array:
        return eps_model(at["scale"] * x, jnp.broadcast_to(at["t"], x.shape[:1])).astype(x.dtype)

    def levels(*nodes: Node) -> list[Array]:
        return [jnp.broadcast_to(at["sigma"], latents.shape[:1]) for at in nodes]

    def starter(x: Array, start: Node, mid: Node, end: Node) -> tuple[Array, Array]:
        if order == 2:
            sigma, sigma_next = levels(start, end)
            d = slope(x, start)
            d_next = slope(steps.pndm(x, [d], sigma, sigma_next), end)
            return steps.pndm(x, [(d + d_next) / 2], sigma, sigma_next), d
        first, second, third = (functools.partial(slope, at=at) for at in (start, mid, end))
        return steps.pseudo_runge_kutta((first, second, third), x, *levels(start, mid, end))

    def multistep(carry: tuple[Array, Any], nodes: tuple[Node, Node]) -> tuple[Any, None]:
        x, earlier = carry
        start, end = nodes
        slopes = (slope(x, start), *earlier)
        return (steps.pndm(x, slopes, *levels(start, end)), slopes[:-1]), None

    starts, middles, ends = node(t[:-1]), node(middle), node(t[1:])
    few, rest = slice(order - 1), slice(order - 1, None)
    part = lambda which, *nodes: jax.tree.map(lambda v: v[which], nodes)
    x = latents / starts["scale"][0]
    x, first = jax.lax.scan(
        lambda x, nodes: starter(x, *nodes), x, part(few, starts, middles, ends)
    )
    earlier = tuple(first[::-1])
    (x, _), _ = jax.lax.scan(multistep, (x, earlier), part(rest, starts, ends))
    return (x * ends["scale"][-1]).astype(given)
