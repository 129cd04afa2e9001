"""Images from a denoiser: seeds in, images out, over any number of devices. An image depends only on its seed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ogdm_jax import randomness
from ogdm_jax.config import require
from ogdm_jax.diffusion import grids
from ogdm_jax.diffusion.sampling import SOLVERS, sample
from ogdm_jax.model import Model
from ogdm_jax.typing import Array, Denoise, PyTree

AXIS = "images"
Images = Callable[[PyTree, PyTree, Array, Array | None], Array]


def seed_keys(seeds: Array) -> Array:
    """One typed key per seed."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), seeds)


def random_labels(seeds: np.ndarray, num_classes: int) -> np.ndarray:
    """The class of each seed: uniform, drawn from the seed alone."""
    keys = randomness.fold_in_each(seed_keys(jnp.asarray(seeds, jnp.uint32)), "label")
    return np.asarray(jax.vmap(lambda k: jax.random.randint(k, (), 0, num_classes))(keys))


def check_settings(settings: ConfigDict) -> None:
    """Raises ConfigError for an unknown solver, steps < 1 or a noise range that is not 0 < min < max."""
    require(settings.solver in SOLVERS, "sample.solver", settings.solver, f"one of {', '.join(sorted(SOLVERS))}")
    require(settings.steps >= 1, "sample.steps", settings.steps, "at least 1")
    require(settings.num >= 1, "sample.num", settings.num, "at least 1")
    require(
        0 < settings.sigma_min < settings.sigma_max, "sample.sigma_min", settings.sigma_min, "0 < sigma_min < sigma_max"
    )


def sampler(
    model: Model,
    settings: ConfigDict,
    devices: Sequence[Any],
    churn: Any = None,
    kick: Any = None,
    shift: Callable[[Denoise], Denoise] = lambda denoise: denoise,
) -> Images:
    """A compiled (params, buffers, seeds [b], labels [b] | None) -> images [b,h,w,c] in [-1, 1].

    Args:
      settings: solver, steps, sigma_min, sigma_max, rho of config.sample.
      devices: b must be a multiple of their number; each samples its share.
      churn, kick: slots of `sample`.   shift: a decorator of the denoiser (classifier-free or discriminator guidance).
    """
    check_settings(settings)
    sigmas = grids.edm(settings.steps, settings.sigma_min, settings.sigma_max, settings.rho)

    def images(params, buffers, seeds, labels):
        keys = seed_keys(seeds)
        latents = randomness.normal(randomness.fold_in_each(keys, "latent"), model.image_shape)
        denoise = shift(model.denoiser(params, buffers))
        return sample(
            denoise,
            latents,
            sigmas,
            solver=settings.solver,
            key=randomness.fold_in_each(keys, "steps"),
            churn=churn,
            label=labels,
            kick=kick,
        )

    mesh = Mesh(np.asarray(devices), (AXIS,))
    whole, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.jit(images, in_shardings=(whole, whole, divided, divided), out_shardings=divided)


def generate(
    images: Images,
    params: PyTree,
    buffers: PyTree,
    seeds: np.ndarray,
    labels: np.ndarray | None,
    batch: int,
) -> Iterator[np.ndarray]:
    """Yields images of all seeds in batches of one compiled size; the last one is filled up and cut."""
    seeds = np.asarray(seeds, np.uint32)
    for start in range(0, len(seeds), batch):
        part = np.resize(seeds[start : start + batch], batch)
        classes = None if labels is None else np.resize(np.asarray(labels, np.int32)[start : start + batch], batch)
        yield np.asarray(images(params, buffers, part, classes))[: len(seeds) - start]
