"""PyTorch names of OGDM's discriminator (both released repositories) <-> the parameters of
StyleGAN2Discriminator.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from ogdm_jax.networks.discriminator import StyleGAN2Discriminator
from ogdm_jax.typing import PyTree

_FLATTENED = "b4.fc"  # PyTorch flattens its 4x4 input as (c, h, w), ours is (h, w, c)
_SIDE = 4


def _kernel_to_flax(module: str, weight: np.ndarray) -> np.ndarray:
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    if module == _FLATTENED:
        out = weight.shape[0]
        return weight.reshape(out, -1, _SIDE, _SIDE).transpose(2, 3, 1, 0).reshape(-1, out)
    return weight.T


def _kernel_to_torch(module: str, kernel: np.ndarray) -> np.ndarray:
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    if module == _FLATTENED:
        out = kernel.shape[1]
        return kernel.reshape(_SIDE, _SIDE, -1, out).transpose(3, 2, 0, 1).reshape(out, -1)
    return kernel.T


def discriminator_modules(network: StyleGAN2Discriminator) -> list[str]:
    """Dotted names of the layers with parameters, in the order in which PyTorch registers them."""
    sides = [2**i for i in range(int(math.log2(network.img_resolution)), 2, -1)]
    blocks = [
        f"b{side}.{layer}" for side in sides for layer in ("fromrgb", "conv0", "conv1", "skip")
    ]
    blocks = [
        name for name in blocks if not name.endswith("fromrgb") or name.startswith(f"b{sides[0]}.")
    ]
    mapping = ["mapping.embed", *(f"mapping.fc{i}" for i in range(8))]
    return [*blocks, *mapping, "b4.conv", "b4.fc", "b4.out"]


def discriminator_to_flax(
    state: Mapping[str, np.ndarray], network: StyleGAN2Discriminator
) -> PyTree:
    """Parameters of the network from a PyTorch state dict; resampling filters (buffers) are
    constants and ignored.

    Returns:
      {"params": ...} of numpy arrays in the state's dtypes.

    Raises:
      ValueError: a parameter is missing, or the state has one that the network lacks.
    """
    left = {name for name in state if not name.endswith("resample_filter")}
    params: dict = {}
    for module in discriminator_modules(network):
        names = [f"{module}.weight"] + ([] if module.endswith("skip") else [f"{module}.bias"])
        for name in names:
            if name not in left:
                raise ValueError(
                    f"state: {name} is missing; expected a discriminator for "
                    f"{network.img_resolution} pixels"
                )
            left.remove(name)
            block, layer = module.split(".")
            value = np.asarray(state[name])
            leaf, value = (
                ("kernel", _kernel_to_flax(module, value))
                if name.endswith("weight")
                else ("bias", value)
            )
            params.setdefault(block, {}).setdefault(layer, {})[leaf] = value
    if left:
        raise ValueError(
            f"state: {min(left)} has no place in the network; expected a discriminator's tensors "
            "only"
        )
    return {"params": params}


def flax_to_discriminator(
    variables: PyTree, network: StyleGAN2Discriminator
) -> dict[str, np.ndarray]:
    """The inverse of discriminator_to_flax: {PyTorch name: array}, parameters only (gradients can
    be mapped, too).
    """
    state = {}
    for module in discriminator_modules(network):
        block, layer = module.split(".")
        leaves = variables["params"][block][layer]
        state[f"{module}.weight"] = np.ascontiguousarray(
            _kernel_to_torch(module, np.asarray(leaves["kernel"]))
        )
        if "bias" in leaves:
            state[f"{module}.bias"] = np.asarray(leaves["bias"])
    return state


def discriminator_settings(state: Mapping[str, np.ndarray], t_dim: int = 2) -> dict[str, int]:
    """Constructor settings that a state dict implies: side, image channels, classes, and the
    channel limits.

    Raises:
      ValueError: no b{side}.fromrgb.weight, so this is no such discriminator.
    """
    first = [name for name in state if re.fullmatch(r"b\d{1,6}\.fromrgb\.weight", name)]
    if len(first) != 1:
        raise ValueError(
            f"state: {len(first)} tensors b*.fromrgb.weight found; expected one in an OGDM "
            "discriminator"
        )
    side = int(first[0].split(".")[0][1:])
    widths = {
        s: state[f"b{s}.conv0.weight"].shape[0] for s in (2**i for i in range(3, 12)) if s <= side
    }
    widths[4] = state["b4.out.weight"].shape[1]
    limit = max(widths.values())
    # Channels are min(base // side, limit): a side below the limit tells the base, otherwise any
    # large base will do.
    base = next(
        (w * s for s, w in sorted(widths.items(), reverse=True) if w < limit),
        max(32768, limit * side),
    )
    return {
        "img_resolution": side,
        "img_channels": int(state[first[0]].shape[1]),
        "label_dim": int(state["mapping.embed.weight"].shape[1]) - t_dim,
        "t_dim": t_dim,
        "channel_base": int(base),
        "channel_max": int(limit),
    }
