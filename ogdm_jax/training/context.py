"""What a run tells its training methods (methods/contract.py: Context)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ogdm_jax import config as configs
from ogdm_jax import models, parallel
from ogdm_jax.config import Config
from ogdm_jax.data import Source, augment
from ogdm_jax.diffusion import grids, noise
from ogdm_jax.diffusion.noise import NoiseDistribution
from ogdm_jax.methods.contract import Context, Weights
from ogdm_jax.training import checkpoint, texts
from ogdm_jax.typing import Array, PyTree

StandIn = Callable[[PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Read:
    """Which checkpoints of other runs the methods of a run read their weights from.

    Attributes:
      steps: {the setting that names the folder: the step}; what is read is added.
      fresh: whether the run begins now. A run that goes on reads the same steps again.
    """

    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    fresh: bool = True


def context(
    config: Config,
    source: Source,
    model: models.Model,
    levels: NoiseDistribution,
    plan: parallel.Plan,
    stand_in: StandIn | None = None,
    read: Read | None = None,
) -> Context:
    """The context of a run's methods.

    Args:
      config: the run's settings.
      source: its data.
      model: its network.
      levels: the distribution of its noise levels.
      plan: its devices.
      stand_in: shapes -> arrays in place of weights that a method reads from a checkpoint.
      read: what the run's methods have read before, and read now.

    Raises:
      ConfigError: a batch that the devices and rounds do not divide.
    """
    low, high = grids.clip_range(
        model.denoiser({}), config.sample.sigma_min, config.sample.sigma_max
    )
    pipe = augment.AugmentPipe(p=config.data.augment) if config.data.augment > 0 else None
    batch, devices = config.data.batch, len(plan.devices)
    part = parallel.check_batch(batch, config.optim.accumulate, devices)
    return Context(
        image_shape=source.shape,
        label_dim=model.label_dim,
        batch=batch,
        device_batch=part,
        devices=devices,
        axis=plan.axis,
        mesh=None if plan.axis else plan.mesh,
        sigma_data=config.precondition.sigma_data,
        sigma_min=low,
        sigma_max=high,
        # the same strata twice would tie a second level to the first
        noise=dataclasses.replace(levels, stratified=False),
        denoiser=model.denoiser,
        layers=model.layer_names,
        text=model.text is not None,
        label_dropout=config.data.label_dropout,
        dtype=model.network.dtype,
        learning_rate=config.optim.learning_rate,
        steps=config.steps(config.train.duration),
        source=source,
        weights=_weights(config, model, stand_in, read or Read()),
        xflip=config.data.xflip,
        augment=pipe and functools.partial(augmented, pipe, part),
    )


def augmented(pipe: augment.AugmentPipe, part: int, keys: Array, images: Array) -> Array:
    """Augmented images, `part` of them at a time: a TPU's gather needs 30 MB for each of 32x32x3,
    of which STF's authors take seven times the batch as references.
    """
    one = lambda pair: pipe.augment(pair[0][None], pair[1][None])[0][0]
    return jax.lax.map(one, (keys, images), batch_size=part)


def _weights(config: Config, model: models.Model, stand_in: StandIn | None, read: Read) -> Weights:
    """Reads checkpoints of the run's network for methods."""

    def weights(
        folder: str, which: str, step: int | None, field: str
    ) -> tuple[PyTree, PyTree, int]:
        params, buffers = jax.eval_shape(model.init, jax.random.key(0))
        if stand_in is not None:
            return *stand_in((params, models.own_buffers(buffers))), 0
        named = field if folder else "config.init.workdir"
        of_init = not folder and read.fresh and config.init.step >= 0
        folder = folder or config.init.workdir
        if texts.is_folder(folder):
            expected = "ema and no step with a folder of diffusers"
            configs.require(which == "ema" and step is None, f"{field}_weights", which, expected)
            return texts.open_folder(folder, config, ("unet",), named)[0], {}, 0
        expected = f"a trained folder, here or as {field}"
        configs.require(bool(folder), "init.workdir", folder, expected)
        if step is None:
            step = read.steps.get(field, config.init.step if of_init else None)
        snapshot = checkpoint.find(folder, step, named)
        read.steps[field] = snapshot.step
        params, buffers = checkpoint.load_weights(snapshot, params, buffers, which)
        found = params, models.own_buffers(buffers)
        return *jax.tree.map(np.asarray, found), snapshot.step

    return weights


def noise_distribution(config: Config) -> NoiseDistribution:
    """The distribution of a configuration's training noise levels."""
    settings, kind = config.noise, config.noise.distribution
    how: dict[str, Any] = {"stratified": settings.stratified}
    if kind in ("ddpm", "v"):
        how["betas"] = models.discrete_table(config.precondition)
    if kind == "ve":
        how["sigma_max"] = config.precondition.sigma_max
    if kind == "ddpm":
        how["min_snr"] = settings.min_snr
    if kind in ("edm", "logit_normal"):
        limits = (config.sample.sigma_min, config.sample.sigma_max) if settings.clip else None
        how |= {"mean": settings.mean, "std": settings.std, "clip": limits}
    if kind == "edm":
        how["sigma_data"] = config.precondition.sigma_data
    return getattr(noise, kind)(**how)
