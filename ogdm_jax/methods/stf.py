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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import randomness
from ogdm_jax.config import Group, choose, require, setting
from ogdm_jax.data import moments
from ogdm_jax.data.augment import flip, isometric
from ogdm_jax.diffusion.posterior import OnDemand, stable_target
from ogdm_jax.diffusion.posterior import class_mask as class_mask  # for masks made by hand
from ogdm_jax.methods import stf_classes
from ogdm_jax.methods.contract import Constants, Context, Example, Metrics, Own, Slots, noise_bins
from ogdm_jax.pixels import to_float
from ogdm_jax.typing import Array, AxisName, PyTree

SOURCES = ("stream", "cache", "gather", "full", "class")
AUGMENT_MODES = ("official", "matched", "dsm")
# the authors' code: 1,024 references for the 128 images of a device, whatever their labels
PRESETS: dict[str, dict[str, Any]] = {
    "official": {"source": "stream", "per_image": 8, "augment": "official", "class_mask": False}
}


@dataclasses.dataclass(frozen=True)
class Settings(Group):
    """The switches of STF; the values here are the defaults of config.stf."""

    GROUP = "stf"
    source: str = setting(
        "cache",
        "where references come from: stream (loader), cache (resident set), gather (batch), full, "
        "class (draws from each image's own class)",
        choices=SOURCES,
    )
    n: int = setting(
        1024,
        "stream, cache: references per device, the source included; class: per image",
        least=1,
        expected="at least 1 reference per device",
        only="source=stream|cache|class",
    )
    per_image: int = setting(
        0,
        "stream, cache: n is so many times the images of a device (the authors': 8); 0 = n",
        least=0,
        only="source=stream|cache",
    )
    bank: str = setting(
        "resident",
        "class: the set lies on every device (resident), divided among them (divided), or is read "
        "by the loader (read)",
        choices=stf_classes.BANKS,
        only="source=class",
    )
    chunk: int = setting(
        0, "references worked on at once; 0 = chosen so that temporaries stay near 10 MB", least=0
    )
    class_mask: bool = setting(
        True, "conditional models: only references of the same class count", only="data.conditional"
    )
    augment: str = setting(
        "matched",
        "with labelled augmentation: official, matched or dsm (see `training`)",
        choices=AUGMENT_MODES,
        only="data.augment",
    )
    bins: tuple[float, ...] = setting(
        (0.5, 2.0, 10.0), "edges of the noise bins of the metrics", above=0, rising=True
    )

    def _check_together(self) -> None:
        both = self.per_image and self.n != type(self).n
        require(not both, "stf.n", self.n, f"none with stf.per_image={self.per_image}")


def preset(name: str) -> dict[str, Any]:
    """All settings of the authors' code, "official" (for config.stf.update).

    Raises:
      ValueError: another name.
    """
    return dataclasses.asdict(Settings(**choose("stf.preset", name, PRESETS)))


ACTIVE = 1.05  # a target counts as active where its effective sample size is above this


