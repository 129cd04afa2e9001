"""Weights that no training of this folder made as a training folder: those of another program's
file, those that `snapshots` puts together.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import models
from ogdm_jax.config import Config, require
from ogdm_jax.interop import Pretrained, export
from ogdm_jax.interop.autoencoder import open_autoencoder
from ogdm_jax.latents import Latents
from ogdm_jax.training import checkpoint, lock, optim, state
from ogdm_jax.typing import PyTree

_KINDS = {"SongUNet": "song", "DhariwalUNet": "dhariwal", "ADMUNet": "openai", "DiT": "dit"}
# preconditioning -> the noise levels that its networks were trained with; of others they vary
_DRAWN = {"vp": "vp", "subvp": "subvp", "ve": "ve", "smld": "ve"}
_DRAWN |= {"adm": "ddpm", "v": "v", "flow": "logit_normal"}
# (side, channels) -> a set of images that comes with the package or with tfds; all have 10 classes
_SETS = {(8, 1): "digits", (32, 1): "mnist5k", (32, 3): "tfds:cifar10/train"}
_CLASSES = 10
_SHARED = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions")


def check_denoiser(found: Pretrained, source: str) -> None:
    """Raises ValueError unless the file holds a denoiser that a configuration can describe."""
    network = found.network
    if found.kind == "sd_unet":
        raise ValueError(
            f"{source}: a text-conditioned U-Net of latents, which is not converted; with its "
            "autoencoder and texts, a folder of diffusers, ogdm sample --workdir FOLDER --prompt "
            "and training (--config.init.workdir=FOLDER) take it as it is"
        )
    if found.kind not in ("edm", "adm", "score_sde", "dit"):
        raise ValueError(
            f"{source}: holds a network of kind {found.kind}; expected a denoiser (others: "
            "load_pretrained)"
        )
    found.preconditioning()
    if found.kind == "adm" and network.img_channels == 6:
        raise ValueError(
            f"{source}: an upsampler, whose input is the noisy image and a small one (low_res), "
            "which it enlarges; no configuration has one, use load_pretrained"
        )


def settings_of(found: Pretrained, config: Config) -> dict[str, Any]:
    """{"group.key": value}: what a configuration must say for `models.build` to make this network.

    Args:
      found: a denoiser, see `check_denoiser`.
      config: the configuration that is to be changed; it says how often to augment.
    """
    network, kind = found.network, found.preconditioning()
    owner = _KINDS[type(network).__name__]
    settings = {
        "network.kind": owner,
        "precondition.kind": kind,
        "precondition.sigma_data": found.sigma_data,
        "data.conditional": network.label_dim > 0,
        "data.augment": (config.data.augment or 0.12) if network.augment_dim else 0.0,
    }
    named = dict.fromkeys(_SHARED + models.ONLY.get(owner, ()))
    for field, attribute in (models.DIT if owner == "dit" else named).items():
        value = getattr(network, attribute or field)
        settings[f"network.{field}"] = tuple(value) if isinstance(value, tuple | list) else value
    if kind in _DRAWN:
        settings["noise.distribution"] = _DRAWN[kind]
    if found.kind == "score_sde" and kind in ("ve", "smld"):  # from where they end, as published
        levels = found.denoiser()
        settings |= {"sample.grid": "ve", "sample.sigma_min": levels.sigma_min}
        settings["sample.sigma_max"] = levels.sigma_max
    settings |= {f"precondition.{name}": value for name, value in found.process.items()}
    if kind in ("adm", "v"):
        settings["precondition.schedule"] = found.schedule
    if kind == "adm":
        settings["precondition.learned_variance"] = network.out_channels == 2 * network.img_channels
    if kind == "flow":
        settings |= {"noise.mean": 0.0, "noise.std": 1.0}
    if kind == "flow" or found.process.get("zero_terminal"):
        grid = "flow" if kind == "flow" else "trailing"
        settings |= {"sample.grid": grid, "sample.solver": "euler"}  # they start from pure noise
    if owner == "dit":  # has none
        return settings
    if found.dropout is not None:
        settings["network.dropout"] = float(found.dropout)
    elif owner == "openai":  # the file does not say; most of them were trained without
        settings["network.dropout"] = 0.0
    return settings


def latents_of(found: Pretrained, config: Config, source: str) -> Latents | None:
    """What the images of a latent model are, by the autoencoder that config.data.vae names; None of
    a model of pixels.

    Raises:
      ConfigError: no autoencoder, one of other latents, or one for a model of pixels.
    """
    network, vae = found.network, config.data.vae
    channels = network.img_channels
    if found.kind != "dit" or channels in (1, 3):
        require(not vae, "data.vae", vae, f"none, as {source} is a model of pixels")
        return None
    need = f"the autoencoder of the latents of {channels} channels that {source} makes"
    require(bool(vae), "data.vae", vae, need)
    decoder = open_autoencoder(vae, "config.data.vae")
    require(decoder.network.latent_channels == channels, "data.vae", vae, need)
    shape = network.img_resolution, network.img_resolution, channels
    scale, shift = decoder.network.scale, decoder.network.shift
    return Latents(shape, scale=scale, shift=shift, vae={"path": vae, "sha256": decoder.sha256})


def data_of(found: Pretrained) -> dict[str, Any]:
    """{"data.key": value}: the images that a file of ours was trained on, else such that fit its
    network; of an unknown set, from the folder DIR.
    """
    if "source" in found.images:
        return {f"data.{name}": value for name, value in found.images.items()}
    network = found.network
    size = network.img_resolution, network.img_channels
    if size in _SETS and network.label_dim in (0, _CLASSES):
        return {"data.source": _SETS[size]}
    found_channels = {"data.channels": size[1]} if size[1] in (1, 3) else {}
    return {"data.source": "folder:DIR", "data.resolution": size[0]} | found_channels


def write(found: Pretrained, config: Config, out: str | os.PathLike, source: str) -> int:
    """Writes the network as step 0 of a training folder; returns its number of parameters.

    Raises:
      ValueError: the configuration builds another network, or has no autoencoder for its latents.
    """
    network = found.network
    shape = (network.img_resolution, network.img_resolution, network.img_channels)
    latents = latents_of(found, config, source)
    built = models.build(config, shape, network.label_dim, latents)
    ours, theirs = export.network_settings(built.network), export.network_settings(network)
    differ = [
        f"{name} {theirs[name]}"
        for name in theirs
        if name != "dropout" and theirs[name] != ours.get(name)
    ]
    if differ:
        raise ValueError(
            f"{source}: no configuration describes its {', '.join(differ)}; use load_pretrained"
        )
    data_set = {"latents": dataclasses.asdict(latents)} if latents else None
    about = checkpoint.describe(config, shape, network.label_dim, data_set)
    return write_folder(out, config, found.variables, about)


def write_folder(
    out: str | os.PathLike,
    config: Config,
    variables: Mapping[str, PyTree],
    about: dict[str, Any],
    step: int = 0,
) -> int:
    """Writes a training folder with one checkpoint, whose optimiser is fresh; returns the number of
    parameters.

    Args:
      out: the folder.
      config: of the run.
      variables: {"params": ..., "buffers": ...}, the latter where there are any.
      about: what `checkpoint.describe` says.
      step: of the checkpoint.
    """
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables)
    params, buffers = variables["params"], variables.get("buffers", {})
    tx = optim.optimiser(config)
    zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)  # in JAX a program for each shape
    moments = jax.tree.map(zeros, jax.eval_shape(tx.init, params))
    start = state.TrainState(jnp.int32(step), params, params, buffers, moments, {})
    with lock.hold(out, field="--out"), checkpoint.Checkpoints(out) as folder:
        folder.save(step, start, about, {"step": step})
    return models.parameter_count(params)
