"""Names of FID's InceptionV3 in PyTorch files <-> the variables of networks.InceptionV3.

Three layouts of one network: the raw module (pytorch-fid's pt_inception-2015-12-05-6726825d.pth, torch-fidelity), and
pytorch-fid's wrapper, whose four blocks number the same modules (`blocks.2.0` is Mixed_5b).
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop.names_shared import Entry, to_flax, to_torch, variable_shapes
from ogdm_jax.networks.inception import InceptionV3
from ogdm_jax.typing import PyTree

_BLOCKS = (
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    tuple(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e")),
    ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _torch_name(path: tuple[str, ...]) -> str:
    modules, leaf = path[1:-1], path[-1]
    return "fc.bias" if leaf == "fc_bias" else ".".join([*modules, _LEAVES[leaf]])


def inception_entries(network: InceptionV3) -> list[Entry]:
    """Every tensor under both names, in the order of the checkpoint's names."""
    shapes = variable_shapes(network, jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32))
    return sorted((Entry(_torch_name(path), path, shape) for path, shape in shapes.items()), key=lambda e: e.name)


def _raw_name(name: str) -> str:
    match = re.fullmatch(r"blocks\.(\d)\.(\d)\.(.*)", name.removeprefix("base."))
    if match is None:
        return name.removeprefix("base.")
    block, place, rest = int(match[1]), int(match[2]), match[3]
    known = block < len(_BLOCKS) and place < len(_BLOCKS[block])
    return f"{_BLOCKS[block][place]}.{rest}" if known else name


def inception_to_flax(state: Mapping[str, np.ndarray], network: InceptionV3) -> PyTree:
    """{"params": ..., "buffers": ...} from a state dict; counts of batches and an auxiliary head are ignored.

    pytorch-fid's wrapper has no `fc`: its head becomes zeros (pool3 does not need it).

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    state = {_raw_name(name): value for name, value in state.items()}
    if "fc.weight" not in state and "fc.bias" not in state:
        state["fc.weight"] = np.zeros((network.num_classes, 2048), np.float32)
        state["fc.bias"] = np.zeros(network.num_classes, np.float32)
    ignore = [n for n in state if n.endswith("num_batches_tracked") or n.startswith("AuxLogits.")]
    return to_flax(state, inception_entries(network), "FID's InceptionV3", ignore)


def flax_to_inception(variables: PyTree, network: InceptionV3) -> dict[str, np.ndarray]:
    """The inverse of inception_to_flax, under the names of the raw module."""
    return to_torch(variables, inception_entries(network))
