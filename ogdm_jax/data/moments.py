"""Stored latents (latents.py) as a network sees them, inside a compiled step."""

import jax.numpy as jnp

from ogdm_jax import randomness
from ogdm_jax.latents import Latents
from ogdm_jax.typing import Array


def draw(latents: Latents, stored: Array, keys: Array, mirrored: Array | None = None) -> Array:
    """A fresh sample of each posterior (arXiv 2112.10752): z = (mean + std eps - shift) scale.

    Args:
      latents: what the numbers are.
      stored: [b,views,h,w,2C] mean and std, or [b,views,h,w,C] samples, taken as they are.
      keys: [b] typed keys, of eps.
      mirrored: [b] bool, whether the mirrored view is taken; None: the plain one.

    Returns:
      [b,h,w,C] float32.
    """
    view = stored[:, 0]
    if mirrored is not None:
        view = jnp.where(mirrored[:, None, None, None], stored[:, 1], view)
    view = view.astype(jnp.float32)
    if latents.moments:
        mean, std = jnp.split(view, 2, axis=-1)
        view = mean + std * randomness.normal(keys, mean.shape[1:])
    return latents.scaled_of(view)
