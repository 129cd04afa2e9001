"""From a configuration to the parts of a run: model, noise distribution, methods, optimiser, plan,
step; checked first.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, Self, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ogdm_jax import models, parallel, platforms, randomness
from ogdm_jax.brief import brief
from ogdm_jax.config import Config, require
from ogdm_jax.data import Source
from ogdm_jax.data.tokens import Tokenizer
from ogdm_jax.diffusion.noise import NoiseDistribution
from ogdm_jax.interop.autoencoder import Autoencoder
from ogdm_jax.methods import discovery
from ogdm_jax.methods.contract import Methods, combine
from ogdm_jax.training import context, objective, optim, state, step
from ogdm_jax.typing import Array, PyTree


class Trained(Protocol):
    """What every run knows of its model: how its weights begin."""

    def init(self, key: Array) -> tuple[PyTree, PyTree]:
        """Fresh (params, buffers)."""
        ...


ModelT_co = TypeVar("ModelT_co", bound=Trained, covariant=True)


@dataclasses.dataclass(frozen=True)
class Run(Generic[ModelT_co]):
    """The fixed parts of a training run; the state travels separately.

    Attributes:
      config: all settings.
      source: the data.
      model: what is trained: a `models.Model`, a discriminator or an autoencoder.
      methods: the training methods that are on.
      tx: the optimiser.
      plan: which devices hold what.
      step: the pure step, not compiled.
      steps: how many there will be.
      noise: the distribution of noise levels; None where the objective has its own.
      decoder: of a run on latents, what makes images of them; None where there is none.
      tokenizer: of a run on captions.
      weights_read: {the setting that names a folder: the step} of the checkpoints that its methods
        have read, see `context.Read`.
    """

    config: Config
    source: Source
    model: ModelT_co
    methods: Methods
    tx: optax.GradientTransformation
    plan: parallel.Plan
    step: step.Step
    steps: int
    noise: NoiseDistribution | None = None
    decoder: Autoencoder | None = None
    tokenizer: Tokenizer | None = None
    weights_read: Mapping[str, int] = dataclasses.field(default_factory=dict)
    __repr__ = brief

    @classmethod
    def of(
        cls,
        config: Config,
        source: Source,
        model: Any,
        methods: Methods,
        goal: objective.Objective,
        plan: parallel.Plan,
        tx: optax.GradientTransformation | None = None,
        **more: Any,
    ) -> Self:
        """The run whose step minimises an objective; tx: the denoiser's Adam unless given."""
        tx, rate = tx or optim.optimiser(config), optim.rate_of(config)
        made = step.make_step(config, goal, methods, tx, rate, plan)
        length = config.steps(config.train.duration)
        return cls(config, source, model, methods, tx, plan, made, length, **more)

    @property
    def key(self) -> jax.Array:
        """The run's key; every draw is folded from it."""
        return randomness.fold_in_name(randomness.seeded(self.config.seed), "train")

    @functools.cached_property
    def create(self) -> Callable[..., state.TrainState]:
        """(key, weights=None) -> a fresh state, of given (params, buffers) or new ones; jit it or
        eval_shape it. The same key gives the same network whatever methods are on.

        One function for all who ask: JAX keeps the trace of it, which takes seconds.
        """
        return platforms.traced_for(self.plan.platform, self._create)

    def _create(
        self, key: jax.Array, weights: tuple[PyTree, PyTree] | None = None
    ) -> state.TrainState:
        # quick: a draw for each tensor, of which threefry takes four times as long to compile
        key_of_network = randomness.quick(randomness.fold_in_name(key, "network"))
        params, buffers = weights or self.model.init(key_of_network)
        return state.TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=state.copy(params),
            buffers=buffers,
            opt_state=self.tx.init(params),
            carry=self.methods.init(key),
            averages=tuple(state.copy(params) for _ in self.config.ema.stds),
        )

    def init(self, *weights: tuple[PyTree, PyTree]) -> state.TrainState:
        """A fresh state, placed as the plan wants it, of given (params, buffers) or new ones."""
        return self.plan.init(self.create, randomness.seeded(self.config.seed), *weights)

    def constants(self) -> dict[str, PyTree]:
        """The step's constants: whole trees on all devices, rows each on its own, weights as a
        state lies.
        """
        trees = self.methods.constants()
        return {
            "whole": self.plan.place(trees["whole"]),
            "divided": self.plan.place_rows(trees["divided"]),
            "weights": self.plan.place_state(trees["weights"]),
        }

    def shapes(self) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """The step's arguments as shapes, laid out as the plan wants them: all that compiling ahead
        of time needs.
        """
        fresh = jax.eval_shape(self.create, randomness.seeded(0))
        trees = self.methods.constants()
        constants = {
            "whole": jax.tree.map(_shape, trees["whole"]),
            "divided": self.plan.row_shapes(trees["divided"]),
            "weights": self.plan.shapes(trees["weights"]),
        }
        batch = self.plan.row_shapes(jax.eval_shape(lambda: self.example_batch()))
        return fresh, constants, batch, jax.eval_shape(lambda: randomness.seeded(0))

    def example_batch(self) -> dict[str, PyTree]:
        """A batch of the run's sizes, all zeros, over all processes."""
        n, source = self.config.data.batch, self.source
        wide = (source.label_size,) if source.label_size else ()
        kind = jnp.float32 if source.label_size else jnp.int32
        images = lambda n: jnp.zeros((n, *source.item_shape), source.dtype)
        labels = lambda n: jnp.zeros((n, *wide), kind)
        batch = {"image": images(n), "label": labels(n), "index": jnp.zeros((n,), jnp.int32)}
        if source.latents is not None:
            batch["row"] = jnp.zeros((n,), jnp.int32)
        if source.empty is not None:
            tokens = jnp.zeros((n, len(source.empty)), jnp.int32)
            batch |= {"label": tokens, "empty": tokens}
        if more := self.methods.references:
            batch |= {"reference": images(more), "reference_label": labels(more)}
        if more := self.methods.mates:
            batch["mates"] = jnp.zeros((n, more, *source.item_shape), source.dtype)
        return batch

    def compile(self, like: state.TrainState) -> Callable[..., Any]:
        """The step, compiled for the plan's devices; `like` is a state or its shapes."""
        return self.plan.compile(self.step, like)


