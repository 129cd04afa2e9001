"""PyTorch names of OpenAI's ADM networks (guided-diffusion, OGDM_adm, DSG, DG) <-> variables of
ADMUNet, ADMEncoder.
"""

from collections.abc import Mapping

import jax
import numpy as np

from ogdm_jax.interop import names_shared as shared
from ogdm_jax.networks.adm_openai import ADMEncoder, ADMUNet
from ogdm_jax.typing import PyTree

_ORDERS = {"legacy": shared.LEGACY_ORDER, "new": shared.NEW_ORDER}
# layer of a block -> (child of OpenAI's entry: 0 the residual block, 1 the attention; its layer)
_BLOCK = {
    "norm0": (0, "in_layers.0"),
    "conv0": (0, "in_layers.2"),
    "affine": (0, "emb_layers.1"),
    "norm1": (0, "out_layers.0"),
    "conv1": (0, "out_layers.3"),
    "skip": (0, "skip_connection"),
    "norm2": (1, "norm"),
    "qkv": (1, "qkv"),
    "proj": (1, "proj_out"),
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _prefixes(network: ADMUNet | ADMEncoder) -> dict[str, str]:
    """Our block -> OpenAI's entry. An up-sampling is the last child of the block in front of it:
    a.b.child.
    """
    sides, depth, attended = network.sides, network.num_blocks, network.attn_resolutions
    encoder = [f"enc_{sides[0]}x{sides[0]}_conv"]
    for level, side in enumerate(sides):
        encoder += [f"enc_{side}x{side}_down"] if level else []
        encoder += [f"enc_{side}x{side}_block{i}" for i in range(depth)]
    found = {name: f"input_blocks.{i}" for i, name in enumerate(encoder)}
    last = sides[-1]
    found[f"dec_{last}x{last}_in0"], found[f"dec_{last}x{last}_in1"] = (
        "middle_block",
        "middle_block.2",
    )
    j = 0
    for side, next_side in zip(sides[::-1], [*sides[-2::-1], None], strict=True):
        for i in range(depth + 1):
            found[f"dec_{side}x{side}_block{i}"] = f"output_blocks.{j}"
            j += 1
        if next_side:
            found[f"dec_{next_side}x{next_side}_up"] = (
                f"output_blocks.{j - 1}.{2 if side in attended else 1}"
            )
    return found


def _outside(network: ADMUNet | ADMEncoder) -> dict[str, str]:
    """Our modules outside the blocks -> OpenAI's."""
    names = {
        "map_layer0": "time_embed.0",
        "map_layer1": "time_embed.2",
        "map_label": "label_emb",
        "out_norm": "out.0",
    }
    if isinstance(network, ADMUNet):
        return names | {"out_conv": "out.2"}
    heads = {
        "attention": {"out_pool": "out.2"},
        "adaptive": {"out_conv": "out.3"},
        "spatial": {"out_dense0": "out.0", "out_dense1": "out.2"},
        "spatial_v2": {"out_dense0": "out.0", "out_norm": "out.1", "out_dense1": "out.3"},
    }
    return names | heads[network.pool]


def adm_entries(network: ADMUNet | ADMEncoder, qkv_order: str = "legacy") -> list[shared.Entry]:
    """Every tensor under both names. qkv_order: "legacy" or "new" (use_new_attention_order) of the
    checkpoint.
    """
    if qkv_order not in _ORDERS:
        raise ValueError(f"qkv_order: {qkv_order!r} given; expected 'legacy' or 'new'")
    prefixes, outside = _prefixes(network), _outside(network)
    entries = []
    for path, shape in shared.variable_shapes(network, *shared.image_input(network)).items():
        first, *inner, leaf = path[1:]
        weight, layout, heads = _LEAVES.get(leaf, leaf), "auto", 0
        if first in outside:
            name = ".".join([outside[first], *inner, weight])
            layout = (
                "same"
                if first == "map_label"
                else "conv1d"
                if inner and leaf == "kernel"
                else "auto"
            )
        elif inner:
            child, layer = _BLOCK[inner[0]]
            prefix = prefixes[first]
            # An up-sampling block and middle_block.2 name their only child already.
            alone = prefix.count(".") == 2 or prefix == "middle_block.2"
            name = f"{prefix}.{layer}.{weight}" if alone else f"{prefix}.{child}.{layer}.{weight}"
            layout = "conv1d" if child == 1 and leaf == "kernel" else "auto"
            heads = network.heads(shape[-1] // 3) if inner[0] == "qkv" else 0
        else:  # a convolution by itself: the first one, or resampling without a residual block
            prefix = prefixes[first]
            middle = (
                ".conv" if first.endswith("_up") else ".0.op" if first.endswith("_down") else ".0"
            )
            name = f"{prefix}{middle}.{weight}"
        entries.append(shared.Entry(name, path, tuple(shape), layout, heads, _ORDERS[qkv_order]))
    return entries


def adm_to_flax(
    state: Mapping[str, np.ndarray], network: ADMUNet, qkv_order: str = "legacy"
) -> PyTree:
    """Variables {"params": ...} of the network from a guided-diffusion state dict; arrays are at
    least float32.

    Args:
      qkv_order: the checkpoint's order of attention channels; 64x64_diffusion.pt is "new", the
        others "legacy".

    Raises:
      ValueError: an unknown order; a tensor is missing, has another shape, or has no place in the
      network.
    """
    return shared.to_flax(state, adm_entries(network, qkv_order), "a U-Net of guided-diffusion")


def flax_to_adm(
    variables: PyTree, network: ADMUNet, qkv_order: str = "legacy"
) -> dict[str, np.ndarray]:
    """The inverse of adm_to_flax; {"params": gradients} maps gradients."""
    return shared.to_torch(jax.device_get(variables), adm_entries(network, qkv_order))


def adm_encoder_to_flax(
    state: Mapping[str, np.ndarray], network: ADMEncoder, qkv_order: str = "legacy"
) -> PyTree:
    """As adm_to_flax for a classifier, or DG's extractor or head. The pool's own attention is
    always in new order.
    """
    return shared.to_flax(state, adm_entries(network, qkv_order), "an encoder of guided-diffusion")


def flax_to_adm_encoder(
    variables: PyTree, network: ADMEncoder, qkv_order: str = "legacy"
) -> dict[str, np.ndarray]:
    """The inverse of adm_encoder_to_flax; {"params": gradients} maps gradients."""
    return shared.to_torch(jax.device_get(variables), adm_entries(network, qkv_order))