def training(settings: Settings, context: Context) -> Slots:
    """Fills the target slot: the clean image becomes a posterior mean over a reference batch.

    Its sources:

      stream: this device's images and n - b more that the loader brings (the authors' convention).
        The loader's are none of the step's batch and, on one device, different images: a set
        without as many others is refused.
      cache: each image and n - 1 independent draws from the set, which lies on the devices as
        uint8; other draws for every device and accumulation round.
      gather: the global batch; the images of other devices stay there, the queries travel.
      full: the whole set: the exact posterior mean of the data, without variance. The batch is not
        appended.
      class: each image and n - 1 draws from its own class, for itself alone
        (methods/stf_classes.py): as many references with a thousand classes as with one.

    With labelled augmentation (EDM's pipe) the exact target is E[x0 | x, augmentation]. Modes:
    "matched" flips a query back, weighs plain references and flips the target again; images with
    any other operation keep the clean image as target. "dsm" keeps it for every augmented image.
    "official" weighs references augmented at random, whatever their
    labels: a leak that the authors accept.

    With classes, a reference has the class of its query. A class that label dropout hides is of the
    whole set; images that have none are of a class of their own. Where the set has such images (or
    does not say before they are read) and labels are hidden, too, an image without label keeps the
    clean image: the two kinds are not equally frequent among those that a model sees without one.

    In all of them the source is a reference exactly once, and exchangeable with the others: only
    then is the target without bias. (A stream batch that runs over the end of an epoch may hold an
    image twice, as two examples.)

    Raises:
      ConfigError: for stream an n too small for the batch or too large for the set; a set that is
        not in memory; "official" with a full set or classes; classes that nobody knows; class masks
        for label vectors.
    """
    if settings.per_image:
        n = settings.per_image * context.device_batch
        settings = dataclasses.replace(settings, n=n, per_image=0)
    _check(settings, context)
    source, n = settings.source, settings.n
    divided, read = settings.bank == "divided", source == "class" and settings.bank == "read"
    constants = {
        "cache": Constants(functools.partial(_resident, context)),
        "full": Constants(functools.partial(_whole_set, context), divided=True),
        "class": Constants(functools.partial(stf_classes.bank, context, divided), divided=divided),
    }
    more = (n - context.device_batch) * context.devices if source == "stream" else 0
    return Slots(
        name="stf",
        target=functools.partial(_target, settings, context),
        constants=None if read else constants.get(source),
        references=more,
        mates=n - 1 if read else 0,
    )


def _check(settings: Settings, context: Context) -> None:
    """What the data, the batch and the devices allow."""
    source, n = settings.source, settings.n
    others = "none of stf for a model of texts: its posterior mean is over images of all captions"
    require(not context.text, "methods", "stf", others)
    if source == "class":
        _check_classes(settings, context)
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
    exact = f"matched or dsm with stf.source {source}"
    require(not (leaks and source in ("full", "class")), "stf.augment", settings.augment, exact)
    vectors = context.label_dim > 0 and context.source.label_size > 0
    plain = "false for a source of label vectors"
    require(not (vectors and settings.class_mask), "stf.class_mask", True, plain)


def _check_classes(settings: Settings, context: Context) -> None:
    """What draws by class need: classes known ahead, and a set that is where it should be."""
    set_, known = context.source, "a source whose labels are known before its images are read"
    classes = "another one for an unconditional model (data.conditional=true makes it conditional)"
    require(context.label_dim > 0, "stf.source", "class", classes)
    require(settings.class_mask, "stf.class_mask", False, "true with stf.source class")
    require(set_.labels is not None and not set_.label_size, "stf.source", "class", known)
    there = set_.images is not None or settings.bank == "read"
    memory = "read, or a larger data.memory_limit: the data set is not in memory"
    require(there, "stf.bank", settings.bank, memory)


def _resident(context: Context) -> dict[str, np.ndarray]:
    """The data set as it lies on every device."""
    images, labels = stf_classes.flat(context.source.images), context.source.labels
    none = np.full(len(images), -1, np.int32)
    return {"image": images, "label": none if labels is None else np.asarray(labels)}


def _whole_set(context: Context) -> dict[str, np.ndarray]:
    """The set, both ways round with unlabelled flips (of latents, both views), filled up with rows
    that do not count: the devices divide it.
    """
    images, labels = np.asarray(context.source.images), _resident(context)["label"]
    row = np.arange(len(images), dtype=np.int32)
    latents = context.source.latents is not None
    plain, mirrored = (images[:, :1], images[:, 1:]) if latents else (images, images[:, :, ::-1])
    images = stf_classes.flat(np.concatenate([plain, mirrored]) if context.xflip else plain)
    if context.xflip:
        labels, row = np.concatenate([labels, labels]), np.concatenate([row, row])
    more = -len(images) % context.devices
    counts = np.arange(len(images) + more) < len(images)
    fill = lambda a: np.concatenate([a, np.repeat(a[:1], more, 0)])
    return {"image": fill(images), "label": fill(labels), "row": fill(row), "counts": counts}


