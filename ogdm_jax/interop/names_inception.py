"""Names of the networks of features in PyTorch files <-> their variables.

EfficientNet-Lite0 has one layout, FID's InceptionV3 has three: the raw module (pytorch-fid's
pt_inception-2015-12-05-6726825d.pth, torch-fidelity); pytorch-fid's wrapper, whose four blocks
number the same modules (`blocks.2.0` is Mixed_5b); and NVIDIA's detector (inception-2015-12-05.pt,
.pkl), whose modules have the names of the TensorFlow graph (`layers.mixed_9.tower.conv`) and whose
norms have no scale. NVIDIA's file was not at hand: its module names are those that public code
uses, the names inside them the graph's, and every shape is checked.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from ogdm_jax.interop.names_shared import Entry, image, path_entries, to_flax, to_torch
from ogdm_jax.networks import inception
from ogdm_jax.networks.inception import InceptionV3
from ogdm_jax.networks.lite0 import EfficientNetLite0
from ogdm_jax.typing import PyTree

_BLOCKS = (
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    tuple(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e")),
    ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)

# NVIDIA's modules in the order of the graph -> ours.
_STEM = dict(
    zip(("conv", "conv_1", "conv_2", "conv_3", "conv_4"), (*_BLOCKS[0], *_BLOCKS[1]), strict=True)
)
_MIXED = dict(
    zip(["mixed", *(f"mixed_{i}" for i in range(1, 11))], (*_BLOCKS[2], *_BLOCKS[3]), strict=True)
)


def _layers(branches: tuple[inception.Branch, ...]) -> dict[str, str]:
    """The layers of a kind of block by NVIDIA's names.

    A branch of one layer is the block's own `conv`, the others are `tower`, `tower_1`, ...; layers
    that see the same input are a group of their own, `mixed`.
    """
    towers = iter(("tower.", "tower_1.", "tower_2."))
    found = {}
    for branch in branches:
        layers = [name.split("|") for name, _, kernel in branch if kernel]
        tower = next(towers) if layers and len(branch) > 1 else ""
        for i, names in enumerate(layers):
            group, first = (f"{tower}mixed.", 0) if len(names) > 1 else (tower, i)
            for j, name in enumerate(names, first):
                found[f"{group}conv{f'_{j}' if j else ''}"] = name
    return found


_LAYERS = {name: _layers(inception.BLOCKS[ours]) for name, ours in _MIXED.items()}
_TENSORS = {
    "weight": "conv.weight",
    "gamma": "bn.weight",
    "beta": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}


def _nvidia_name(name: str) -> str:
    """layers.mixed_9.tower.conv.beta -> Mixed_7b.branch3x3_1.bn.bias; other names as they are."""
    if name in ("output.weight", "output.bias"):
        return name.replace("output", "fc")
    module, _, tensor = name.removeprefix("layers.").rpartition(".")
    block, _, layer = module.partition(".")
    if not name.startswith("layers.") or tensor not in _TENSORS:
        return name
    if module in _STEM:
        return f"{_STEM[module]}.{_TENSORS[tensor]}"
    known = layer in _LAYERS.get(block, {})
    return f"{_MIXED[block]}.{_LAYERS[block][layer]}.{_TENSORS[tensor]}" if known else name


def inception_entries(network: InceptionV3) -> list[Entry]:
    """Every tensor under both names, in the order of the checkpoint's names."""
    return path_entries(network, image(75))


def raw_name(name: str) -> str:
    """The raw module's name of a tensor in any of the layouts; a name of none of them as it is."""
    match = re.fullmatch(r"blocks\.(\d)\.(\d)\.(.*)", name.removeprefix("base."))
    if match is None:
        return _nvidia_name(name.removeprefix("base."))
    block, place, rest = int(match[1]), int(match[2]), match[3]
    known = block < len(_BLOCKS) and place < len(_BLOCKS[block])
    return f"{_BLOCKS[block][place]}.{rest}" if known else name


def scales_left_out(names: Iterable[str]) -> list[str]:
    """The norms' scales that a state with these raw names leaves out.

    NVIDIA's layout leaves out all of them, because they are 1; the other layouts leave out none.
    """
    names = set(names)
    norms = {name.removesuffix("running_var") for name in names if name.endswith(".bn.running_var")}
    scales = sorted(f"{norm}weight" for norm in norms)
    return scales if not names & set(scales) else []


def inception_to_flax(state: Mapping[str, np.ndarray], network: InceptionV3) -> PyTree:
    """{"params": ..., "buffers": ...} from a state dict.

    Counts of batches and an auxiliary head are ignored. pytorch-fid's wrapper has no `fc`: its head
    becomes zeros (pool3 does not need it). NVIDIA's norms have scale 1.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    state = {raw_name(name): value for name, value in state.items()}
    if "fc.weight" not in state and "fc.bias" not in state:
        state["fc.weight"] = np.zeros((network.num_classes, 2048), np.float32)
        state["fc.bias"] = np.zeros(network.num_classes, np.float32)
    for scale in scales_left_out(state):
        state[scale] = np.ones_like(state[scale.removesuffix("weight") + "running_var"])
    ignore = [n for n in state if n.endswith("num_batches_tracked") or n.startswith("AuxLogits.")]
    return to_flax(state, inception_entries(network), "FID's InceptionV3", ignore)


def flax_to_inception(variables: PyTree, network: InceptionV3) -> dict[str, np.ndarray]:
    """The inverse of inception_to_flax, under the names of the raw module."""
    return to_torch(variables, inception_entries(network))


def lite0_entries(network: EfficientNetLite0) -> list[Entry]:
    """Every tensor under both names."""
    return path_entries(network, image(64), rename=lambda n: n.replace("_blocks_", "_blocks."))


def lite0_to_flax(state: Mapping[str, np.ndarray], network: EfficientNetLite0) -> PyTree:
    """{"params": ..., "buffers": ...} from a state dict.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    ignore = [name for name in state if name.endswith("num_batches_tracked")]
    return to_flax(state, lite0_entries(network), "EfficientNet-Lite0", ignore)
