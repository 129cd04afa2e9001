"""The posterior mean of the clean image over many references in one pass: softmax sums that merge
like a log-sum-exp, over chunks and devices.

`stable_target` is the whole of it; for queries x [B,D], levels sigma [B] and references y [n,D] the
rest takes the sums of w_k, w_k^2 and w_k y_k with w_k = exp(-|x - y_k|^2 / (2 sigma^2)), up to a
factor per query.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.pixels import to_float
from ogdm_jax.typing import Array, AxisName, PyTree

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


def stable_target(
    xt: Array,
    sigma: Array,
    references: Array | OnDemand,
    mask: Array | None = None,
    chunk: int | None = None,
    axis_name: AxisName | None = None,
    *,
    source: Array | None = None,
    label: Array | None = None,
    reference_label: Array | None = None,
) -> tuple[Array, Array]:
    """Posterior mean of the source over a reference batch (2302.00670, eq. 6 and algorithm 1; spec
    1 and 7).

    target_i = sum_k w_ik y_k,  w_i = softmax_k( (x_i . y_k - |y_k|^2 / 2) / sigma_i^2 ): |x|^2
    cancels. Computed as one attention-like pass with an online softmax; temporaries are O(B (D +
    chunk) + chunk D), never B n D. Matrix products run at the highest precision. For x = alpha y +
    sigma eps pass x / alpha and sigma / alpha.

    Args:
      xt: [B, ...] noisy images.   sigma: [B] or scalar, > 0.
      references: [n, ...] float in [-1, 1] or uint8, which is scaled like training images chunk by
        chunk. They must hold each query's clean image exactly once, unless `source` does. OnDemand:
        made when needed.
      mask: bool, which references count: [n] for all queries, or [B, n].
      chunk: references per pass; None chooses it.
      axis_name: a mapped axis, or several, over which the references are divided: this device holds
        n of them. The queries are gathered, the references never; every device gets the targets of
        its own queries, weighed against all. A mask is then [n] (own references), [all queries, n],
        [own queries, all references], or [B, n] if all devices ask the same queries (nan if they do
        not).
      source: [B, ...] one more reference for each query alone: its own clean image, when
        `references` lacks it.
      label: [B] int32 and reference_label [n] int32: only references of the query's class count; a
        query of label -1 uses all. Compared chunk by chunk, so cheaper than a mask; both masks may
        be given.

    Returns:
      (target like xt, effective sample size [B] = 1 / sum_k w_k^2). No gradient passes. A query
      with no allowed reference gets nan.

    Raises:
      ValueError: shapes that do not fit, no references, or a chunk below 1.
    """
    xt = jnp.asarray(xt)
    if not isinstance(references, OnDemand):
        references = jax.lax.stop_gradient(jnp.asarray(references))
    _check_shapes(xt, sigma, references, chunk, source, label, reference_label)
    batch, own = xt.shape[0], None
    dtype = jnp.promote_types(xt.dtype, jnp.float32)
    x = jax.lax.stop_gradient(xt).astype(dtype).reshape(batch, -1)
    sigma = jnp.broadcast_to(jax.lax.stop_gradient(jnp.asarray(sigma, dtype)), (batch,))
    if source is not None:
        own = alone(
            x, to_float(jax.lax.stop_gradient(jnp.asarray(source)).reshape(batch, -1), dtype)
        )
    queries, levels, same = x, sigma, None
    if axis_name is not None:
        if mask is not None and mask.ndim == 2:
            mask, same = shard_mask(mask, x, references.shape[0], axis_name)
        gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, tiled=True)
        queries, levels, label = gather(x), gather(sigma), None if label is None else gather(label)
    if mask is not None and mask.shape not in (
        (references.shape[0],),
        (queries.shape[0], references.shape[0]),
    ):
        raise ValueError(
            f"stable_target: mask has shape {mask.shape}; expected [{references.shape[0]}] or "
            f"[{queries.shape[0]}, {references.shape[0]}] (references, or queries x references)"
        )
    part = weighted_sums(queries, levels, references, mask, chunk, label, reference_label)
    if axis_name is not None:
        part = across(part, levels, axis_name)
    if own is not None:
        part = merge(part, own, sigma)
    target = part.total / part.mass[:, None]
    if same is not None:
        target = jnp.where(same, target, jnp.nan)
    return target.astype(xt.dtype).reshape(xt.shape), jnp.square(part.mass) / part.squares


def drawn_target(
    xt: Array,
    sigma: Array,
    source: Array,
    made_of: PyTree,
    images: Callable[[PyTree, Array], Array],
    counts: Callable[[PyTree], Array] | None = None,
    chunk: int | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    """`stable_target` where every query has references of its own: its source and m others.

    Args:
      xt, source: [B, ...].   sigma: [B].
      made_of: leaves [B, m, ...], what the others are made of.
      images: (a query's made_of, indices k [i]) -> images [i, ...], uint8 or float.
      counts: a query's made_of -> bool [m], which of them count here; None: all.
      chunk: references per pass of each query; None: as many as `stable_target` takes for one.
      axis_name: a mapped axis whose devices each know some of the images (counts): queries and
        made_of travel.

    Returns:
      As `stable_target`. Temporaries are O(B chunk D).
    """
    batch, dtype = xt.shape[0], jnp.promote_types(xt.dtype, jnp.float32)
    flat = lambda a: jax.lax.stop_gradient(a).astype(dtype).reshape(batch, -1)
    x, source, levels = flat(xt), flat(source), jnp.asarray(sigma, dtype)
    m = jax.tree.leaves(made_of)[0].shape[1]

    def sums(x: Array, sigma: Array, own: PyTree) -> Sums:
        drawn = OnDemand((m, *xt.shape[1:]), functools.partial(images, own))
        mask = None if counts is None else counts(own)
        return weighted_sums(x[None], sigma[None], drawn, mask, chunk, None, None)

    queries = x, levels, made_of
    if axis_name is not None:
        queries = jax.lax.all_gather(queries, axis_name, tiled=True)
    part = jax.tree.map(lambda a: a[:, 0], jax.vmap(sums)(*queries))
    if axis_name is not None:
        part = across(part, queries[1], axis_name)
    part = merge(part, alone(x, source), levels)
    target = part.total / part.mass[:, None]
    return target.astype(xt.dtype).reshape(xt.shape), jnp.square(part.mass) / part.squares


def _check_shapes(
    xt: Array,
    sigma: Array | float,
    references: Array | OnDemand,
    chunk: int | None,
    source: Array | None,
    label: Array | None,
    reference_label: Array | None,
) -> None:
    """Raises ValueError for shapes that do not fit each other."""
    if references.shape[1:] != xt.shape[1:] or references.shape[0] < 1:
        raise ValueError(
            f"stable_target: references have shape {references.shape}; expected [n, ...] like xt's "
            f"{xt.shape}, n >= 1"
        )
    if np.shape(sigma) not in ((), (xt.shape[0],)):
        raise ValueError(
            f"stable_target: sigma has shape {np.shape(sigma)}; expected [{xt.shape[0]}]"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(
            f"stable_target: chunk is {chunk}; expected a positive number of references"
        )
    if source is not None and source.shape != xt.shape:
        raise ValueError(
            f"stable_target: source has shape {source.shape}; expected xt's {xt.shape}"
        )
    for name, value, size in (
        ("label", label, xt.shape[0]),
        ("reference_label", reference_label, references.shape[0]),
    ):
        if (label is None) != (reference_label is None) or (
            value is not None and value.shape != (size,)
        ):
            shape = None if value is None else value.shape
            raise ValueError(
                f"stable_target: {name} has shape {shape}; expected [{size}], with its partner "
                "given too"
            )


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


def across(part: Sums, sigma: Array, axis_name: AxisName) -> Sums:
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
    mask: Array, x: Array, references: int, axis_name: AxisName
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
    references: Array | OnDemand,
    mask: Array | None,
    chunk: int | None,
    label: Array | None,
    reference_label: Array | None,
) -> Sums:
    """Sums over all references, `chunk` at a time.

    Where the chunks do not divide the references, the last one begins earlier and masks those that
    an earlier chunk has counted: no array is padded.
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
