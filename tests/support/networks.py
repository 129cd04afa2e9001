"""Networks as whole programs: operation by operation, each operation of each shape is a program of
its own to compile.
"""

import functools
from typing import Any

import jax
import numpy as np


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(network: Any, variables: Any, inputs: tuple, more: tuple) -> Any:
    return network.apply(variables, *inputs, **dict(more))


def run(network: Any, variables: Any, *inputs: Any, **more: str) -> Any:
    """network.apply; a program is compiled once for equal networks and shapes."""
    return _apply(network, variables, inputs, tuple(more.items()))


def fresh(network: Any, *inputs: Any) -> Any:
    """Variables as training begins with them. (Threefry would compile for long.)"""
    return jax.jit(network.init)(jax.random.key(0, impl="rbg"), *inputs)


def born(shapes: Any, seed: int = 0) -> Any:
    """Weights of these shapes as small as fresh ones, none zero but biases. numpy draws them: a
    hundred generators of JAX, a loop each, compile for longer than most of what tests do with them.
    """
    rng = np.random.default_rng(seed)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in ("scale", "bias"):
            return np.full(shape.shape, float(name == "scale"), shape.dtype)
        spread = 0.3 / np.sqrt(max(1, np.prod(shape.shape[:-1])))
        return (spread * rng.normal(size=shape.shape)).astype(shape.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def drawn(network: Any, *inputs: Any, spread: float = 0.2) -> Any:
    """Variables of which none is zero, so that every block does something."""
    rng = np.random.default_rng(7)
    draw = lambda leaf: (spread * rng.normal(size=leaf.shape)).astype(leaf.dtype)
    return jax.tree.map(draw, jax.eval_shape(network.init, jax.random.key(0), *inputs))
