"""What a training run carries from step to step."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ogdm_jax import randomness
from ogdm_jax.methods import contract as slots
from ogdm_jax.models import Model
from ogdm_jax.training import optim
from ogdm_jax.typing import Array, PyTree


@struct.dataclass
class CompanionState:
    """A companion network: its parameters and its Adam. It has no moving average."""

    params: PyTree
    opt_state: PyTree


@struct.dataclass
class TrainState:
    """Everything that changes.

    Attributes:
      step: scalar int32, optimiser steps done.
      params, ema: the denoiser's parameters and their moving average.   buffers: its frozen
        tensors.
      opt_state: of the denoiser's Adam.
      companions: {method: CompanionState}.   memory: {method: small numbers a method carries}.
    """

    step: Array
    params: PyTree
    ema: PyTree
    buffers: PyTree
    opt_state: PyTree
    companions: dict[str, CompanionState]
    memory: dict[str, PyTree]


def companion_optimiser(companion: slots.Companion) -> optax.GradientTransformation:
    return optim.adam(companion.learning_rate, companion.betas)


def create(
    model: Model,
    filled: slots.Filled,
    tx: optax.GradientTransformation,
    memory: dict[str, PyTree],
    key: Array,
) -> TrainState:
    """A fresh state; jit it or eval_shape it. The same key gives the same denoiser whatever methods
    are on.

    Args:
      memory: {method: numbers} as slots.per_method(filled, "memory") made them (some read files, so
        not here).
    """
    params, buffers = model.init(randomness.fold_in_name(key, "network"))
    companions = {}
    for method in filled.companions:
        companion_params = method.companion.init(
            randomness.fold_in_name(key, f"{method.name}/companion")
        )
        companions[method.name] = CompanionState(
            companion_params, companion_optimiser(method.companion).init(companion_params)
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=copy(params),
        buffers=buffers,
        opt_state=tx.init(params),
        companions=companions,
        memory=jax.tree.map(jnp.asarray, memory),
    )


def copy(tree: PyTree) -> PyTree:
    """Equal values in buffers of their own: params and ema must not alias, or donation frees one
    buffer twice.
    """
    return jax.tree.map(jnp.copy, tree)
