"""PyTorch names of EDM's networks <-> variables of SongUNet and DhariwalUNet.

Their code is NVlabs/edm; stf and OGDM_edm use it.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ogdm_jax.interop import names_shared as shared
from ogdm_jax.networks.adm import DhariwalUNet
from ogdm_jax.networks.unet import SongUNet
from ogdm_jax.typing import PyTree

EdmNetwork = SongUNet | DhariwalUNet
_PRECONDITIONING = ("use_fp16", "sigma_min", "sigma_max", "sigma_data")  # no network's
_RESAMPLED = ("_up.conv0", "_up.skip", "_down.conv0", "_down.skip", "_aux_residual")


def edm_network(settings: Mapping[str, Any], cls: str = "EDMPrecond", **more: Any) -> EdmNetwork:
    """The network of the authors' constructor arguments.

    Args:
      settings: keyword arguments of EDMPrecond, VPPrecond, VEPrecond or iDDPMPrecond
        (network-snapshot's init_kwargs).
      cls: that class; iDDPMPrecond's network has twice the output channels.
      **more: further attributes, such as dtype.

    Raises:
      ValueError: an unknown model_type or argument.
    """
    kinds: dict[Any, type[EdmNetwork]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
    settings = dict(settings)
    default = "DhariwalUNet" if cls in ("EDMPrecond", "iDDPMPrecond") else "SongUNet"
    model_type = settings.pop("model_type", default)
    if model_type not in kinds:
        raise ValueError(f"model_type: {model_type!r} given; expected one of {', '.join(kinds)}")
    for name in _PRECONDITIONING:
        settings.pop(name, None)
    if cls == "iDDPMPrecond":
        settings["out_channels"] = 2 * settings.get("img_channels", 3)
    return shared.make(kinds[model_type], settings | more)


def edm_entries(network: EdmNetwork) -> list[shared.Entry]:
    """Every tensor of the network, Fourier frequencies included, under both names.

    PyTorch's names start with "model.".
    """
    entries = []
    for path, shape in shared.variable_shapes(network, *shared.image_input(network)).items():
        *modules, leaf = path[1:]
        heads = network.heads(shape[-1] // 3) if modules[-1] == "qkv" else 0
        name = ".".join(["model", *modules, shared.LEAVES.get(leaf, leaf)])
        name = re.sub(r"\.(enc|dec)_", r".\1.", name)
        entries.append(shared.Entry(name, path, shape, heads=heads, order=shared.EDM_ORDER))
    return entries


def _resample_filters(network: EdmNetwork, names: list[str]) -> dict[str, np.ndarray]:
    """The buffers that the authors' resampling layers construct: name -> [1,1,k,k]."""
    taps = np.asarray(getattr(network, "resample_filter", (1, 1)), np.float32)
    value = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]
    blocks = {name.rsplit(".", 2)[0] for name in names if name.endswith(".affine.weight")}
    layers = {f"{block}.{part}" for block in blocks for part in ("conv0", "skip")}
    layers |= {
        name.removesuffix(".weight") for name in names if name.endswith("_aux_residual.weight")
    }
    return {f"{layer}.resample_filter": value for layer in layers if layer.endswith(_RESAMPLED)}


def is_constant(name: str) -> bool:
    """Whether the tensor is none of the network's: a resampling filter, or iDDPM's table `u`."""
    return name.endswith(".resample_filter") or name in ("u", "model.u")


def edm_to_flax(state: Mapping[str, np.ndarray], network: EdmNetwork) -> PyTree:
    """Variables of the network from a state dict.

    The state is that of the preconditioned model, or of the network alone (names without "model.").
    Constants (`is_constant`) are ignored where present. qkv channels are permuted to ours.

    Returns:
      {"params": ...}, and "buffers" for Fourier frequencies; numpy arrays, at least float32.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    if not any(name.startswith("model.") for name in state):
        state = {f"model.{name}": value for name, value in state.items()}
    constants = filter(is_constant, state)
    return shared.to_flax(state, edm_entries(network), "a network of EDM", constants)


def flax_to_edm(
    variables: PyTree, network: EdmNetwork, constants: bool = False
) -> dict[str, np.ndarray]:
    """The inverse of edm_to_flax: {PyTorch name: array}; {"params": gradients} maps gradients.

    constants: also the resampling filters, for load_state_dict(strict=True) in the authors' code.
    """
    state = shared.to_torch(variables, edm_entries(network))
    return state | _resample_filters(network, list(state)) if constants else state
