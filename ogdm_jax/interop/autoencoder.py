"""A frozen autoencoder of a file or folder: what encodes images and decodes latents."""

import dataclasses
import functools
import os
from typing import Any, cast

import jax
import numpy as np

from ogdm_jax import models, places
from ogdm_jax.config import ConfigError
from ogdm_jax.interop.pretrained import load_pretrained
from ogdm_jax.networks import AutoencoderKL
from ogdm_jax.networks.vae import posterior
from ogdm_jax.pixels import to_float
from ogdm_jax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """An autoencoder with its weights, which reach compiled functions as arguments.

    Attributes:
      network: its scale and shift are those of its file.
      variables: {"params": ...}.
      path: that was given.
      notes: of reading it, a sentence each.
    """

    network: AutoencoderKL
    variables: PyTree
    path: str
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def sha256(self) -> str:
        """Of names, shapes and values of the weights, whatever file they are in; 64 digits."""
        return models.fingerprint(self.variables).tobytes().hex()

    @functools.cached_property
    def _moments(self) -> Any:
        def moments(variables: PyTree, images: Array) -> tuple[Array, Array]:
            found = self.network.apply(variables, to_float(images), method="encode")
            return posterior(cast(Array, found))

        return jax.jit(moments)

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) [n,h,w,z] float32, unscaled, of uint8 images [n,H,W,C]."""
        mean, std = self._moments(self.variables, images)
        return np.asarray(mean), np.asarray(std)


def open_autoencoder(path: str | os.PathLike, field: str = "--vae") -> Autoencoder:
    """The autoencoder of a file, of a diffusers folder, or of such a folder's `vae`.

    Raises:
      ConfigError: there is none, or the file is refused.
    """
    try:
        place = places.local(path, field)
        inside = place / "vae"
        found = load_pretrained(inside if inside.is_dir() else place, "autoencoder")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: {error}") from None
    return Autoencoder(cast(AutoencoderKL, found.network), found.variables, str(path), found.notes)