def _target(
    settings: Settings, context: Context, example: Example, own: Own
) -> tuple[Array, Metrics]:
    """The target slot: posterior means for the images that the mode allows, x0 for the others."""
    augment, mode = example.augment, settings.augment
    plain = augment is not None and mode != "official"
    unflip = _unflip(augment if plain and mode == "matched" else None)
    clean = example.image if plain else example.x0
    mean, ess = _posterior(
        settings, context, example, own.constants, unflip(example.xt), clean, plain
    )
    mean = unflip(mean)
    kept = []
    if plain and augment is not None:
        kept += [isometric(augment) if mode == "matched" else jnp.all(augment == 0, axis=1)]
    if example.label is not None and settings.class_mask and stf_classes.has_unlabelled(context):
        kept += [example.label >= 0] if context.label_dropout > 0 else []
    for keep in kept:
        mean = jnp.where(keep[:, None, None, None], mean, example.x0)
        ess = jnp.where(keep, ess, 1.0)
    mean = jax.lax.stop_gradient(mean)
    return mean, _metrics(settings.bins, example, mean, ess)


def _unflip(augment: Array | None) -> Callable[[Array], Array]:
    """Images -> images with the flips of augmentation labels undone (done again, which is the
    same); as they are without labels.
    """
    return lambda images: images if augment is None else flip(images, augment)


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
    label = None
    if settings.class_mask and example.label is not None:
        label = stf_classes.compared(context, example.label)
    if kind == "gather":
        return stable_target(
            xt, example.sigma, clean, None, chunk, context.axis, label=label, reference_label=label
        )
    if kind == "full":
        against = functools.partial(_against_rows, chunk, context, example.key)
        return stf_classes.over_devices(context, against, constants, xt, example.sigma, label)
    if kind == "class":
        where, n, take = settings.bank, settings.n, functools.partial(_images, context)
        return stf_classes.targets(where, n, chunk, context, example, constants, xt, clean, take)

    # Where arrays are global (a mesh), each device's images still meet references of their own, as
    # under pmap.
    batch = xt.shape[0]
    together = context.axis is None and batch % context.device_batch == 0
    groups = batch // context.device_batch if together else 1
    made_of, reference_label = _references(settings, context, example, constants, groups, plain)
    split = lambda a: a.reshape(groups, batch // groups, *a.shape[1:])
    queries = jax.tree.map(split, _Group(xt, example.sigma, clean, label, {}, None))
    all_groups = queries._replace(made_of=made_of, reference_label=reference_label)
    target = functools.partial(_target_of_group, settings, context, constants)
    if groups == 1:
        return target(jax.tree.map(lambda a: a[0], all_groups))
    mean, ess = jax.vmap(target)(all_groups)
    return mean.reshape(xt.shape), ess.reshape(batch)


class _Group(NamedTuple):
    """The queries of one device and round, and the references that they alone meet.

    Attributes:
      xt: [b,h,w,c].
      sigma: [b].
      clean: [b,h,w,c] the queries' sources.
      label: [b] classes, or None where they do not count.
      made_of: what `_images` makes the other references from.
      reference_label: [m] their classes, or None.
    """

    xt: Array
    sigma: Array
    clean: Array
    label: Array | None
    made_of: dict[str, Array]
    reference_label: Array | None


def _target_of_group(
    settings: Settings, context: Context, constants: PyTree, group: _Group
) -> tuple[Array, Array]:
    """Targets and effective sample sizes of one group of queries, for stream and cache."""
    clean, label, labels, made_of = group.clean, group.label, group.reference_label, group.made_of
    weigh = functools.partial(
        stable_target, group.xt, group.sigma, chunk=settings.chunk or None, label=label
    )
    b, more = clean.shape[0], next(iter(made_of.values())).shape[0]
    if settings.source == "cache":
        if more == 0:
            return clean, jnp.ones_like(group.sigma)
        drawn = OnDemand(
            (more, *clean.shape[1:]), lambda k: _images(context, constants, made_of, k)
        )
        return weigh(drawn, source=clean, reference_label=labels)

    def make(k: Array) -> Array:
        loaded = _images(context, constants, made_of, jnp.maximum(k - b, 0))
        loaded = to_float(loaded, clean.dtype)
        return jnp.where((k < b)[:, None, None, None], clean[jnp.minimum(k, b - 1)], loaded)

    # The authors' convention: all images of the device are references.
    references = OnDemand((b + more, *clean.shape[1:]), make) if more else clean
    if label is not None and labels is not None:
        labels = jnp.concatenate([label, labels])
    return weigh(references, reference_label=labels)


def _against_rows(
    chunk: int | None,
    context: Context,
    key: Array,
    rows: dict[str, Array],
    xt: Array,
    sigma: Array,
    label: Array | None,
    *,
    axis: AxisName | None,
) -> tuple[Array, Array]:
    """The target against a set of which every device holds its rows: queries travel, references
    never. Latents are the samples of this step, that of a query's own row among them.
    """
    references, latents = rows["image"], context.source.latents
    labels = None if label is None else stf_classes.compared(context, rows["label"])
    flat = xt.reshape(xt.shape[0], -1)
    if latents is not None:
        keys = randomness.example_keys(key, "latent", rows["row"])
        one_view = (-1, 1, *context.source.item_shape[1:])
        sampled = lambda k: moments.draw(latents, rows["image"][k].reshape(one_view), keys[k])
        references = OnDemand((references.shape[0], flat.shape[1]), sampled)
    mean, ess = stable_target(
        flat, sigma, references, rows["counts"], chunk, axis, label=label, reference_label=labels
    )
    return mean.reshape(xt.shape), ess


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
        made_of = {"rows": jax.vmap(draw)(randomness.fold_in_each(keys, "rows"))}
        labels = jnp.asarray(constants["label"])[made_of["rows"]]
    else:
        nothing = jnp.zeros((0, *context.image_shape), jnp.uint8), jnp.zeros((0,), jnp.int32)
        loaded = example.references or dict(zip(("reference", "reference_label"), nothing))
        split = lambda a: a.reshape(groups, a.shape[0] // groups, *a.shape[1:])
        made_of, labels = {"image": split(loaded["reference"])}, split(loaded["reference_label"])
    if context.source.latents is not None:
        bits = lambda k: jax.random.bits(k, (next(iter(made_of.values())).shape[1],))
        made_of["seed"] = jax.vmap(bits)(randomness.fold_in_each(keys, "latent"))
    given = settings.class_mask and example.label is not None
    labels = stf_classes.compared(context, labels) if given else None
    count = jnp.arange(next(iter(made_of.values())).shape[1])
    each = lambda purpose: jax.vmap(lambda k: randomness.example_keys(k, purpose, count))(keys)
    if context.xflip:
        made_of["mirrored"] = jax.vmap(randomness.uniform)(each("xflip")) < 0.5
    if example.augment is not None and context.augment is not None and not plain:
        take = lambda made_of: _images(context, constants, made_of, count)
        images = jax.vmap(lambda made_of: to_float(take(made_of), jnp.float32))(made_of)
        made_of = {"image": jax.vmap(context.augment)(each("augment"), images)}
    return made_of, labels


def _images(context: Context, constants: PyTree, made_of: dict[str, Array], k: Array) -> Array:
    """Images k [i] -> [i,h,w,c] of one group's references: from the set or the loader, mirrored
    where drawn; of latents fresh samples.
    """
    if "rows" in made_of:
        images = stf_classes.drawn(context, constants["image"], made_of["rows"][k])
    else:
        images = made_of["image"][k]
    mirrored = made_of["mirrored"][k] if "mirrored" in made_of else None
    if context.source.latents is not None:
        keys = jax.vmap(jax.random.key)(made_of["seed"][k])
        return moments.draw(context.source.latents, images, keys, mirrored)
    if mirrored is not None:
        images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return images


def _metrics(bins: tuple[float, ...], example: Example, mean: Array, ess: Array) -> Metrics:
    """Per noise bin: effective sample size, share of active targets, and |target - x0| (over all
    pixels).
    """
    moved = jnp.sqrt(jnp.sum(jnp.square(mean - example.x0), axis=(1, 2, 3)))
    values = {"stf/ess": ess, "stf/active": (ess > ACTIVE).astype(ess.dtype), "stf/moved": moved}
    return noise_bins(values, example.sigma, bins)
