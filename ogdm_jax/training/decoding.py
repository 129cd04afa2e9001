"""What a run on latents needs of pixels: its autoencoder, and the images of its data."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import data, places
from ogdm_jax.config import Config, ConfigError
from ogdm_jax.data import Source, identity
from ogdm_jax.interop.autoencoder import Autoencoder, open_autoencoder
from ogdm_jax.latents import Latents
from ogdm_jax.models import VAE, Model
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling.decode import decode
from ogdm_jax.training.run import AnyRun
from ogdm_jax.typing import PyTree

RunT = TypeVar("RunT", bound=AnyRun)
_LOG = logging.getLogger("ogdm_jax")
MOST = 50_000  # images that samples are compared with
_BATCH = 64
_HOW = ("data_dir", "resolution", "channels")


def open_decoder(
    config: Config, latents: Latents, path: str = "", field: str = "config.data.vae"
) -> Autoencoder:
    """The autoencoder that decodes a run's latents, with the scale and the shift of its data.

    Args:
      config: of the run; its data.vae comes before the one that the data name.
      latents: what the data are.
      path: comes before both.
      field: the setting or option that would name another one, for messages.

    Raises:
      ConfigError: none is named, it is not there, it is another one than the data name, or of other
        latents.
    """
    given = path or config.data.vae
    named = given or str(latents.vae.get("path", ""))
    if not named:
        raise ConfigError(f"{field}: '' given; expected the autoencoder of these latents")
    missing = not given and not places.place(named, field).exists()
    if missing:
        raise ConfigError(
            f"{field}: not given, and the autoencoder that encoded {config.data.source} is no "
            f"longer at {named}; expected its file or folder"
        )
    found = open_autoencoder(named, field)
    wanted = latents.vae.get("sha256", found.sha256)
    if not given and found.sha256 != wanted:
        raise ConfigError(
            f"{field}: not given, and {named} has other weights ({found.sha256[:12]}) than those "
            f"that encoded {config.data.source} ({wanted[:12]}); expected these, or this one by "
            "name"
        )
    if found.network.latent_channels != latents.shape[-1]:
        raise ConfigError(
            f"{field}: {named} decodes {found.network.latent_channels} channels; expected "
            f"{latents.shape[-1]}, as {config.data.source} has"
        )
    network = found.network.clone(scale=latents.scale, shift=latents.shift)
    return dataclasses.replace(found, network=network)


def with_decoder(run: RunT, vae: str = "") -> RunT:
    """The run with the decoder of its latents; vae: where config.data.vae names none.

    Raises:
      ConfigError: there is none, and config.evaluate.features wants images.
    """
    source, vae = run.source, run.config.data.vae or vae
    if source.latents is None:
        return run
    try:
        return dataclasses.replace(run, decoder=open_decoder(run.config, source.latents, vae))
    except ConfigError as error:
        if run.config.evaluate.features or vae:
            raise
        notes = (*source.notes, f"no pictures of samples are written: {error}")
        return dataclasses.replace(run, source=dataclasses.replace(source, notes=notes))


def attach(model: Model, buffers: PyTree, decoder: Autoencoder | None) -> tuple[Model, PyTree]:
    """A model whose samples are decoded, and its buffers; unchanged without a decoder."""
    if decoder is None:
        return model, buffers
    model = dataclasses.replace(model, autoencoder=decoder.network)
    return model, {**buffers, VAE: decoder.variables}


def pixels(source: Source, opened: Callable[[], Autoencoder | None]) -> Source:
    """The images that samples are compared with: the source itself, or what its latents were made
    of where that is there and the same, else what the autoencoder makes of the latents' means.

    Args:
      source: the data of a run.
      opened: its autoencoder, asked for where it is needed.
    """
    if source.latents is None:
        return source
    about = source.latents.pixels
    name, why = about.get("name", ""), "the set does not name its images"
    if name:
        how: dict[str, Any] = {key: about.get(key) for key in _HOW}
        try:
            found = data.open_source(name, **how)
        except data.SourceError as error:
            why = f"its images cannot be opened ({error})"
        else:
            differs = identity.difference(about.get("data_set", {}), data.fingerprint(found))
            if not differs:
                return found
            why = f"{name} has changed ({differs})"
    decoder = opened()
    if decoder is None:
        raise ConfigError(f"{source.name}: {why}, and there is no autoencoder: expected data.vae")
    rows = data.spread(len(source), MOST)
    part = f" ({len(rows):,} of {len(source):,})" if len(rows) < len(source) else ""
    _LOG.warning("%s: compared with decoded latents%s, as %s", source.name, part, why)
    labels = None if source.labels is None or source.captions else source.labels[rows]
    starts = range(0, len(rows), _BATCH)
    parts = [_decoded(source, decoder, rows[i : i + _BATCH]) for i in starts]
    images = np.concatenate(parts)
    return data.from_arrays(f"{source.name}, decoded", images, labels, source.class_names)


def _decoded(source: Source, decoder: Autoencoder, rows: np.ndarray) -> np.ndarray:
    """uint8 images of the means of rows."""
    assert source.latents is not None
    items = source.take(np.resize(rows, _BATCH))["image"][:, 0].astype(np.float32)
    z = source.latents.scaled_of(items[..., : source.shape[-1]])
    images = _decode(decoder.network, decoder.variables, jnp.asarray(z))
    return to_uint8(np.asarray(images))[: len(rows)]


_decode = jax.jit(decode, static_argnums=0)
