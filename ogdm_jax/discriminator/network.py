"""The network of a discriminator's configuration, its extractor, and its log ratio."""

import os
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from etils import epath

from ogdm_jax import models, places
from ogdm_jax.config import Config, require
from ogdm_jax.discriminator.settings import of
from ogdm_jax.interop import export
from ogdm_jax.interop.pretrained import load_pretrained
from ogdm_jax.methods import dg
from ogdm_jax.networks import ADMEncoder, feature_discriminator
from ogdm_jax.networks.feature_discriminator import FeatureDiscriminator
from ogdm_jax.typing import Array, LogRatio, PyTree

SETTINGS = (  # what a discriminator has of config.network
    *("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "head_channels"),
    *("dropout", "remat"),
)


def open_network(
    config: Config, image_shape: tuple[int, int, int], num_classes: int, workdir: str | os.PathLike
) -> tuple[FeatureDiscriminator, PyTree]:
    """The network of a configuration and the parameters of its extractor.

    Args:
      config: of a discriminator.
      image_shape: (h, w, c).
      num_classes: of the data source, 0 if it has none.
      workdir: the training folder; its copy of the extractor comes before config.dg.extractor.

    Returns:
      (network, params of the extractor, or None without one).

    Raises:
      ConfigError: settings that do not fit.
      ValueError: an extractor file that is none, or for other images.
    """
    extractor, params = _open_extractor(of(config).extractor, workdir)
    conditional, classes = config.data.conditional, of(config).classes or num_classes
    labelled = "a source with class labels"
    require(not conditional or num_classes > 0, "data.conditional", conditional, labelled)
    enough = f"at least the source's {num_classes}"
    require(classes >= num_classes, "dg.classes", classes, enough)
    network = feature_discriminator.build(
        image_shape[0],
        image_shape[2],
        classes if conditional else 0,
        extractor,
        dtype=getattr(jnp, config.network.dtype),
        **{name: getattr(config.network, name) for name in SETTINGS},
    )
    models.check_widths(network.head, config.network)
    return network, params


def _open_extractor(
    name: str, workdir: str | os.PathLike
) -> tuple[ADMEncoder | None, PyTree | None]:
    """(extractor, its params) of the file in the training folder, else of the named one."""
    if not name:
        return None, None
    copy = _copy_path(workdir)
    kept = (copy, export.about_path(copy)) if copy.is_file() else ()
    with places.fetched(*kept) as files:
        path = files[0] if files else places.local(name, "config.dg.extractor")
        found = load_pretrained(path, "adm_encoder")
    return cast(ADMEncoder, found.network), found.variables["params"]


def keep_extractor(
    network: FeatureDiscriminator, params: PyTree, workdir: str | os.PathLike
) -> None:
    """Copies the extractor into the training folder, if it is not there yet.

    Sampling then needs no file from elsewhere.
    """
    path = _copy_path(workdir)
    if network.extractor is None or path.is_file() or jax.process_index() != 0:
        return
    about = {"kind": "adm_encoder", "settings": export.network_settings(network.extractor)}
    export.write(path, export.to_torch(network.extractor, {"params": params}), about)


def _copy_path(workdir: str | os.PathLike) -> epath.Path:
    return places.place(workdir) / "extractor.safetensors"


def ratio_of(
    network: FeatureDiscriminator, clock: str, clip: float = 1e-5, dropout: Array | None = None
) -> Callable[[PyTree], LogRatio]:
    """{"params", "extractor"} -> log_ratio(x, sigma, label) in x = x0 + sigma eps.

    Training and guidance both use it, so what is trained is what guides.

    Args:
      network: the discriminator.
      clock: see `dg.log_ratio`.
      clip: see `dg.log_ratio`; training passes 0, no clipping.
      dropout: [B] typed keys while training; None switches dropout off.
    """

    def make(constants: PyTree) -> LogRatio:
        def logit(x_vp: Array, time: Array, label: Array | None) -> Array:
            params, extractor = constants["params"], constants["extractor"]
            return network.logit(params, extractor, x_vp, time, label, dropout)

        return dg.log_ratio(logit, clip, clock)

    return make
