"""PyTorch names of OGDM's discriminator <-> the parameters of StyleGAN2Discriminator.

Both released repositories (OGDM_edm, OGDM_adm) have the same names.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop import names_shared as shared
from ogdm_jax.networks.discriminator import StyleGAN2Discriminator
from ogdm_jax.typing import PyTree

_FLATTENED = ("params", "b4", "fc", "kernel")  # reads a flattened 4x4 image


def discriminator_modules(network: StyleGAN2Discriminator) -> list[str]:
    """Dotted names of the layers with parameters, in the order in which PyTorch registers them."""
    sides = [2**i for i in range(int(math.log2(network.img_resolution)), 2, -1)]
    blocks = [f"b{side}.{layer}" for side in sides for layer in ("conv0", "conv1", "skip")]
    mapping = ["mapping.embed", *(f"mapping.fc{i}" for i in range(8))]
    return [f"b{sides[0]}.fromrgb", *blocks, *mapping, "b4.conv", "b4.fc", "b4.out"]


def discriminator_entries(network: StyleGAN2Discriminator) -> list[shared.Entry]:
    """Every parameter under both names, in the order in which PyTorch registers the layers."""
    side, channels, struct = network.img_resolution, network.img_channels, jax.ShapeDtypeStruct
    widths = [network.t_dim, *([network.label_dim] if network.label_dim else [])]
    inputs = [struct((4, side, side, channels), jnp.float32)]  # a group of minibatch statistics
    inputs += [struct((4, width), jnp.float32) for width in widths]
    shapes = shared.variable_shapes(network, *inputs)
    entries = []
    for module in discriminator_modules(network):
        for leaf in ("kernel", "bias"):
            path = ("params", *module.split("."), leaf)
            if path in shapes:
                name = f"{module}.{shared.LEAVES[leaf]}"
                layout = "chw" if path == _FLATTENED else "auto"
                entries.append(shared.Entry(name, path, shapes[path], layout))
    return entries


def is_constant(name: str) -> bool:
    """Whether the tensor is a resampling filter, which our network computes."""
    return name.endswith("resample_filter")


def discriminator_to_flax(
    state: Mapping[str, np.ndarray], network: StyleGAN2Discriminator
) -> PyTree:
    """{"params": ...} from a PyTorch state dict; arrays are at least float32.

    Raises:
      ValueError: a parameter is missing, has another shape, or has no place in the network.
    """
    what = f"OGDM's discriminator of {network.img_resolution} pixels"
    entries = discriminator_entries(network)
    return shared.to_flax(state, entries, what, filter(is_constant, state))


def flax_to_discriminator(
    variables: PyTree, network: StyleGAN2Discriminator
) -> dict[str, np.ndarray]:
    """The inverse of discriminator_to_flax; {"params": gradients} maps gradients."""
    return shared.to_torch(variables, discriminator_entries(network))


def discriminator_settings(state: Mapping[str, np.ndarray], t_dim: int = 2) -> dict[str, int]:
    """Constructor settings that a state dict implies.

    They are side, image channels, classes and the limits of the layers' channels. t_dim is the
    width of the condition that is not the label's.

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
