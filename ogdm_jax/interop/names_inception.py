"""Names of FID's InceptionV3 in PyTorch files <-> the variables of networks.InceptionV3.

Three layouts of one network: the raw module (pytorch-fid's pt_inception-2015-12-05-6726825d.pth,
torch-fidelity); pytorch-fid's wrapper, whose four blocks number the same modules (`blocks.2.0` is
Mixed_5b); and NVIDIA's detector (inception-2015-12-05.pt, .pkl), whose modules have the names of
the TensorFlow graph (`layers.mixed_9.tower.conv`) and whose norms have no scale. NVIDIA's file was
not at hand: its module names are those that public code uses, the names inside them the graph's,
and every shape is checked.
"""

import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop.names_shared import LEAVES, Entry, to_flax, to_torch, variable_shapes
from ogdm_jax.networks.inception import InceptionV3
from ogdm_jax.typing import PyTree

_BLOCKS = (
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    tuple(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e")),
    ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)

# NVIDIA's modules in the order of the graph, and the layers of each kind of block -> ours.
_STEM = dict(
    zip(("conv", "conv_1", "conv_2", "conv_3", "conv_4"), (*_BLOCKS[0], *_BLOCKS[1]), strict=True)
)
_MIXED = dict(
    zip(["mixed", *(f"mixed_{i}" for i in range(1, 11))], (*_BLOCKS[2], *_BLOCKS[3]), strict=True)
)


def _chain(tower: str, *layers: str) -> dict[str, str]:
    return {f"{tower}.conv{f'_{i}' if i else ''}": layer for i, layer in enumerate(layers)}


_DOUBLE = _chain("tower_1", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
_POOL = {"tower_2.conv": "branch_pool"}
_A = {"conv": "branch1x1", **_chain("tower", "branch5x5_1", "branch5x5_2"), **_DOUBLE, **_POOL}
_B = {"conv": "branch3x3", **_chain("tower", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")}
_C = {
    "conv": "branch1x1",
    **_chain("tower", *(f"branch7x7_{i}" for i in range(1, 4))),
    **_chain("tower_1", *(f"branch7x7dbl_{i}" for i in range(1, 6))),
    **_POOL,
}
_D = {
    **_chain("tower", "branch3x3_1", "branch3x3_2"),
    **_chain("tower_1", *(f"branch7x7x3_{i}" for i in range(1, 5))),
}
_E = {
    "conv": "branch1x1",
    "tower.conv": "branch3x3_1",
    **_chain("tower.mixed", "branch3x3_2a", "branch3x3_2b"),
    **_chain("tower_1", "branch3x3dbl_1", "branch3x3dbl_2"),
    **_chain("tower_1.mixed", "branch3x3dbl_3a", "branch3x3dbl_3b"),
    **_POOL,
}
_LAYERS = dict(zip(_MIXED, (_A, _A, _A, _B, _C, _C, _C, _C, _D, _E, _E), strict=True))
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


def _torch_name(path: tuple[str, ...]) -> str:
    modules, leaf = path[1:-1], path[-1]
    return "fc.bias" if leaf == "fc_bias" else ".".join([*modules, LEAVES[leaf]])


def inception_entries(network: InceptionV3) -> list[Entry]:
    """Every tensor under both names, in the order of the checkpoint's names."""
    shapes = variable_shapes(network, jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32))
    return sorted(
        (Entry(_torch_name(path), path, shape) for path, shape in shapes.items()),
        key=lambda e: e.name,
    )


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
