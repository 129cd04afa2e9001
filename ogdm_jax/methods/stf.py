"""Stable target field: regress on a posterior mean over a reference batch (Xu, Tong, Jaakkola,
arXiv 2302.00670).

    target = sum_k w_k y_k,   w = softmax_k( -|x - y_k|^2 / (2 sigma^2) ),   y_1..y_n references,
    the source among them

It is E[source | x, set of references], so it has the same expectation given x as the clean image
and never a larger variance, exactly, when the source is one of the references and they are
exchangeable. At low noise the weights are one-hot and the target is the clean image bit for bit.
Nothing else of a loss changes.

Differences from the authors' code: a matrix-product form instead of an array (batch, references,
pixels); classes and augmentation can enter the weights; no in-place writes; works for every noise
distribution and preconditioning.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import randomness
from ogdm_jax.config import check, require, setting
from ogdm_jax.data.augment import flip, isometric
from ogdm_jax.diffusion.posterior import OnDemand, across, alone, merge, shard_mask, weighted_sums
from ogdm_jax.diffusion.posterior import class_mask as class_mask  # for masks made by hand
from ogdm_jax.methods.contract import (
    Constants,
    Context,
    Example,
    Metrics,
    Own,
    Slots,
    noise_bins,
)
from ogdm_jax.pixels import to_float
from ogdm_jax.typing import Array, PyTree

SOURCES, AUGMENT_MODES = ("stream", "cache", "gather", "full"), ("official", "matched", "dsm")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The switches of STF; the values here are the defaults of config.stf."""

    source: str = setting(
        "cache",
        "where references come from: stream (loader), cache (resident set), gather (batch), full",
        choices=SOURCES,
    )
    n: int = setting(
        1024,
        "stream, cache: references per device, the source included",
        least=1,
        expected="at least 1 reference per device",
    )
    chunk: int = setting(
        0, "references worked on at once; 0 = chosen so that temporaries stay near 10 MB", least=0
    )
    class_mask: bool = setting(True, "conditional models: only references of the same class count")
    augment: str = setting(
        "matched",
        "with labelled augmentation: official, matched or dsm (see `training`)",
        choices=AUGMENT_MODES,
    )
    bins: tuple[float, ...] = setting((0.5, 2.0, 10.0), "edges of the noise bins of the metrics")

    def __post_init__(self) -> None:
        check(self, "stf")


ACTIVE = 1.05  # a target counts as active where its effective sample size is above this


