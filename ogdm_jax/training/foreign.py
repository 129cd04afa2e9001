"""A Stable Diffusion model of others as a trained model: what sampling needs, without a run."""

import dataclasses
import logging
import os
from typing import Any

import jax.numpy as jnp

from ogdm_jax import models
from ogdm_jax.config import Config, require
from ogdm_jax.config.whole import replace
from ogdm_jax.interop import stable_diffusion
from ogdm_jax.training.workdir import TrainedModel

_LOG = logging.getLogger("ogdm_jax")


def open_model(path: str | os.PathLike, size: int = 0, **given: str) -> TrainedModel:
    """The model of a folder of diffusers or a single file, for pictures of `size` pixels a side.

    Args:
      path: see `stable_diffusion.open_model`.
      size: of the pictures; 0: what the model was made for.
      **given: vae, tokenizer and prediction of `stable_diffusion.open_model`.

    Raises:
      ConfigError: a size that the networks do not halve; see `stable_diffusion.open_model`.
    """
    found = stable_diffusion.open_model(path, **given)
    for note in found.notes:
        _LOG.warning("%s: %s", path, note)
    parts: list[Any] = [found.unet, found.vae, found.text]
    network, coder, text = (part.network for part in parts)
    need = f"an autoencoder of {network.img_channels} latent channels, which the U-Net takes"
    fits = coder.latent_channels == network.img_channels
    require(fits, "--vae", given.get("vae") or str(path), need)
    side = check_size(size or network.img_resolution * coder.factor, network, coder)
    config = replace(Config(), {"data.source": "", "data.augment": 0.0, **found.settings})
    model = models.build(config, (side, side, network.img_channels), 0)
    model = dataclasses.replace(model, autoencoder=coder, text=text)
    params, decoder, encoder = (_moved(part.variables) for part in parts)
    buffers = {models.VAE: decoder, models.TEXT: encoder}
    return TrainedModel(config, model, params["params"], buffers, 0, tokenizer=found.tokenizer)


def _moved(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree on the device; it is emptied, so that one leaf at a time is there twice."""
    move = lambda value: _moved(value) if isinstance(value, dict) else jnp.asarray(value)
    return {key: move(tree.pop(key)) for key in [*tree]}


def check_size(size: int, network: Any, coder: Any) -> int:
    """The side of the latents. Raises ConfigError for pictures that the networks do not halve."""
    unit = coder.factor * 2 ** (len(network.widths) - 1)
    need = f"a multiple of {unit}, which autoencoder and U-Net halve together"
    require(size % unit == 0, "--size", size, need)
    return size // coder.factor
