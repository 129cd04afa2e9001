"""PyTorch names of latent models' networks <-> our variables.

Our modules have the names of the files (`blocks.0.attn.qkv`, `down_blocks.0.resnets.1.conv1`), so
that a name map is a rule. DiT's blocks are stacked in ours and numbered in the files.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop.names_shared import LEAVES, Entry, image_input, to_flax, to_torch
from ogdm_jax.interop.names_shared import variable_shapes
from ogdm_jax.networks.dit import DiT, position_table
from ogdm_jax.typing import PyTree

_POSITIONS = "pos_embed"


def _entry(path: tuple[str, ...], shape: tuple[int, ...]) -> Entry:
    """A tensor whose name is its path."""
    *modules, last = [part for name in path[1:] for part in name.split(".")]
    if last == "embedding":  # a table: [rows, width] in both
        return Entry(".".join([*modules, "weight"]), path, shape, layout="same")
    return Entry(".".join([*modules, LEAVES[last]]), path, shape)


def _numbered(path: tuple[str, ...], i: int) -> tuple[str, ...]:
    return (*path[:2], str(i), *path[2:])


def dit_entries(network: DiT) -> list[Entry]:
    """Every tensor of the file but the table of positions, with one path a block."""
    found, label = [], jax.ShapeDtypeStruct((1,), jnp.int32)
    for path, shape in variable_shapes(network, *image_input(network), label).items():
        if path[1] == "blocks":
            found += [_entry(_numbered(path, i), shape[1:]) for i in range(shape[0])]
        else:
            found.append(_entry(path, shape))
    return sorted(found, key=lambda e: e.name)


def dit_to_flax(state: Mapping[str, np.ndarray], network: DiT) -> PyTree:
    """{"params": ...} of a DiT from its state dict.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network; a table of
        positions that is not the published one.
    """
    stored = state.get(_POSITIONS)
    if stored is not None:
        side = network.img_resolution // network.patch
        ours = position_table(side, side, network.width)[None]
        if stored.shape != ours.shape or np.abs(stored - ours).max() > 1e-3:
            raise ValueError(
                f"state: {_POSITIONS} {stored.shape} is not DiT's table of sines for {side} x {side} "
                "patches; expected a DiT whose positions were not trained"
            )
    variables = to_flax(state, dit_entries(network), "a DiT", [_POSITIONS])
    blocks = variables["params"]["blocks"]
    each = [blocks[str(i)] for i in range(network.depth)]
    variables["params"]["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    return variables


def flax_to_dit(variables: PyTree, network: DiT) -> dict[str, np.ndarray]:
    """The inverse of dit_to_flax, with the table of positions where whole parameters are given."""
    params = dict(jax.device_get(variables["params"]))
    each = [jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(network.depth)]
    params["blocks"] = {str(i): block for i, block in enumerate(each)}
    state = to_torch({"params": params}, dit_entries(network))
    side = network.img_resolution // network.patch
    return {_POSITIONS: position_table(side, side, network.width)[None], **state}