AnyRun: TypeAlias = Run[Trained]  # of whatever network
DenoiserRun: TypeAlias = Run[models.Model]


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)


def build(
    config: Config,
    source: Source,
    plan: parallel.Plan,
    stand_in: context.StandIn | None = None,
    began: Mapping[str, int] | None = None,
) -> DenoiserRun:
    """Builds and checks the run of a denoiser.

    Args:
      config: its settings.
      source: its data.
      plan: its devices.
      stand_in: shapes -> arrays in place of weights that a method reads from a checkpoint: for
        whoever only compiles.
      began: `weights_read` of the run that this one goes on with; None: it begins.

    Raises:
      ConfigError: any setting that is unknown, out of range, or does not fit the data, the devices
        or another setting.
    """
    discovery.check_settings(config)
    tokens = "captions as tokens (training.texts.tokenised)"
    known = config.network.kind != "sd" or source.empty is not None
    require(known, "data.source", source.name, tokens)
    model = models.build(config, source.shape, source.num_classes, source.latents)
    levels = context.noise_distribution(config)
    read = context.Read(dict(began or {}), fresh=began is None)
    told = context.context(config, source, model, levels, plan, stand_in, read)
    methods = combine([_method(config, name, told) for name in config.methods])
    goal = objective.denoising(config, model, levels, methods, plan.gather)
    return Run.of(config, source, model, methods, goal, plan, noise=levels, weights_read=read.steps)


def _method(config: Config, name: str, told: context.Context) -> Any:
    module = discovery.training_method(name)
    return module.training(config.settings(name, module.Settings), told)
