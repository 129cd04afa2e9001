"""A network as diffusers keeps it: a folder of config.json and diffusion_pytorch_model.safetensors.

The JSON file says what the tensors cannot; a field that it lacks has diffusers' default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save_file

from ogdm_jax import places, records
from ogdm_jax.networks.vae import AutoencoderKL

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# class -> kind, and {its field: (our setting, diffusers' default)} of what the tensors do not show
_CLASSES: dict[str, tuple[str, dict[str, tuple[str, Any]]]] = {
    "AutoencoderKL": (
        "autoencoder",
        {
            "norm_num_groups": ("groups", 32),
            "scaling_factor": ("scale", 0.18215),
            "shift_factor": ("shift", 0.0),
        },
    )
}


def weights(folder: Path) -> Path | None:
    """The file of weights in a folder of a known class; None in any other."""
    found = [folder / WEIGHTS, folder / WEIGHTS.replace("safetensors", "bin")]
    found = [file for file in found if file.is_file()]
    return found[0] if found and read_about(found[0]) else None


def read_about(file: Path | epath.Path) -> dict[str, Any] | None:
    """{"kind", "settings"} of weights beside the config.json of a known class, else None.

    Raises:
      ValueError: no JSON, or statistics of each channel in place of one scale.
    """
    path = file.parent / CONFIG
    if not file.name.startswith("diffusion_pytorch_model.") or not path.is_file():
        return None
    config = records.read(path, dict)
    name = config.get("_class_name")
    if not isinstance(name, str) or (name := name.removeprefix("Flax")) not in _CLASSES:
        return None
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ValueError(
            f"{path}: latents_mean and latents_std given; expected one scaling_factor for all "
            "channels"
        )
    kind, fields = _CLASSES[name]
    told = {}
    for theirs, (ours, default) in fields.items():
        value = config.get(theirs)
        told[ours] = default if value is None else value
    return {"kind": kind, "settings": told}


def write_autoencoder(
    folder: epath.Path, network: AutoencoderKL, state: Mapping[str, np.ndarray], side: int
) -> None:
    """Writes an autoencoder as `AutoencoderKL.from_pretrained(folder)` reads it.

    Args:
      folder: made where it is missing.
      network: its attributes, scale and shift among them.
      state: {diffusers' name: array}, as `export.to_torch` gives it.
      side: of the images that it was trained on.
    """
    levels = len(network.widths)
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(network.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": network.img_channels,
        "latent_channels": network.latent_channels,
        "layers_per_block": network.num_blocks,
        "norm_num_groups": network.groups,
        "out_channels": network.img_channels,
        "sample_size": side,
        "scaling_factor": network.scale,
        "shift_factor": network.shift or None,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    with places.written(folder / WEIGHTS) as new:
        save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, new)
    with places.written(folder / CONFIG) as new:
        new.write_text(records.dumps(config, indent=1) + "\n")
