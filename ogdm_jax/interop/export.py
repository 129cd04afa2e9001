"""Weights that others can read: .safetensors or .pt under the authors' names, and JSON beside it.

The JSON file says what tensors cannot: {"format": 1, "kind", "settings", "precondition",
"sigma_data", "dropout", ...}. The tensor names are those of the official code, so that its
load_state_dict takes them as they are.
"""

import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from ogdm_jax import networks, places, records
from ogdm_jax.interop import (
    diffusers,
    names_adm,
    names_discriminator,
    names_edm,
    names_inception,
    names_latent,
    torch_writer,
)
from ogdm_jax.interop.settings import check_about
from ogdm_jax.typing import PyTree

FORMAT = diffusers.OURS
SUFFIXES = (".safetensors", ".pt")
_TO_TORCH = {
    networks.SongUNet: functools.partial(names_edm.flax_to_edm, constants=True),
    networks.DhariwalUNet: functools.partial(names_edm.flax_to_edm, constants=True),
    networks.ADMUNet: names_adm.flax_to_adm,
    networks.ADMEncoder: names_adm.flax_to_adm,
    networks.StyleGAN2Discriminator: names_discriminator.flax_to_discriminator,
    networks.InceptionV3: names_inception.flax_to_inception,
    networks.DiT: names_latent.flax_to_dit,
    networks.AutoencoderKL: names_latent.flax_to_vae,
    networks.UNet2DCondition: names_latent.flax_to_sd_unet,
    networks.CLIPText: names_latent.flax_to_clip,
}


def about_path(path: str | os.PathLike) -> epath.Path:
    """Where the JSON file of an exported file is."""
    return places.place(path).with_suffix(".json")


def check_out(path: str | os.PathLike) -> epath.Path:
    """The path to export to. Raises ValueError unless it can be written, by this name."""
    path = places.place(path, "--out")
    if path.suffix not in SUFFIXES:
        ends = " or ".join(SUFFIXES)
        raise ValueError(f"--out: {str(path)!r} given; expected a name that ends in {ends}")
    return places.writable(path, "--out", file=True)


def write(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    beside: epath.Path | None = None,
) -> epath.Path:
    """Writes state as path (.safetensors, or .pt as torch.save) and about beside it: where
    `about_path` says, or as `beside`, config.json of a folder. Returns the path.

    Raises:
      ValueError: path ends in neither.
    """
    path = check_out(path)
    with places.written(path) as new:
        if path.suffix == ".pt":
            torch_writer.write(new, state)
        else:
            save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, new)
    write_about(beside or about_path(path), about)
    return path


def write_about(path: epath.Path, about: Mapping[str, Any]) -> None:
    """Writes the JSON file that says what tensors do not show."""
    records.write(path, _sorted({"format": FORMAT, **about}), indent=1)


def check_free(files: Iterable[epath.Path], note: epath.Path) -> None:
    """Checks that nothing but an earlier export is replaced.

    Args:
      files: that will be written.
      note: the JSON file among them that says whether the others are of an export.

    Raises:
      ValueError: one of the files is there and the note is not of an export.
    """
    there = [file for file in files if file.exists()]
    try:
        about = records.read(note, dict) if there else {}
    except records.RecordError:
        about = {}
    ours = about.get("format") == FORMAT and "config" in about
    if there and not ours and about.get(diffusers.MARK) != FORMAT:
        raise ValueError(
            f"--out: {str(there[0])!r} is there already, and no export wrote it; expected a new "
            "place, or that of an earlier export"
        )


def _sorted(value: Any) -> Any:
    return {k: _sorted(v) for k, v in sorted(value.items())} if isinstance(value, dict) else value


def read_about(path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON file beside an exported file, or what diffusers' config.json says of
    weights beside it; None where there is neither.

    Raises:
      ValueError: it is no JSON of this format, or one of its values is out of range.
    """
    suffix = places.place(path).suffix
    if suffix not in SUFFIXES or not about_path(path).is_file():
        return diffusers.read_about(places.place(path))
    try:
        about = records.read(about_path(path), dict, "the JSON beside the weights")
    except records.RecordError:
        about = {}
        if suffix == ".safetensors":
            raise
    if about and not about.keys() & {"format", "config"}:
        return None  # JSON of another program, which lies beside its weights
    if about.pop("format", None) != FORMAT:
        if suffix == ".pt":
            return None
        raise ValueError(
            f'{about_path(path)}: is not what export writes; expected "format": {FORMAT}'
        )
    check_about(about, f"{about_path(path)}: ")
    return about


def network_settings(network: nn.Module) -> dict[str, Any]:
    """A network's attributes as JSON values, without dtype, remat and those of flax."""
    skipped = ("parent", "name", "dtype", "remat")
    values = {
        field: getattr(network, field)
        for field in network.__dataclass_fields__
        if field not in skipped
    }
    return {field: list(v) if isinstance(v, tuple) else v for field, v in values.items()}


def to_torch(network: nn.Module, variables: PyTree) -> dict[str, np.ndarray]:
    """{PyTorch name: array} of a network.

    EDM's networks get the resampling filters that a strict load_state_dict wants, OpenAI's their
    legacy order of qkv channels.

    Raises:
      ValueError: a network of a kind that has no PyTorch names.
    """
    for kind, convert in _TO_TORCH.items():
        if isinstance(network, kind):
            return convert(variables, network)
    raise ValueError(f"network: {type(network).__name__} given; expected one of ogdm_jax.networks")
