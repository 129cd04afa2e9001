"""Gradients and metrics of a batch: over accumulation rounds, over devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ogdm_jax.methods.contract import Metrics
from ogdm_jax.training.example import Batch, references
from ogdm_jax.typing import Array, PyTree

Sums = dict[str, tuple[Array, Array]]
BatchLoss = Callable[[PyTree, Batch], tuple[Array, Sums]]


def accumulate(loss: BatchLoss, params: PyTree, rounds: int, batch: Batch) -> tuple[PyTree, Sums]:
    """Mean gradient and summed metrics over `rounds` equal parts of the batch: exactly the big
    batch's.

    Args:
      loss: (params, part) -> (mean loss of the part, `sums` of its metrics).
      params: what is differentiated.
      rounds: number of parts; a reference batch is not cut but given to each of them.
      batch: arrays of rows.
    """
    grad = jax.grad(loss, has_aux=True)
    if rounds == 1:
        return grad(params, batch)
    shared = references(batch)
    # Each round has every rounds-th row: in a global array a device's rows lie together, and rounds
    # of consecutive rows would be one device's each, which all the others would compute as well.
    parts = jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(a.shape[0] // rounds, rounds, *a.shape[1:]), 0, 1),
        {name: value for name, value in batch.items() if name not in shared},
    )

    def body(total: PyTree, part: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, grad(params, part | shared)), None

    first = jax.tree.map(lambda a: a[0], parts) | shared
    shapes = jax.eval_shape(grad, params, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, totals), _ = jax.lax.scan(body, zeros, parts)
    return jax.tree.map(lambda g: g / rounds, grads), totals


def average(grads: PyTree, axis: str | None, ravel: bool) -> PyTree:
    """The mean over a mapped axis (None: arrays are global and nothing is to be done).

    ravel: as one vector, which between processes is many times cheaper than leaf by leaf.
    """
    if axis is None:
        return grads
    if not ravel:
        return jax.lax.pmean(grads, axis)
    vector, unravel = ravel_pytree(grads)
    return unravel(jax.lax.pmean(vector, axis))


def sums(metrics: Metrics) -> Sums:
    """Per-example values, or (values, weights), as (sum of weighted values, sum of weights)."""
    out: Sums = {}
    for name, value in metrics.items():
        values, weights = value if isinstance(value, tuple) else (value, jnp.ones_like(value))
        values, weights = jax.lax.stop_gradient((values, weights.astype(values.dtype)))
        # A weight of 0 must hide whatever the value is, nan included.
        out[name] = (jnp.sum(jnp.where(weights != 0, values * weights, 0)), jnp.sum(weights))
    return out


def means(totals: Sums, axis: str | None) -> dict[str, Array]:
    """The weighted means of `sums`, over the devices of a mapped axis too."""
    if axis is not None:
        totals = jax.lax.psum(totals, axis)
    return {name: total / weight for name, (total, weight) in totals.items()}
