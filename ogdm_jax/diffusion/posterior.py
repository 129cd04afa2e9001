"""Weighted means over many references in one pass: softmax sums that merge like a log-sum-exp, over
chunks and devices.

The engine of methods/stf.py: for queries x [B,D], levels sigma [B] and references y [n,D] the sums
of w_k, w_k^2 and w_k y_k with w_k = exp(-|x - y_k|^2 / (2 sigma^2)), up to a factor per query.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ogdm_jax.pixels import to_float
from ogdm_jax.typing import Array

# TPU's default is bfloat16 passes, a GPU's may be TF32: both ruin the weights
_HIGHEST = jax.lax.Precision.HIGHEST
# up to this many numbers an image, exact differences are used: points in the plane need their
# accuracy
_DIRECT = 16
_BLOCK = 256  # pixels summed up by one matrix product
_NUMBERS = 2**21  # float32 numbers that a chunk may hold by default


class Sums(NamedTuple):
    """Softmax sums over some of the references, relative to their largest log weight: merges like a
    log-sum-exp.
    """

    # [B] largest sigma^2 log weight, -inf if none is allowed; the difference to it is taken exactly
    top: Array
    mass: Array  # [B] sum of weights
    squares: Array  # [B] sum of squared weights
    total: Array  # [B,D] weighted sum of references


class OnDemand(NamedTuple):
    """References that are made chunk by chunk, so that they never lie in memory together."""

    shape: tuple[int, ...]  # [n, ...]
    make: Callable[
        [Array], Array
    ]  # indices [k] int32, 0 <= index < n -> images [k, ...], uint8 or float


def class_mask(label: Array, reference_label: Array) -> Array:
    """[B, n] bool: references of each query's class; all of them where the query's label is -1
    (none, or dropped).

    A reference whose own label was dropped (-1) only serves queries without a label. A query's own
    source always stays.
    """
    return (label[:, None] == reference_label[None, :]) | (label[:, None] < 0)


def _one_pass(x: Array, sigma: Array, references: Array, allowed: Array | None) -> Sums:
    """The sums over references [m,D] in one pass; allowed [B,m] bool or None."""
    if x.shape[1] <= _DIRECT:
        columns = range(x.shape[1])
        logits = -0.5 * sum(jnp.square(x[:, d][:, None] - references[:, d][None]) for d in columns)
    else:
        logits = _product(x, references) - 0.5 * jnp.sum(jnp.square(references), axis=1)[None]
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    # Computed once: a compiler that computes them twice, rounding otherwise, would spoil exp(0) = 1
    # for the nearest.
    logits = jax.lax.optimization_barrier(logits)
    top = jnp.max(logits, axis=1)
    weights = jnp.exp(
        (logits - jnp.where(jnp.isfinite(top), top, 0.0)[:, None]) / jnp.square(sigma)[:, None]
    )
    total = jnp.dot(weights, references, precision=_HIGHEST)
    return Sums(top, jnp.sum(weights, axis=1), jnp.sum(jnp.square(weights), axis=1), total)


def _product(x: Array, references: Array) -> Array:
    """The product x references^T [B,m] in blocks of pixels.

    One long float32 sum has 10 times the error, which near-duplicates feel.
    """
    block = max(_BLOCK, -(-x.shape[1] // 16))
    starts = range(0, x.shape[1], block)
    dot = functools.partial(
        jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), precision=_HIGHEST
    )
    parts = [dot(x[:, i : i + block], references[:, i : i + block]) for i in starts]
    return functools.reduce(jnp.add, parts)


def alone(x: Array, source: Array) -> Sums:
    """The sums over one reference per query; its log weight in the same form as the others'."""
    if x.shape[1] <= _DIRECT:
        top = -0.5 * jnp.sum(jnp.square(x - source), axis=1)
    else:
        top = jnp.sum(x * source, axis=1) - 0.5 * jnp.sum(jnp.square(source), axis=1)
    one = jnp.ones_like(top)
    return Sums(top, one, one, source)


