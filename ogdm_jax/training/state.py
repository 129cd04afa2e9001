"""What a training run carries from step to step."""

import jax
import jax.numpy as jnp
from flax import struct

from ogdm_jax.brief import brief
from ogdm_jax.typing import Array, PyTree


@struct.dataclass
class TrainState:
    """Everything that changes.

    Attributes:
      step: scalar int32, optimiser steps done.
      params: the network's parameters.
      ema: their moving average.
      buffers: the network's frozen tensors.
      opt_state: of its optimiser.
      carry: {method: what it keeps from step to step}.
      averages: of the parameters with the profiles of config.ema.stds, see `power`.
    """

    step: Array
    params: PyTree
    ema: PyTree
    buffers: PyTree
    opt_state: PyTree
    carry: dict[str, PyTree]
    averages: tuple[PyTree, ...] = ()
    __repr__ = brief


def copy(tree: PyTree) -> PyTree:
    """Equal values in buffers of their own: params and ema must not alias, or donation frees one
    buffer twice.
    """
    return jax.tree.map(jnp.copy, tree)
