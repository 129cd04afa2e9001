"""From a batch of the loader to what the network is trained on: augmentation, label dropout, noise
level and noise.
"""

from typing import Any

import jax.numpy as jnp

from ogdm_jax import randomness
from ogdm_jax.config import Config
from ogdm_jax.data import augment as augmentation
from ogdm_jax.data import moments
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.noise import NoiseDistribution
from ogdm_jax.methods.contract import DenoiserOf, Example
from ogdm_jax.models import Model
from ogdm_jax.pixels import to_float
from ogdm_jax.typing import Array, PyTree

Batch = dict[str, Any]


def references(batch: Batch) -> Batch:
    """Those entries of a batch that are a reference batch: all accumulation rounds share them."""
    return {name: value for name, value in batch.items() if name.startswith("reference")}


def draw_example(
    config: Config,
    model: Model,
    noise: NoiseDistribution,
    batch: Batch,
    key: Array,
    noise_key: Array,
) -> Example:
    """What is drawn for a (micro-)batch, for each image from keys of its own.

    Args:
      config: for data.xflip, data.augment, data.label_dropout and the size of the whole batch.
      model: says whether labels are used, and whether they are tokens of captions.
      noise: the distribution of the noise levels.
      batch: {"image": uint8 [b,h,w,c] or stored latents, "label": [b] or [b,k], "index": int32 [b],
        ...}.
      key: the step's key.
      noise_key: that of eps alone; the same key, but where only the noise is drawn anew.
    """
    index = batch["index"]
    keys = lambda purpose: randomness.example_keys(key, purpose, index)
    image = clean_images(config, model, batch, key)
    x0, augment = image, None
    if config.data.augment > 0:
        pipe = augmentation.AugmentPipe(p=config.data.augment)
        x0, augment = pipe.augment(keys("augment"), image)
    label = batch["label"] if model.label_dim or model.text is not None else None
    if label is not None and config.data.label_dropout > 0:
        hidden = randomness.uniform(keys("label_dropout")) < config.data.label_dropout
        label = _without_class(label, hidden, batch.get("empty"))
    label = label if model.text is None else {"prompt": label}
    strata = {"index": index, "batch": config.data.batch, "key": key} if noise.stratified else {}
    sigma = noise.sample(keys("sigma"), **strata)
    eps = randomness.normal(randomness.example_keys(noise_key, "noise", index), x0.shape[1:])
    return Example(
        x0=x0,
        image=image,
        label=label,
        augment=augment,
        sigma=sigma,
        eps=eps,
        xt=x0 + sigma[:, None, None, None] * eps,
        index=index,
        key=key,
        noise_key=noise_key,
        references=references(batch) or None,
        mates=batch.get("mates"),
    )


def clean_images(config: Config, model: Model, batch: Batch, key: Array) -> Array:
    """x0 [b,h,w,c] before augmentation: images mirrored at random where data.xflip says so, or
    fresh samples of latents' posteriors, of the stored mirrored view in the place of a flip.

    A latent's noise is that of its row in the set: all that look at a row in one step see one
    sample.
    """
    keys = randomness.example_keys(key, "xflip", batch["index"])
    if model.latents is None:
        image = to_float(batch["image"])
        return augmentation.xflip(keys, image) if config.data.xflip else image
    flip = augmentation.flipped(keys) if config.data.xflip else None
    eps = randomness.example_keys(key, "latent", batch["row"])
    return moments.draw(model.latents, batch["image"], eps, flip)


def _without_class(label: Array, hidden: Array, empty: Array | None = None) -> Array:
    """Labels with those of hidden [b] taken away: -1, or zeros for vectors (no class is all zeros,
    as in EDM), or the tokens of the empty caption.
    """
    if empty is not None:
        return jnp.where(hidden[:, None], empty, label)
    if label.ndim == 1:
        return jnp.where(hidden, -1, label)
    return jnp.where(hidden[:, None], 0, label)


def denoiser_of(model: Model, params: PyTree, buffers: PyTree, example: Example) -> DenoiserOf:
    """The denoiser of an example by purpose: its dropout keys come from the purpose's name."""

    def make(purpose: str, augment: bool = True) -> Denoiser:
        return model.denoiser(
            params,
            buffers,
            augment=example.augment if augment else None,
            dropout_keys=example.keys(f"dropout/{purpose}"),
        )

    return make
