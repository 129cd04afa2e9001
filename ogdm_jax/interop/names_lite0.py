"""Names of EfficientNet-Lite0 in its PyTorch file <-> the variables of networks.lite0."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop.names_shared import LEAVES, Entry, to_flax, variable_shapes
from ogdm_jax.networks.lite0 import EfficientNetLite0
from ogdm_jax.typing import PyTree


def lite0_entries(network: EfficientNetLite0) -> list[Entry]:
    """Every tensor under both names."""
    shapes = variable_shapes(network, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    names = {
        path: ".".join([*path[1:-1], LEAVES[path[-1]]]).replace("_blocks_", "_blocks.")
        for path in shapes
    }
    return [Entry(names[path], path, shape) for path, shape in shapes.items()]


def lite0_to_flax(state: Mapping[str, np.ndarray], network: EfficientNetLite0) -> PyTree:
    """{"params": ..., "buffers": ...} from a state dict.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    ignore = [name for name in state if name.endswith("num_batches_tracked")]
    return to_flax(state, lite0_entries(network), "EfficientNet-Lite0", ignore)