def stable_target(
    xt: Array,
    sigma: Array,
    references: Array | OnDemand,
    mask: Array | None = None,
    chunk: int | None = None,
    axis_name: str | None = None,
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
      axis_name: a mapped axis over which the references are divided: this device holds n of them.
        The queries are gathered, the references never; every device gets the targets of its own
        queries, weighed against all. A mask is then [n] (own references), [all queries, n], [own
        queries, all references], or [B, n] if all devices ask the same queries (nan if they do
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


def target(
    kind: str,
    xt: Array,
    x0: Array,
    sigma: Array,
    alpha: Array | float = 1.0,
    sigma_data: float = 0.5,
) -> Array:
    """What a network of another parametrisation should predict when its clean image should be x0
    (spec 1).

    kind    "x0": x0                        "eps": (x - alpha x0) / sigma        "score": (alpha x0
    - x) / sigma^2
            "v": (alpha x - x0) / sigma (alpha^2 + sigma^2 = 1)      "flow": (x - x0) / t, with
            sigma = t, alpha = 1 - t "F": (x0 - c_skip x) / c_out (EDM's network space, alpha = 1)

    Args:
      xt: [B, ...] = alpha * clean + sigma * noise.   x0: [B, ...], a clean image or a posterior
        mean.
      sigma: [B].   alpha: [B] or a number.   sigma_data: of EDM's preconditioning.

    Raises:
      ValueError: an unknown kind.
    """
    wide = (slice(None),) + (None,) * (xt.ndim - 1)
    sigma = jnp.broadcast_to(jnp.asarray(sigma, xt.dtype), (xt.shape[0],))[wide]
    alpha = jnp.broadcast_to(jnp.asarray(alpha, xt.dtype), (xt.shape[0],))[wide]
    if kind == "x0":
        return x0
    if kind == "eps":
        return (xt - alpha * x0) / sigma
    if kind == "score":
        return (alpha * x0 - xt) / jnp.square(sigma)
    if kind == "v":
        return (alpha * xt - x0) / sigma
    if kind == "flow":
        return (xt - x0) / sigma
    if kind == "F":
        norm = jnp.sqrt(jnp.square(sigma) + sigma_data**2)
        return (x0 - sigma_data**2 / jnp.square(norm) * xt) * norm / (sigma * sigma_data)
    raise ValueError(f"target: kind is {kind!r}; expected x0, eps, score, v, flow or F")


def _check_shapes(xt, sigma, references, chunk, source, label, reference_label) -> None:
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
            given = None if value is None else value.shape
            raise ValueError(
                f"stable_target: {name} has shape {given}; expected [{size}], with its partner "
                "given too"
            )


def training(settings: Settings, context: Context) -> Slots:
    """Fills the target slot: the clean image becomes a posterior mean, where the reference batch is

      stream: this device's images and n - b more that the loader brings (the authors' convention).
        The loader's are none of the step's batch and, on one device, different images: a set
        without as many others is refused.
      cache: each image and n - 1 independent draws from the set, which lies on the devices as
        uint8; other draws for every device and accumulation round.
      gather: the global batch; the images of other devices stay there, the queries travel.
      full: the whole set: the exact posterior mean of the data, without variance. The batch is not
        appended.

    With labelled augmentation (EDM's pipe) the exact target is E[x0 | x, augmentation]. Modes:
    "matched" flips a query back, weighs plain references and flips the target again; images with
    any other operation keep the clean image as target. "dsm" keeps it for every augmented image.
    "official" weighs references augmented at random, whatever their
    labels: a leak that the authors accept.

    In all of them the source is a reference exactly once, and exchangeable with the others: only
    then is the target without bias. (A stream batch that runs over the end of an epoch may hold an
    image twice, as two examples.)

    Raises:
      ConfigError: for stream an n too small for the batch or too large for the set; a set that is
        not in memory; "official" with a full set; class masks for label vectors.
    """
    _check(settings, context)
    source, n = settings.source, settings.n
    constants = {
        "cache": Constants(functools.partial(_resident, context)),
        "full": Constants(functools.partial(_whole_set, context), divided=True),
    }
    more = (n - context.device_batch) * context.devices if source == "stream" else 0
    return Slots(
        name="stf",
        target=functools.partial(_target, settings, context),
        constants=constants.get(source),
        references=more,
    )


def _check(settings: Settings, context: Context) -> None:
    """What the data, the batch and the devices allow."""
    source, n = settings.source, settings.n
    if source in ("cache", "full"):
        elsewhere = "stream or gather, or a larger data.memory_limit: the data set is not in memory"
        require(context.source.images is not None, "stf.source", source, elsewhere)
    if source == "stream":
        least = context.device_batch
        require(n >= least, "stf.n", n, f"at least {least} references per device")
    if source == "stream" and n > context.device_batch:
        # References of other devices may be the same images; of one device they may not, nor any of
        # the global batch.
        size, batch = len(context.source), context.batch
        most = context.device_batch + max(size - batch, 0)
        expected = (
            f"at most {most} with stream, as the set has {size} images of which a batch takes "
            f"{batch}; or stf.source cache or full"
        )
        require(n <= context.device_batch + size - batch, "stf.n", n, expected)
    leaks = context.augment is not None and settings.augment == "official"
    exact = "matched or dsm with stf.source full"
    require(not (leaks and source == "full"), "stf.augment", settings.augment, exact)
    vectors = context.label_dim > 0 and context.source.label_size > 0
    plain = "false for a source of label vectors"
    require(not (vectors and settings.class_mask), "stf.class_mask", True, plain)


def _resident(context: Context) -> dict[str, np.ndarray]:
    """The data set as it lies on every device."""
    images, labels = context.source.images, context.source.labels
    return {
        "image": images,
        "label": np.full(len(images), -1, np.int32) if labels is None else np.asarray(labels),
    }


def _whole_set(context: Context) -> dict[str, np.ndarray]:
    """The set, both ways round with unlabelled flips, filled up with rows that do not count: the
    devices divide it.
    """
    images, labels = _resident(context).values()
    if context.xflip:
        images, labels = (
            np.concatenate([images, images[:, :, ::-1]]),
            np.concatenate([labels, labels]),
        )
    more = -len(images) % context.devices
    counts = np.arange(len(images) + more) < len(images)
    fill = lambda a: np.concatenate([a, np.repeat(a[:1], more, 0)])
    return {"image": fill(images), "label": fill(labels), "counts": counts}


def _target(
    settings: Settings, context: Context, example: Example, own: Own
) -> tuple[Array, Metrics]:
    """The target slot: posterior means for the images that the mode allows, x0 for the others."""
    augment, mode = example.augment, settings.augment
    plain = augment is not None and mode != "official"
    unflip = (
        functools.partial(flip, augment=augment)
        if plain and mode == "matched"
        else lambda images: images
    )
    clean = example.image if plain else example.x0
    mean, ess = _posterior(
        settings, context, example, own.constants, unflip(example.xt), clean, plain
    )
    mean = unflip(mean)
    if plain:
        keep = isometric(augment) if mode == "matched" else jnp.all(augment == 0, axis=1)
        mean = jnp.where(keep[:, None, None, None], mean, example.x0)
        ess = jnp.where(keep, ess, 1.0)
    mean = jax.lax.stop_gradient(mean)
    return mean, _metrics(settings.bins, example, mean, ess)


def _posterior(
    settings: Settings,
    context: Context,
    example: Example,
    constants: PyTree,
    xt: Array,
    clean: Array,
    plain: bool,
) -> tuple[Array, Array]:
    """Target and effective sample size [b] for queries xt whose sources are `clean`, by the kind of
    reference batch.
    """
    kind, chunk = settings.source, settings.chunk or None
    label = example.label if settings.class_mask else None
    if kind == "gather":
        return stable_target(
            xt, example.sigma, clean, None, chunk, context.axis, label=label, reference_label=label
        )
    if kind == "full":
        return _over_devices(context, chunk, xt, example.sigma, label, constants)

    # Where arrays are global (a mesh), each device's images still meet references of their own, as
    # under pmap.
    batch = xt.shape[0]
    groups = (
        batch // context.device_batch
        if context.axis is None and batch % context.device_batch == 0
        else 1
    )
    given, reference_label = _references(settings, context, example, constants, groups, plain)

    def of_group(xt, sigma, clean, label, given, reference_label):
        b, more = clean.shape[0], next(iter(given.values())).shape[0]
        known = {"label": label, "reference_label": reference_label}
        if kind == "cache":
            if more == 0:
                return clean, jnp.ones_like(sigma)
            references = OnDemand((more, *clean.shape[1:]), lambda k: _images(constants, given, k))
            return stable_target(xt, sigma, references, None, chunk, source=clean, **known)

        def make(k: Array) -> Array:
            loaded = to_float(_images(constants, given, jnp.maximum(k - b, 0)), clean.dtype)
            return jnp.where((k < b)[:, None, None, None], clean[jnp.minimum(k, b - 1)], loaded)

        # The authors' convention: all images of the device are references.
        references = OnDemand((b + more, *clean.shape[1:]), make) if more else clean
        if label is not None:
            known["reference_label"] = jnp.concatenate([label, reference_label])
        return stable_target(xt, sigma, references, None, chunk, **known)

    split = lambda a: a.reshape(groups, batch // groups, *a.shape[1:])
    parts = jax.tree.map(split, (xt, example.sigma, clean, label))
    if groups == 1:
        first = jax.tree.map(lambda a: a[0], (*parts, given, reference_label))
        return of_group(*first)
    mean, ess = jax.vmap(of_group)(*parts, given, reference_label)
    return mean.reshape(xt.shape), ess.reshape(batch)


def _over_devices(context, chunk, xt, sigma, label, rows) -> tuple[Array, Array]:
    """The target against a set of which every device holds its rows: queries travel, references
    never.
    """

    def target(xt, sigma, label, rows, axis):
        reference_label = None if label is None else rows["label"]
        known = {"label": label, "reference_label": reference_label}
        return stable_target(xt, sigma, rows["image"], rows["counts"], chunk, axis, **known)

    if context.mesh is None:
        return target(xt, sigma, label, rows, context.axis)
    (axis,) = context.mesh.axis_names
    spec = jax.sharding.PartitionSpec(axis)
    mapped = functools.partial(target, axis=axis)
    mapped = jax.shard_map(
        mapped, mesh=context.mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return mapped(xt, sigma, label, rows)


def _references(
    settings: Settings,
    context: Context,
    example: Example,
    constants: PyTree,
    groups: int,
    plain: bool,
) -> tuple[dict[str, Array], Array | None]:
    """What `_images` makes the references besides the sources from, and their labels [groups, m]
    for class masks.

    Rows of the set, or the loader's uint8 images, and which are mirrored: [groups, m, ...]. Float
    images (50 MB for 4,096 of 32x32x3) only where the augmentation acts on them.
    """
    # A group is known by its first example: another one on every device and in every round, the
    # same on every plan.
    keys = randomness.example_keys(example.key, "stf", example.index.reshape(groups, -1)[:, 0])
    if settings.source == "cache":
        draw = lambda k: jax.random.randint(k, (settings.n - 1,), 0, constants["image"].shape[0])
        given = {"rows": jax.vmap(draw)(randomness.fold_in_each(keys, "rows"))}
        labels = jnp.asarray(constants["label"])[given["rows"]]
    else:
        nothing = jnp.zeros((0, *context.image_shape), jnp.uint8), jnp.zeros((0,), jnp.int32)
        loaded = example.references or dict(zip(("reference", "reference_label"), nothing))
        split = lambda a: a.reshape(groups, a.shape[0] // groups, *a.shape[1:])
        given, labels = {"image": split(loaded["reference"])}, split(loaded["reference_label"])
    if example.label is None or not settings.class_mask:
        labels = None
    count = jnp.arange(next(iter(given.values())).shape[1])
    each = lambda purpose: jax.vmap(lambda k: randomness.example_keys(k, purpose, count))(keys)
    if context.xflip:
        given["mirrored"] = jax.vmap(randomness.uniform)(each("xflip")) < 0.5
    if example.augment is not None and not plain:
        images = jax.vmap(lambda given: to_float(_images(constants, given, count), jnp.float32))(
            given
        )
        given = {"image": jax.vmap(context.augment)(each("augment"), images)}
    return given, labels


def _images(constants: PyTree, given: dict[str, Array], k: Array) -> Array:
    """Images k [i] -> [i,h,w,c] of one group's references: from the set or the loader, mirrored
    where drawn.
    """
    images = (
        jnp.asarray(constants["image"])[given["rows"][k]] if "rows" in given else given["image"][k]
    )
    if "mirrored" in given:
        images = jnp.where(given["mirrored"][k][:, None, None, None], images[:, :, ::-1], images)
    return images


def _metrics(bins, example: Example, mean: Array, ess: Array) -> Metrics:
    """Per noise bin: effective sample size, share of active targets, and |target - x0| (over all
    pixels).
    """
    moved = jnp.sqrt(jnp.sum(jnp.square(mean - example.x0), axis=(1, 2, 3)))
    values = {"stf/ess": ess, "stf/active": (ess > ACTIVE).astype(ess.dtype), "stf/moved": moved}
    return noise_bins(values, example.sigma, bins)
