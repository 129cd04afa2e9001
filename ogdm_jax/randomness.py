"""Random numbers that belong to an example, not to a device.

Every draw of example i of a step comes from fold_in(fold_in(key, purpose), i). One device, eight devices, pmap and
mesh therefore see the same noise, and switching a method on does not change the draws of another purpose.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def fold_in_name(key: Array, purpose: str) -> Array:
    """Derives the key of a named purpose: fold_in(key, crc32(purpose)), the same in every process and Python."""
    return jax.random.fold_in(key, jnp.uint32(zlib.crc32(purpose.encode())))


def example_keys(key: Array, purpose: str, index: Array) -> Array:
    """One key per example.

    Args:
      key: the step's key (typed, scalar).
      purpose: what the draws are for, for example "sigma" or "noise".
      index: [B] int32, the global index of each example in the batch.

    Returns:
      [B] typed keys.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(fold_in_name(key, purpose), index)


def fold_in_each(keys: Array, purpose: str) -> Array:
    """Derives a named sub-key of each of [B] keys."""
    return jax.vmap(fold_in_name, in_axes=(0, None))(keys, purpose)


def normal(keys: Array, shape: Sequence[int] = (), dtype=jnp.float32) -> Array:
    """Standard normal numbers [B, *shape], row i from keys[i]."""
    return jax.vmap(lambda k: jax.random.normal(k, tuple(shape), dtype))(keys)


def uniform(keys: Array, shape: Sequence[int] = (), dtype=jnp.float32) -> Array:
    """Uniform numbers on [0, 1), [B, *shape], row i from keys[i]."""
    return jax.vmap(lambda k: jax.random.uniform(k, tuple(shape), dtype))(keys)