def _rescale(part: Sums, top: Array, sigma: Array) -> Sums:
    # -inf - -inf (nothing allowed so far) must give weight 0, not nan.
    scale = jnp.where(jnp.isfinite(part.top), jnp.exp((part.top - top) / jnp.square(sigma)), 0.0)
    return Sums(
        top, part.mass * scale, part.squares * jnp.square(scale), part.total * scale[:, None]
    )


def merge(a: Sums, b: Sums, sigma: Array) -> Sums:
    """The sums over both sets of references."""
    top = jnp.maximum(a.top, b.top)
    a, b = _rescale(a, top, sigma), _rescale(b, top, sigma)
    return Sums(top, a.mass + b.mass, a.squares + b.squares, a.total + b.total)


def across(part: Sums, sigma: Array, axis_name: str) -> Sums:
    """Merges all devices' sums and leaves each device the rows of its own queries."""
    top = jax.lax.pmax(part.top, axis_name)
    part = _rescale(part, top, sigma)
    batch = top.shape[0] // jax.lax.axis_size(axis_name)
    mine = jax.lax.dynamic_slice_in_dim(top, jax.lax.axis_index(axis_name) * batch, batch)
    scatter = functools.partial(
        jax.lax.psum_scatter, axis_name=axis_name, scatter_dimension=0, tiled=True
    )
    return Sums(mine, scatter(part.mass), scatter(part.squares), scatter(part.total))


def shard_mask(
    mask: Array, x: Array, references: int, axis_name: str
) -> tuple[Array, Array | None]:
    """A [.., ..] mask as [all queries, own references], and whether all devices must ask, and ask,
    the same queries.
    """
    devices, batch = jax.lax.axis_size(axis_name), x.shape[0]
    if mask.shape == (batch, devices * references) and devices > 1:
        everyone = jax.lax.all_gather(mask, axis_name, tiled=True)
        start = jax.lax.axis_index(axis_name) * references
        return jax.lax.dynamic_slice_in_dim(everyone, start, references, axis=1), None
    if mask.shape == (batch, references) and devices > 1:
        same = jnp.all(jax.lax.pmax(x, axis_name) == jax.lax.pmin(x, axis_name))
        return jnp.tile(mask, (devices, 1)), same
    return mask, None


def weighted_sums(
    x: Array,
    sigma: Array,
    references: Array,
    mask: Array | None,
    chunk: int | None,
    label: Array | None,
    reference_label: Array | None,
) -> Sums:
    """All references, `chunk` at a time; the last chunk steps back and hides what it has seen, so
    nothing is padded.
    """
    n, width = references.shape[0], x.shape[1]
    if not isinstance(references, OnDemand):
        references = references.reshape(n, width)
    if not chunk:
        count = -(-n * (width + x.shape[0]) // _NUMBERS)
        chunk = -(-n // count)
    chunk = min(chunk, n)

    def part(first: Array | int, hide: bool) -> Sums:
        start = jnp.minimum(first, n - chunk) if hide else first
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=chunk)
        allowed = []
        if hide and n % chunk:
            allowed.append((start + jnp.arange(chunk) >= first)[None])
        if mask is not None:
            allowed.append(take(mask, axis=mask.ndim - 1) if mask.ndim == 2 else take(mask)[None])
        if label is not None and reference_label is not None:
            allowed.append(class_mask(label, take(reference_label)))
        every = functools.reduce(jnp.logical_and, allowed) if allowed else None
        if isinstance(references, OnDemand):
            images = jax.lax.stop_gradient(references.make(start + jnp.arange(chunk))).reshape(
                chunk, width
            )
        else:
            images = take(references)
        return _one_pass(x, sigma, to_float(images, x.dtype), every)

    # The first chunk stands outside: it starts the sums, and with them their type on a device mesh.
    sums = part(0, hide=False)
    if chunk == n:
        return sums
    starts = jnp.arange(chunk, n, chunk)
    return jax.lax.scan(
        lambda carry, first: (merge(carry, part(first, hide=True), sigma), None), sums, starts
    )[0]
