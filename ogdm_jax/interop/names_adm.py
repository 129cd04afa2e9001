"""PyTorch names of OpenAI's networks <-> variables of ADMUNet and ADMEncoder.

Their code is guided-diffusion; OGDM_adm, DSG and DG use it.
"""

from collections.abc import Mapping

import numpy as np

from ogdm_jax.interop import names_shared as shared
from ogdm_jax.networks.adm_openai import ADMEncoder, ADMUNet
from ogdm_jax.typing import PyTree

AdmNetwork = ADMUNet | ADMEncoder
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
# what stands behind the entry where a resampling is not a residual block
_ALONE = {"up": ".conv", "down": ".op"}


def _prefixes(network: AdmNetwork) -> dict[str, str]:
    """Our block -> OpenAI's entry, with {} where the child comes; an up-sampling and the second
    middle block are the last child of the entry in front of them.
    """
    found = {network.layer_names[0]: "input_blocks.0.{}"}
    outputs, children = 0, 1
    for step in network.plan():
        if step.stores_skip:
            found[step.name] = f"input_blocks.{len(found)}.{{}}"
        elif step.takes_skip:
            found[step.name] = f"output_blocks.{outputs}.{{}}"
            outputs, children = outputs + 1, 2 if step.attend else 1
        elif step.up:
            found[step.name] = f"output_blocks.{outputs - 1}.{children}"
        else:
            found[step.name] = "middle_block.{}" if step.attend else "middle_block.2"
    return found


def _outside(network: AdmNetwork) -> dict[str, str]:
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


def adm_entries(network: AdmNetwork, qkv_order: str = "legacy") -> list[shared.Entry]:
    """Every tensor under both names.

    Args:
      network: a U-Net or an encoder of OpenAI's code.
      qkv_order: of the checkpoint: "legacy" or "new" (use_new_attention_order).

    Raises:
      ValueError: an unknown order.
    """
    if qkv_order not in _ORDERS:
        raise ValueError(f"qkv_order: {qkv_order!r} given; expected 'legacy' or 'new'")
    prefixes, outside = _prefixes(network), _outside(network)
    entries = []
    for path, shape in shared.variable_shapes(network, *shared.image_input(network)).items():
        first, *inner, leaf = path[1:]
        weight = shared.LEAVES.get(leaf, leaf)
        attention, heads = False, 0
        if first in outside:
            name = ".".join([outside[first], *inner, weight])
            attention = bool(inner)  # of the pool, which alone has layers of its own
        elif inner:
            child, layer = _BLOCK[inner[0]]
            name = f"{prefixes[first].format(child)}.{layer}.{weight}"
            attention = child == 1
            heads = network.heads(shape[-1] // 3) if inner[0] == "qkv" else 0
        else:  # a convolution by itself: the first one, or resampling without a residual block
            kind = first.rpartition("_")[2]
            name = f"{prefixes[first].format(0)}{_ALONE.get(kind, '')}.{weight}"
        layout = "conv1d" if attention and leaf == "kernel" else "auto"
        layout = "same" if first == "map_label" else layout
        entries.append(shared.Entry(name, path, shape, layout, heads, _ORDERS[qkv_order]))
    return entries


def adm_to_flax(
    state: Mapping[str, np.ndarray], network: AdmNetwork, qkv_order: str = "legacy"
) -> PyTree:
    """Variables {"params": ...} from a state dict of guided-diffusion; arrays are at least float32.

    Args:
      state: {PyTorch name: array}.
      network: a U-Net; or an encoder: a classifier, DG's extractor or head.
      qkv_order: the checkpoint's order of attention channels; 64x64_diffusion.pt is "new", the
        others "legacy". An attention pool's own attention is always in new order.

    Raises:
      ValueError: an unknown order; a tensor is missing, has another shape, or has no place in the
        network.
    """
    what = "a U-Net" if isinstance(network, ADMUNet) else "an encoder"
    return shared.to_flax(state, adm_entries(network, qkv_order), f"{what} of guided-diffusion")


def flax_to_adm(
    variables: PyTree, network: AdmNetwork, qkv_order: str = "legacy"
) -> dict[str, np.ndarray]:
    """The inverse of adm_to_flax; {"params": gradients} maps gradients."""
    return shared.to_torch(variables, adm_entries(network, qkv_order))
