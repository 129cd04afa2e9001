"""STF's references by class, for conditional models: every image meets draws from its own class.

One reference batch for all images of a device holds few images of each of a thousand classes. Here
image i has references of its own: itself and n - 1 independent draws from the images of its class,
so that the set is exchangeable and the target E[x0 given xt, class, set] without bias, as in
methods/stf.py. An image whose label was hidden meets draws from the whole set; one that has none,
from those that have none.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.diffusion.posterior import drawn_target
from ogdm_jax.methods.contract import Context, Example
from ogdm_jax.typing import Array, AxisName, PyTree

BANKS = ("resident", "divided", "read")
_NUMBERS = 2**23  # float32 numbers of a device's references at once
_Queries = tuple[Array, Array, Array, PyTree]  # xt, sigma, clean, what references are made of
Take = Callable[[PyTree, dict[str, Array], Array], Array]  # images k of one query's references


def has_unlabelled(context: Context) -> bool:
    """Whether images of the set may have no class."""
    labels = context.source.labels
    return labels is None or bool((np.asarray(labels) < 0).any())


def compared(context: Context, labels: Array) -> Array:
    """Classes as queries and references are compared: -1 stays, and meets all, where it is a hidden
    class; an image that has none is of a class of its own.
    """
    if not has_unlabelled(context):
        return labels
    return jnp.where(labels < 0, context.label_dim, labels)


def flat(images: Any) -> np.ndarray:
    """Images as rows of numbers [n, h w c]: to draw from [n,h,w,c] a TPU first makes two copies of
    the whole set in another layout, in every step.
    """
    return np.asarray(images).reshape(len(images), -1)


def drawn(context: Context, images: Array, rows: Array) -> Array:
    """Rows [i] of what `flat` made, as they were: [i,h,w,c], or a source's items of latents."""
    return jnp.asarray(images)[rows].reshape(-1, *context.source.item_shape)


def bank(context: Context, divided: bool) -> dict[str, np.ndarray]:
    """The set in the order of its classes; divided: filled up to a multiple of the devices."""
    images, labels = flat(context.source.images), np.asarray(context.source.labels)
    if (np.diff(labels) < 0).any():
        images = images[np.argsort(labels, kind="stable")]
    more = -len(images) % context.devices if divided else 0
    return {"image": np.concatenate([images, np.repeat(images[:1], more, 0)]) if more else images}


def rows(context: Context, example: Example, count: int) -> Array:
    """Rows [b, count] int32 of `bank`: independent draws from the class of each image.

    An example's draws depend on its own key alone: they are the same on every plan.
    """
    ordered = np.sort(np.asarray(context.source.labels))
    edges = np.searchsorted(ordered, np.arange(context.label_dim + 1)).astype(np.int32)
    label = example.label
    assert label is not None  # of a conditional model
    hidden, unlabelled = label < 0, int(edges[0])  # which are the first
    first = jnp.where(hidden, 0, jnp.asarray(edges)[label])
    stop = jnp.where(hidden, unlabelled or len(ordered), jnp.asarray(edges)[label + 1])
    draw = lambda key, first, stop: jax.random.randint(key, (count,), first, stop)
    return jax.vmap(draw)(example.keys("stf/class"), first, stop)


def targets(
    where: str,
    n: int,
    chunk: int | None,
    context: Context,
    example: Example,
    constants: PyTree,
    xt: Array,
    clean: Array,
    take: Take,
) -> tuple[Array, Array]:
    """Targets like xt and effective sample sizes [b] of queries xt whose sources are `clean`.

    Args:
      where: the bank lies, one of BANKS. read: the loader brought `example.mates`; it knows no
        hidden label, so that images without one keep the clean image as target.
      n: references of an image, itself included.
      chunk: references of each image at once; None chooses it.
      context: of the run.
      example: the batch.
      constants: what `bank` made, on the devices.
      xt: [b,h,w,c].
      clean: [b,h,w,c].
      take: (constants, an image's draws, k) -> images k of its references.
    """
    if n == 1:
        return clean, jnp.ones_like(example.sigma)
    assert example.label is not None  # of a conditional model
    made_of: dict[str, Any] = {"image": example.mates}  # the loader's part
    if where != "read":
        made_of = {"rows": rows(context, example, n - 1)}
    if context.source.latents is not None:
        bits = lambda key: jax.random.bits(key, (n - 1,))
        made_of["seed"] = jax.vmap(bits)(example.keys("stf/class/latent"))
    if context.xflip:
        draw = lambda key: jax.random.bernoulli(key, 0.5, (n - 1,))
        made_of["mirrored"] = jax.vmap(draw)(example.keys("stf/class/xflip"))
    together = context.device_batch * (context.devices if where == "divided" else 1)
    chunk = chunk or min(max(_NUMBERS // (together * clean[0].size), 1), n - 1)

    queries = xt, example.sigma, clean, made_of
    if where == "divided":
        return _divided(context, chunk, constants["image"], take, queries)
    images = lambda made_of, k: take(constants, made_of, k)
    mean, ess = drawn_target(*queries, images, chunk=chunk)
    if where == "resident":
        return mean, ess
    known = example.label >= 0
    return jnp.where(known[:, None, None, None], mean, clean), jnp.where(known, ess, 1.0)


def _divided(
    context: Context, chunk: int, images: Array, take: Take, queries: _Queries
) -> tuple[Array, Array]:
    """The same where each device holds its rows of the bank: queries travel, references never."""

    def work(images: Array, queries: _Queries, axis: AxisName | None) -> tuple[Array, Array]:
        size = images.shape[0]
        start = 0 if axis is None else size * jax.lax.axis_index(axis)

        def local(made_of: dict[str, Array], k: Array) -> Array:
            at = jnp.clip(made_of["rows"] - start, 0, size - 1)
            return take({"image": images}, made_of | {"rows": at}, k)

        def here(made_of: dict[str, Array]) -> Array:
            return (made_of["rows"] >= start) & (made_of["rows"] < start + size)

        return drawn_target(*queries, local, here, chunk, axis)

    return over_devices(context, work, images, queries)


def over_devices(
    context: Context, work: Callable[..., tuple[Array, Array]], *arrays: PyTree
) -> tuple[Array, Array]:
    """work(*arrays, axis=...) on every device's rows of the arrays; axis: their mapped name."""
    if context.mesh is None:
        return work(*arrays, axis=context.axis)
    axes = context.mesh.axis_names
    spec = jax.sharding.PartitionSpec(axes)
    work = functools.partial(work, axis=axes)
    mapped = jax.shard_map(work, mesh=context.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return mapped(*arrays)
