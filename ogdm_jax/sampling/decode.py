"""From the latents of a latent diffusion model to pictures (arXiv 2112.10752)."""

from typing import cast

import jax
import jax.numpy as jnp

from ogdm_jax.networks import AutoencoderKL
from ogdm_jax.typing import Array, PyTree

# Pictures at a time: the activations of Stable Diffusion's decoder are 1.5 GiB a picture of 256
# pixels in float32, 6 GiB at 512, and a batch of latents is small beside that.
BATCH = 4


def decode(
    network: AutoencoderKL, variables: PyTree, latents: Array, batch: int | None = BATCH
) -> Array:
    """Pictures [n,H,W,C], about [-1, 1] and not clipped, of a diffusion model's latents [n,h,w,z].

    Pure. The latents are scaled as the diffusion model has them; `network.from_scaled` is in here.

    Args:
      network: the autoencoder.
      variables: its weights, {"params": ...}: an argument of whatever is compiled.
      latents: [n,h,w,z].
      batch: pictures at a time; None: all at once, as guidance through the decoder has them.
    """

    def some(z: Array) -> Array:
        z = network.from_scaled(jnp.asarray(z, jnp.promote_types(z.dtype, jnp.float32)))
        return cast(Array, network.apply(variables, z, method="decode"))

    n = len(latents)
    if batch is None or n <= batch:
        return some(latents)
    # Rows of one round lie far apart, so that a batch divided over devices stays divided.
    rounds = -(-n // batch)
    rows = jnp.resize(jnp.arange(n), (batch, rounds))
    found = jax.lax.map(some, jnp.swapaxes(latents[rows], 0, 1))
    found = jnp.swapaxes(found, 0, 1)
    return found.reshape(-1, *found.shape[2:])[:n]
