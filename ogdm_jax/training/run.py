"""From a configuration to the parts of a run: model, noise law, methods, optimiser, plan, step;
checked first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ogdm_jax import config as configs
from ogdm_jax import models, parallel, randomness
from ogdm_jax.data import Source, augment
from ogdm_jax.diffusion import grids, noise
from ogdm_jax.methods import contract as slots
from ogdm_jax.training import checkpoint, optim, state, step
from ogdm_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Run:
    """The fixed parts of a training run; the state travels separately."""

    config: configs.Config
    source: Source
    model: models.Model
    law: noise.NoiseDistribution
    filled: slots.Filled
    tx: optax.GradientTransformation
    plan: parallel.Plan
    step: step.Step
    steps: int
    memory: dict[str, PyTree]

    @property
    def key(self) -> jax.Array:
        """The run's key; every draw is folded from it."""
        return randomness.fold_in_name(jax.random.key(self.config.seed), "train")

    def create(self, key: jax.Array) -> state.TrainState:
        return state.create(self.model, self.filled, self.tx, self.memory, key)

    def init(self) -> state.TrainState:
        """A fresh state, placed as the plan wants it."""
        return self.plan.init(self.create, jax.random.key(self.config.seed))

    def frozen(self) -> PyTree:
        """The step's frozen argument: whole trees on all devices, divided ones each on its own."""
        trees = slots.frozen_trees(self.filled)
        return {
            "whole": self.plan.place(trees["whole"]),
            "divided": self.plan.place_rows(trees["divided"]),
        }

    def shapes(self) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """The step's arguments as shapes, laid out as the plan wants them: all that compiling ahead
        of time needs.
        """
        given = jax.eval_shape(self.create, jax.random.key(0))
        trees = slots.frozen_trees(self.filled)
        frozen = {
            "whole": jax.tree.map(_shape, trees["whole"]),
            "divided": self.plan.row_shapes(trees["divided"]),
        }
        batch = self.plan.row_shapes(jax.eval_shape(lambda: self.example_batch()))
        return given, frozen, batch, jax.eval_shape(lambda: jax.random.key(0))

    def example_batch(self) -> dict[str, PyTree]:
        """A batch of the run's sizes, all zeros, over all processes."""
        n, source = self.config.data.batch, self.source
        wide = (source.label_size,) if source.label_size else ()
        kind = jnp.float32 if source.label_size else jnp.int32
        images = lambda n: jnp.zeros((n, *source.shape), jnp.uint8)
        labels = lambda n: jnp.zeros((n, *wide), kind)
        batch = {"image": images(n), "label": labels(n), "index": jnp.zeros((n,), jnp.int32)}
        if more := self.filled.references:
            batch |= {"reference": images(more), "reference_label": labels(more)}
        return batch

    def compile(self, like: state.TrainState) -> Callable[..., Any]:
        return self.plan.compile(self.step, like)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)


def build(
    config: configs.Config,
    source: Source,
    plan: parallel.Plan,
    stand_in: Callable[[PyTree], PyTree] | None = None,
) -> Run:
    """Builds and checks a run.

    Args:
      stand_in: shapes -> arrays in place of weights that a method reads from a checkpoint: for
        whoever only compiles.

    Raises:
      ConfigError: any setting that is unknown, out of range, or does not fit the data, the devices
      or another setting.
    """
    batch = config.data.batch
    model = models.build(config, source.shape, source.num_classes)
    law = noise_law(config)
    tx, rate = optim.optimiser(config)
    device_batch = parallel.check_batch(batch, config.optim.accumulate, len(plan.devices))

    def weights(folder: str, which: str, at: int | None = None) -> tuple[PyTree, PyTree, int]:
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        if stand_in is not None:
            return *stand_in(shapes), 0
        field = "config.sp.teacher" if folder else "config.init.workdir"
        folder = folder or config.init.workdir
        configs.require(
            bool(folder), "init.workdir", folder, "a trained folder, here or as config.sp.teacher"
        )
        snapshot = checkpoint.find(folder, at, field)
        return *jax.tree.map(
            np.asarray, checkpoint.load_weights(snapshot, *shapes, which)
        ), snapshot.step

    levels = grids.clip_range(model.denoiser({}), config.sample.sigma_min, config.sample.sigma_max)
    pipe = augment.AugmentPipe(p=config.data.augment) if config.data.augment > 0 else None
    context = slots.Context(
        image_shape=source.shape,
        label_dim=model.label_dim,
        batch=batch,
        device_batch=device_batch,
        devices=len(plan.devices),
        axis=plan.axis,
        sigma_data=config.precondition.sigma_data,
        sigma_min=levels[0],
        sigma_max=levels[1],
        weight=law.weight,
        denoiser=model.denoiser,
        learning_rate=config.optim.learning_rate,
        source=source,
        law=dataclasses.replace(
            law, stratified=False
        ),  # the same strata twice would tie a second level to the first
        weights=weights,
        xflip=config.data.xflip,
        augment=pipe and (lambda keys, images: pipe.augment(keys, images)[0]),
        mesh=None if plan.axis else plan.mesh,
        dtype=model.network.dtype,
    )
    filled = slots.combine(
        [
            slots.module(name).training(
                dataclasses.asdict(config.settings(name, slots.module(name).Settings)), context
            )
            for name in config.methods
        ]
    )
    steps = config.steps(config.train.duration)
    pure = step.make_step(config, model, law, filled, tx, rate, **plan.words)
    memory = jax.tree.map(np.asarray, slots.per_method(filled, "memory"))
    return Run(config, source, model, law, filled, tx, plan, pure, steps, memory)


def noise_law(config: configs.Config) -> noise.NoiseDistribution:
    """The distribution of a configuration's training noise levels."""
    settings = config.noise
    if settings.distribution == "ddpm":
        return noise.ddpm(
            config.precondition.schedule, config.precondition.diffusion_steps, settings.stratified
        )
    if settings.distribution != "edm":
        return getattr(noise, settings.distribution)(stratified=settings.stratified)
    return noise.edm(
        settings.mean,
        settings.std,
        sigma_data=config.precondition.sigma_data,
        clip=(config.sample.sigma_min, config.sample.sigma_max) if settings.clip else None,
        stratified=settings.stratified,
    )
