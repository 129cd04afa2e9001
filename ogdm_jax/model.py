"""A configuration's network and preconditioning as one pure function of parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ogdm_jax.config import choose, require
from ogdm_jax.diffusion import precondition
from ogdm_jax.networks import DhariwalUNet, SongUNet
from ogdm_jax.typing import Array, Denoise, PyTree

_NETWORKS = {"song": SongUNet, "dhariwal": DhariwalUNet}
_SONG_ONLY = ("embedding_type", "encoder_type", "resample_filter")
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and how it becomes a denoiser; no parameters inside."""

    network: nn.Module
    wrap: Callable[[Any], Denoise]
    image_shape: tuple[int, int, int]
    label_dim: int

    def init(self, key: Array) -> tuple[PyTree, PyTree]:
        """Fresh (params, buffers): trained tensors, and frozen ones such as Fourier frequencies ({} if none)."""
        x = jnp.zeros((1, *self.image_shape))
        label = jnp.zeros((1,), jnp.int32) if self.label_dim else None
        augment = jnp.zeros((1, self.network.augment_dim)) if self.network.augment_dim else None
        variables = self.network.init({"params": key}, x, jnp.zeros((1,)), label, augment)
        return variables["params"], dict(variables.get("buffers", {}))

    def denoiser(self, params: PyTree, buffers: PyTree | None = None) -> Denoise:
        """denoise(x, sigma, label=None, **extra) of these parameters."""
        variables = {"params": params, **({"buffers": buffers} if buffers else {})}
        return self.wrap(
            lambda x, c_noise, label=None, **extra: self.network.apply(variables, x, c_noise, label, **extra)
        )


def build(config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int) -> Model:
    """The model of a configuration for images of this shape.

    Args:
      config: base.py's groups network, precondition and data.
      image_shape: (h, w, c), square with a side that the levels of the network divide.
      num_classes: classes of the data source, 0 if it has none.

    Raises:
      ConfigError: unknown kind, labels wanted from a source without any, or a size the network cannot halve.
    """
    height, width, channels = image_shape
    net = config.network
    levels = 2 ** (len(net.channel_mult) - 1)
    require(
        height == width and height % levels == 0,
        "network.channel_mult",
        tuple(net.channel_mult),
        f"a number of levels whose {levels}-fold reduction divides square images (the source has {height}x{width})",
    )
    conditional = config.data.conditional
    require(not conditional or num_classes > 0, "data.conditional", conditional, "a source with class labels")
    kind = choose("precondition.kind", config.precondition.kind, ("edm", "vp", "ve", "iddpm"))
    settings = {k: v for k, v in net.items() if k not in ("kind", "dtype")}
    if net.kind == "song":
        settings["channel_mult_noise"] = 2 if net.embedding_type == "fourier" else 1
    else:
        settings = {k: v for k, v in settings.items() if k not in _SONG_ONLY}
    network = choose("network.kind", net.kind, _NETWORKS)(
        img_resolution=height,
        img_channels=channels,
        out_channels=channels * (2 if kind == "iddpm" else 1),
        label_dim=num_classes if conditional else 0,
        augment_dim=9 if config.data.augment > 0 else 0,
        dtype=choose("network.dtype", net.dtype, _DTYPES),
        **settings,
    )
    wrap = precondition.edm if kind == "edm" else getattr(precondition, kind)
    if kind == "edm":
        sigma_data = config.precondition.sigma_data
        require(sigma_data > 0, "precondition.sigma_data", sigma_data, "a positive number")
        return Model(network, lambda f: wrap(f, sigma_data), image_shape, network.label_dim)
    return Model(network, wrap, image_shape, network.label_dim)


def parameter_count(params: PyTree) -> int:
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
