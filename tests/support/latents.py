"""A tiny autoencoder with random weights, and latents of the digits that it encoded."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop import diffusers, export
from ogdm_jax.latents import Latents
from ogdm_jax.networks import AutoencoderKL
from tests.support import networks

NETWORK = AutoencoderKL(
    img_channels=1, widths=(4, 4), num_blocks=1, groups=2, latent_channels=2, scale=0.6, shift=0.2
)


def autoencoder(folder: Path, seed: int = 0, network: AutoencoderKL = NETWORK) -> Path:
    """A diffusers folder of it."""
    image = jnp.zeros((1, 8, 8, network.img_channels))
    variables = networks.born(jax.eval_shape(network.init, jax.random.key(0), image), seed)
    state = export.to_torch(network, variables)
    diffusers.write(folder, network, state, sample_size=8)
    return folder


def moments(n: int, latents: Latents, seed: int = 0) -> np.ndarray:
    """Items [n, ...] with standard deviations of about 0.3."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=(2, n, *latents.item_shape[:-1], latents.shape[-1]))
    return np.concatenate([mean, 0.1 + 0.4 * np.abs(std)], axis=-1).astype(latents.dtype)
