"""What a training method is: the slots of the loss that it fills, and what it owns.

A training step minimises, per example,

    L_i = distance(x0_hat_i, target_i) + sum_m penalty_m,i

`target` says what x0_hat should equal (default: the clean image), `distance` how far it is
(default: the noise distribution's weight times the squared error, summed over pixels), `penalty`
what is added. What a method needs beyond them is of two kinds: `Constants`, arrays that never
change (a frozen network, a resident data set), and a `Carry`, which the method makes, keeps from
step to step and updates itself (a second network with its optimiser, running numbers), as an optax
transformation owns its state. The step knows no method: it hands each one its own constants and
carry.

A method is one file that exports `Settings` (a frozen dataclass) and `training(settings, context)
-> Slots`; methods/discovery.py finds it. A sampling method gives a `sampling.guidance.Guidance`.

Losses are numbers per example [b]; the mean over examples, rounds and devices is taken once, in
training/. Metrics of slots are dicts name -> [b] values, or name -> (values [b], weights [b]) for a
weighted mean (a noise bin, say).
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import struct

from ogdm_jax import randomness
from ogdm_jax.brief import brief
from ogdm_jax.config import ConfigError
from ogdm_jax.data import Source
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.noise import NoiseDistribution
from ogdm_jax.typing import Array, PyTree

Metrics = dict[str, Any]


@struct.dataclass
class Example:
    """What one (micro-)batch of the step consists of: everything a slot may look at.

    Attributes:
      x0: [b,h,w,c] clean images in [-1, 1], augmented if augmentation is on.
      image: [b,h,w,c] the same images before augmentation.
      label: [b] int32, -1 = no class (after label dropout), or None for an unconditional model; of
        a model of texts {"prompt": [b,M,D]}, the encoded captions.
      augment: [b,9] augmentation labels, or None.
      sigma: [b] noise levels.
      eps: [b,h,w,c] standard normal noise.
      xt: [b,h,w,c] = x0 + sigma * eps.
      index: [b] int32 global index of each example in the step's batch.
      key: the step's key for draws made once per step.
      noise_key: the key of this example's noise.
      references: {"reference": uint8 [n,h,w,c], "reference_label": [n]}, this device's share of the
        reference batch of a method that asked for one; else None.
      mates: uint8 [b,m,h,w,c], images of each example's own class, of a method that asked for them;
        else None.
      eps_hat: [b,h,w,c] the noise that the denoiser predicts, (xt - x0_hat) / sigma without that
        form's cancellation at small sigma. A constant: no gradient goes through it. None while a
        carry is updated.
    """

    x0: Array
    image: Array
    label: PyTree
    augment: Array | None
    sigma: Array
    eps: Array
    xt: Array
    index: Array
    key: Array
    noise_key: Array
    references: PyTree | None = None
    mates: Array | None = None
    eps_hat: Array | None = None

    def keys(self, purpose: str) -> Array:
        """[b] keys of a named purpose: the same whatever other methods are on and however many
        devices there are.
        """
        return randomness.example_keys(self.key, purpose, self.index)


@struct.dataclass
class Own:
    """A method's own part of the step's arguments; None where it declared none.

    Attributes:
      constants: what its `Constants.make` returned, on the devices.
      carry: what its `Carry` holds now. No gradient has to be stopped: only the denoiser's
        parameters are differentiated.
    """

    constants: PyTree = None
    carry: PyTree = None


class DenoiserOf(Protocol):
    """The denoiser of an example, by the name of a purpose: each purpose has dropout of its own.

    augment: with the example's augmentation labels, or as if it had none.
    """

    def __call__(self, purpose: str, augment: bool = True) -> Denoiser:
        """See above."""
        ...


Target = Callable[[Example, Own], tuple[Array, Metrics]]
Distance = Callable[[Example, Array, Array, DenoiserOf, Own], tuple[Array, Metrics]]
Penalty = Callable[[Example, Array, DenoiserOf, Own], tuple[Array, Metrics]]
OwnLoss = Callable[[PyTree, Example, DenoiserOf], tuple[Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Constants:
    """Arrays that the step receives as an argument and never changes.

    Attributes:
      make: () -> pytree of host arrays; every process makes the same.
      divided: every device holds its share of the rows of each array, whose number is a multiple of
        context.devices; else every device holds all of it.
      weights: they are a network's, which the plan "sharded" divides as it does the state; the
        method sees all of them.
    """

    make: Callable[[], PyTree]
    divided: bool = False
    weights: bool = False

    @property
    def place(self) -> str:
        """One of PLACES."""
        return "weights" if self.weights else "divided" if self.divided else "whole"


PLACES = ("whole", "divided", "weights")


# Trains a method's own network on the step's batch: (loss, params, key, noise_key) -> (gradient,
# metrics) of the mean loss.
#   loss: (params, example, denoiser) -> ([b], metrics); the denoiser is the one that the step has
#     just updated, and no gradient goes to it.
#   params: what is differentiated.
#   key, noise_key: of the example's draws, and of its noise; with `Update.key` for both they are
#     those that the denoiser was trained on.
# The gradient is that of all rounds and devices, with what is not finite replaced; metrics are
# means, with "grad_nonfinite", the number of replaced entries.
Gradient = Callable[[OwnLoss, PyTree, Array, Array], tuple[PyTree, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Update:
    """What a carry is updated with, once per step and after the denoiser's own update.

    Attributes:
      step: scalar int32, the optimiser steps done before this one.
      key: the key of this step.
      metrics: the means of what the slots reported in this step.
      constants: the method's own.
      gradient: for a network in the carry.
    """

    step: Array
    key: Array
    metrics: Mapping[str, Array]
    constants: PyTree
    gradient: Gradient


@dataclasses.dataclass(frozen=True)
class Carry:
    """What a method keeps from step to step; checkpoints hold it.

    Attributes:
      init: key -> pytree of arrays. The key is that of the whole run: fold a name of your own in.
      update: (carry, Update) -> (carry, metrics), metrics being scalars.
      check: (carry, constants) -> None, when a run begins or goes on: raises ValueError if the
        constants are not those that it began with.
    """

    init: Callable[[Array], PyTree]
    update: Callable[[PyTree, Update], tuple[PyTree, Mapping[str, Array]]]
    check: Callable[[PyTree, PyTree], None] | None = None


# Reads weights of the run's network from a training folder, as host arrays: (folder, which, step,
# field) -> (params, buffers, step).
#   folder: a training folder; "" for the one that the run is fine-tuned from.
#   which: "ema" or "params".   step: of its checkpoint; None for that which the run began with:
#     the one that it is fine-tuned from, of another folder the newest.
#   field: the setting that names the folder, for messages.
Weights = Callable[[str, str, int | None, str], tuple[PyTree, PyTree, int]]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method may know when the step is built: settings and pure functions, never parameters.

    Attributes:
      image_shape: (h, w, c).
      label_dim: number of classes, 0 if unconditional.
      batch: images per optimiser step over all devices.
      device_batch: images per device and accumulation round.
      devices: number of devices.
      axis: name of the mapped axis inside the step, or None.
      mesh: the devices, where arrays inside the step are global (axis is None): for collectives of
        a method's own.
      sigma_data: standard deviation of the data in [-1, 1].
      sigma_min, sigma_max: range of noise levels, within both the sampler's and those that the
        denoiser is made for.
      noise: the noise distribution with the loss weight, for methods that draw a second noise
        level; never stratified.
      denoiser: (params, buffers, augment=None, dropout_keys=None) -> Denoiser, the model as a pure
        function of its parameters (models.Model.denoiser).
      dtype: compute type of the run's networks; None: that of their inputs.
      learning_rate: peak learning rate of the denoiser.
      source: the opened data source, for methods that keep it on the devices.
      weights: reads weights of the run's network.
      xflip: whether images are mirrored at random without a label.
      augment: (keys [m], images [m,h,w,c]) -> images, the labelled augmentation without its labels,
        device_batch images at a time; None if off.
      steps: optimiser steps of the whole run.
      layers: the layers of the network whose features can be asked for, beside "mid" and "emb".
      text: whether the model's condition is a text.
      label_dropout: probability with which a label is hidden from the model.
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
    noise: NoiseDistribution
    denoiser: Callable[..., Denoiser]
    learning_rate: float
    source: Source
    weights: Weights
    xflip: bool = False
    augment: Callable[[Array, Array], Array] | None = None
    mesh: jax.sharding.Mesh | None = None
    dtype: Any = None
    steps: int = 0
    layers: Sequence[str] = ()
    text: bool = False
    label_dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Slots:
    """What one method fills and owns; None leaves a slot to others.

    Attributes:
      name: the method's name.
      target: (example, own) -> (target like x0, metrics).
      distance: (example, x0_hat, target, denoiser, own) -> ([b], metrics).
      penalty: (example, x0_hat, denoiser, own) -> ([b], metrics).
      constants: arrays that it is given in every step.
      carry: what it keeps from step to step.
      references: images per step, over all devices, that the loader has to bring besides the batch
        (0 = none).
      mates: images of each example's own class that the loader has to bring with it (0 = none).
      sees_target: whether its distance looks at the target, and not only at x0.
    """

    name: str
    target: Target | None = None
    distance: Distance | None = None
    penalty: Penalty | None = None
    constants: Constants | None = None
    carry: Carry | None = None
    references: int = 0
    mates: int = 0
    sees_target: bool = True
    __repr__ = brief


@dataclasses.dataclass(frozen=True)
class Methods:
    """The methods of a run, joined: each single slot with its one owner or None."""

    all: tuple[Slots, ...]
    target: Slots | None
    distance: Slots | None
    __repr__ = brief

    @property
    def references(self) -> int:
        """Images per step that the loader brings besides the batch, for whoever wants most."""
        return max((m.references for m in self.all), default=0)

    @property
    def mates(self) -> int:
        """Images of its own class that the loader brings with each image."""
        return max((m.mates for m in self.all), default=0)

    def constants(self) -> dict[str, dict[str, PyTree]]:
        """The step's argument on the host: {one of PLACES: {method: arrays}}."""
        owned = [(m.name, m.constants) for m in self.all if m.constants is not None]
        return {
            place: {name: own.make() for name, own in owned if own.place == place}
            for place in PLACES
        }

    def init(self, key: Array) -> dict[str, PyTree]:
        """{method: its fresh carry}."""
        return {m.name: m.carry.init(key) for m in self.all if m.carry is not None}

    def check(self, carry: Mapping[str, PyTree], constants: Mapping[str, Any]) -> None:
        """Raises ValueError where constants are not those that a carry began with."""
        constants = functools.reduce(operator.or_, constants.values())
        for method in self.all:
            if method.carry is not None and method.carry.check is not None:
                method.carry.check(carry[method.name], constants.get(method.name))


def combine(methods: Sequence[Slots]) -> Methods:
    """Joins methods into one step. Raises ConfigError naming both owners where two claim one single
    slot, or where one fills a target that the other's distance does not look at.
    """
    owners: dict[str, Slots | None] = {}
    for slot in ("target", "distance"):
        claims = [m for m in methods if getattr(m, slot) is not None]
        if len(claims) > 1:
            raise ConfigError(
                f"config.methods: {claims[0].name} and {claims[1].name} both fill the {slot} slot; "
                "choose one of them"
            )
        owners[slot] = claims[0] if claims else None
    target, distance = owners["target"], owners["distance"]
    if target is not None and distance is not None and not distance.sees_target:
        raise ConfigError(
            f"config.methods: {target.name} makes a target for the squared error, which "
            f"{distance.name} has switched off (config.{distance.name}.mse_weight is 0); expected "
            "one of them, or a weight above 0"
        )
    return Methods(tuple(methods), owners["target"], owners["distance"])


def noise_bins(values: Mapping[str, Array], sigma: Array, edges: Sequence[float]) -> Metrics:
    """Metrics "name/low-high" of values [b] by name: their means over the examples with low < sigma
    <= high.

    Args:
      values: {name: [b]}.
      sigma: [b] noise levels.
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
