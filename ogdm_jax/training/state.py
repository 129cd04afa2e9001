"""What a training run carries from step to step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ogdm_jax import randomness
from ogdm_jax.brief import brief
from ogdm_jax.methods.contract import Methods
from ogdm_jax.typing import Array, PyTree

Init = Callable[[Array], tuple[PyTree, PyTree]]


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


def create(
    init: Init, methods: Methods, tx: optax.GradientTransformation, key: Array, averages: int = 0
) -> TrainState:
    """A fresh state of init(key) -> (params, buffers); jit it or eval_shape it. The same key gives
    the same network whatever methods are on.
    """
    params, buffers = init(randomness.fold_in_name(key, "network"))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=copy(params),
        buffers=buffers,
        opt_state=tx.init(params),
        carry=methods.init(key),
        averages=tuple(copy(params) for _ in range(averages)),
    )


def copy(tree: PyTree) -> PyTree:
    """Equal values in buffers of their own: params and ema must not alias, or donation frees one
    buffer twice.
    """
    return jax.tree.map(jnp.copy, tree)
