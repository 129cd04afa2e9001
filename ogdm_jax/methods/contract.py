"""The three training slots, and how methods fill them.

A training step minimises, per example,

    L_i = distance(x0_hat_i, target_i) + sum_m penalty_m,i

`target` says what x0_hat should equal (default: the clean image), `distance` how far it is
(default: the noise law's weight times the squared error, summed over pixels), `penalties` what is
added. A method is one file of this folder that exports DEFAULTS (its settings with their default
values) and `training(settings, context) -> Slots`. Files are found by name, so that a new method is
one new file.

A sampling method gives a `sampling.guidance.Guidance`: its file exports Settings, PRESETS,
`guidance(...)` and, for the command line, `build(settings, session)`.

Losses are numbers per example [b]; the mean over examples, rounds and devices happens once, in
training/step.py. Metrics are dicts name -> [b] values, or name -> (values [b], weights [b]) for a
weighted mean (a noise bin, say).
"""

import dataclasses
import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import struct

from ogdm_jax import methods, randomness
from ogdm_jax.config import Config, ConfigError, suggestion
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.typing import Array, PyTree

Metrics = dict[str, Any]


@struct.dataclass
class Example:
    """What one (micro-)batch of the step consists of: everything a slot may look at.

    Attributes:
      x0: [b,h,w,c] clean images in [-1, 1], augmented if augmentation is on.
      image: [b,h,w,c] the same images before augmentation.
      label: [b] int32, -1 = no class (after label dropout), or None for an unconditional model.
      augment: [b,9] augmentation labels, or None.
      sigma: [b] noise levels.   eps: [b,h,w,c] standard normal noise.   xt: [b,h,w,c] = x0 + sigma
        * eps.
      index: [b] int32 global index of each example in the step's batch.
      key: the step's key for draws made once per step.   noise_key: the key of this example's
        noise.
      references: {"reference": uint8 [n,h,w,c], "reference_label": [n]}, this device's share of the
        reference batch of a method that asked for one; else None.
      eps_hat: [b,h,w,c] the noise that the denoiser predicts, (xt - x0_hat) / sigma without that
        form's cancellation at small sigma. A constant: no gradient goes through it. None for
        companions.
    """

    x0: Array
    image: Array
    label: Array | None
    augment: Array | None
    sigma: Array
    eps: Array
    xt: Array
    index: Array
    key: Array
    noise_key: Array
    references: PyTree | None = None
    eps_hat: Array | None = None

    def keys(self, purpose: str) -> Array:
        """[b] keys of a named purpose: the same whatever other methods are on and however many
        devices there are.
        """
        return randomness.example_keys(self.key, purpose, self.index)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method may know when the step is built: settings and pure functions, never parameters.

    Attributes:
      image_shape: (h, w, c).   label_dim: number of classes, 0 if unconditional.
      batch: images per optimiser step over all devices.   device_batch: images per device and
        accumulation round.
      devices: number of devices.   axis: name of the mapped axis inside the step, or None.
      sigma_data: standard deviation of the data in [-1, 1].   sigma_min, sigma_max: range of noise
        levels, within both the sampler's and those that the denoiser is made for.
      weight: sigma [b] -> lambda(sigma) [b], the noise law's loss weight.
      denoiser: (params, buffers, augment=None, dropout_keys=None) -> Denoiser, the model as a pure
        function of its parameters (models.Model.denoiser).
      learning_rate: learning rate of the denoiser (a companion's default).
      source: the opened data source (ogdm_jax.data), for methods that keep it on the devices.
      law: the noise law (diffusion/noise.py), for methods that draw a second noise level; never
        stratified.
      weights: (training folder, "ema" | "params", step) -> (params, buffers, step) of its
        checkpoint of that step (of the newest for None), as host arrays; the folder "" is the one
        that the run is fine-tuned from.
      xflip: whether images are mirrored at random without a label.
      augment: (keys [m], images [m,h,w,c]) -> images, the labelled augmentation without its labels;
        None if off.
      dtype: compute type of the run's networks (config.network.dtype); None: that of their inputs.
      mesh: the devices, where arrays inside the step are global (axis is None): for collectives of
        a method's own.
    """

    image_shape: tuple[int, int, int]
    label_dim: int
    batch: int
    device_batch: int
    devices: int
    axis: str | None
    sigma_data: float
    sigma_min: float
    sigma_max: float
    weight: Callable[[Array], Array]
    denoiser: Callable[..., Denoiser]
    learning_rate: float
    source: Any = None
    law: Any = None
    weights: Callable[[str, str, int | None], tuple[PyTree, PyTree, int]] | None = None
    xflip: bool = False
    augment: Callable[[Array, Array], Array] | None = None
    mesh: jax.sharding.Mesh | None = None
    dtype: Any = None


@dataclasses.dataclass(frozen=True)
class Companion:
    """A network trained beside the main one, after it, on its own loss (OGDM's discriminator).

    Attributes:
      init: key -> params.
      loss: (params, example, denoiser, frozen, step) -> ([b] loss, metrics); denoiser as in
        `Slots`, of the already updated main network, and no gradient goes to it.
      learning_rate, betas: of its Adam.
      resample: "all" draws new noise levels, noise and augmentation for its example; "noise" only
        new noise.
    """

    init: Callable[[Array], PyTree]
    loss: Callable[..., tuple[Array, Metrics]]
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    resample: str = "all"


@dataclasses.dataclass(frozen=True)
class Slots:
    """What one method fills; None leaves a slot to others.

    Slots receive the denoiser of the current parameters as denoiser(purpose, augment=True) ->
    Denoiser: that of this example, with dropout keys of its own by the name of a purpose, and with
    the example's augmentation labels unless augment is False.

    Attributes:
      name: the method's name.
      target: (example, frozen) -> (target like x0, metrics).
      distance: (example, x0_hat, target, denoiser, frozen, memory) -> ([b], metrics).
      penalty: (example, x0_hat, denoiser, companion_params, frozen, memory) -> ([b], metrics).
      companion: a network trained beside the main one.
      references: images per step, over all devices, that the loader has to bring besides the batch
        (0 = none).
      frozen: () -> pytree of arrays that the step receives as an argument (a teacher, a resident
        data set).
      divided: () -> dict of arrays of rows, received in place of `frozen`; every device holds its
        share of the rows, whose number is a multiple of context.devices.
      memory: () -> pytree of small numbers that the state carries.
      remember: (memory, metrics) -> memory, once a step, from the averaged metrics.
      verify: (memory, frozen) -> None, after a restore: raises ValueError if the frozen arrays are
        not those of before.
    """

    name: str
    target: Callable[..., tuple[Array, Metrics]] | None = None
    distance: Callable[..., tuple[Array, Metrics]] | None = None
    penalty: Callable[..., tuple[Array, Metrics]] | None = None
    companion: Companion | None = None
    references: int = 0
    frozen: Callable[[], PyTree] | None = None
    divided: Callable[[], dict[str, Any]] | None = None
    memory: Callable[[], PyTree] | None = None
    remember: Callable[[PyTree, Mapping[str, Array]], PyTree] | None = None
    verify: Callable[[PyTree, PyTree], None] | None = None


def module(name: str):
    """The module of a method. Raises ValueError with the known names if there is none."""
    if name not in names():
        known = training_names()
        raise ConfigError(
            f"config.methods: unknown method {name!r}{suggestion(name, known)}; expected some of "
            f"{', '.join(known)}"
        )
    return importlib.import_module(f"{methods.__name__}.{name}")


def names() -> list[str]:
    """Every method file of the folder, training or sampling."""
    return sorted(m.name for m in pkgutil.iter_modules(methods.__path__) if m.name != "slots")


def training_names() -> list[str]:
    """Methods that fill a training slot."""
    return [
        n
        for n in names()
        if hasattr(importlib.import_module(f"{methods.__name__}.{n}"), "training")
    ]


def settings_types() -> dict[str, type]:
    """{training method: the dataclass of its settings}."""
    return {name: module(name).Settings for name in training_names()}


def defaults() -> dict[str, dict[str, Any]]:
    """The settings of every training method, by name: the groups of the base configuration."""
    return {name: dataclasses.asdict(kind()) for name, kind in settings_types().items()}


def check_settings(config: Config) -> None:
    """Raises ConfigError for an unknown method, or a setting of any method that is out of range."""
    for name in config.methods:
        module(name)
    for name, kind in settings_types().items():
        config.settings(name, kind)


@dataclasses.dataclass(frozen=True)
class Filled:
    """The slots of a step, each with its owner."""

    methods: tuple[Slots, ...]
    target: Slots | None
    distance: Slots | None
    penalties: tuple[Slots, ...]
    companions: tuple[Slots, ...]

    @property
    def references(self) -> int:
        return max((m.references for m in self.methods), default=0)


def combine(filled: Sequence[Slots]) -> Filled:
    """Joins methods into one step. Raises ValueError naming both owners where two claim one single
    slot.
    """
    owners = {}
    for slot in ("target", "distance"):
        claims = [m for m in filled if getattr(m, slot) is not None]
        if len(claims) > 1:
            raise ValueError(
                f"config.methods: {claims[0].name} and {claims[1].name} both fill the {slot} slot; "
                "choose one of them"
            )
        owners[slot] = claims[0] if claims else None
    return Filled(
        methods=tuple(filled),
        target=owners["target"],
        distance=owners["distance"],
        penalties=tuple(m for m in filled if m.penalty is not None),
        companions=tuple(m for m in filled if m.companion is not None),
    )


def per_method(filled: Filled, attribute: str) -> dict[str, PyTree]:
    """{method: attribute()} of those methods that define it: the frozen trees, the memories."""
    return {
        m.name: getattr(m, attribute)() for m in filled.methods if getattr(m, attribute) is not None
    }


def frozen_trees(filled: Filled) -> dict[str, dict[str, PyTree]]:
    """The step's frozen argument on the host: {"whole": by method, "divided": by method}."""
    return {"whole": per_method(filled, "frozen"), "divided": per_method(filled, "divided")}


def noise_bins(values: Mapping[str, Array], sigma: Array, edges: Sequence[float]) -> Metrics:
    """Metrics "name/low-high" of values [b] by name: their means over the examples with low < sigma
    <= high.

    Args:
      edges: between the bins; the first bin begins at 0 and the last one is open.
    """
    metrics: Metrics = {}
    for low, high in itertools.pairwise((0.0, *edges, math.inf)):
        inside = ((sigma > low) & (sigma <= high)).astype(sigma.dtype)
        metrics |= {f"{name}/{low:g}-{high:g}": (value, inside) for name, value in values.items()}
    return metrics


def squared_error(
    example: Example, x0_hat: Array, target: Array, weight: Callable[[Array], Array]
) -> Array:
    """The default distance: lambda(sigma) * |x0_hat - target|^2 summed over pixels [b] (2206.00364,
    eq. 2 and 8).
    """
    squared = jax.numpy.sum(jax.numpy.square(x0_hat - target), axis=(1, 2, 3))
    return weight(example.sigma) * squared
