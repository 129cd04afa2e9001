"""Random numbers that belong to an example, not to a device.

Every draw of example i of a step comes from fold_in(fold_in(key, purpose), i). One device, eight
devices, pmap and mesh therefore see the same noise, and switching a method on does not change the
draws of another purpose.

Keys are threefry's, whose numbers pass every statistical test but cost over a hundred integer
operations each, and a loop of their own in the compiled program for each draw. `quick` turns keys
into keys of a hash that costs eighteen, for what needs no more: dropout masks and augmentation,
which are drawn in bulk, and the first weights, a draw for each tensor.
"""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import random as prngs
from jax.typing import DTypeLike

Array = jax.Array


_THREEFRY = "threefry2x32"


def seeded(seed: Array | int) -> Array:
    """Threefry's key of a seed, whatever JAX_DEFAULT_PRNG_IMPL says."""
    return jax.random.key(seed, impl=_THREEFRY)


def typed(key: Array) -> Array:
    """Typed keys of keys of either style: the words of `jax.random.PRNGKey` are wrapped.

    Of a key of JAX's "rbg" the first two words make a key of threefry: under vmap all images would
    share rbg's numbers of the first key.

    Raises:
      ValueError: no key.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        words = jax.random.key_data(key)
        if words.shape[-1] == 2:
            return key
    elif dtype == np.uint32 and key.shape[-1:] in ((2,), (4,)):
        words = key
    else:
        raise ValueError(f"key={key!r}; expected jax.random.key(SEED), or keys split from it")
    return jax.random.wrap_key_data(words[..., :2], impl=_THREEFRY)


def fold_in_name(key: Array, purpose: str) -> Array:
    """The key of a named purpose: fold_in(key, crc32(purpose)), the same in every process."""
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


def normal(keys: Array, shape: Sequence[int] = (), dtype: DTypeLike = jnp.float32) -> Array:
    """Standard normal numbers [B, *shape], row i from keys[i]."""
    return jax.vmap(lambda k: jax.random.normal(k, tuple(shape), dtype))(keys)


def uniform(keys: Array, shape: Sequence[int] = (), dtype: DTypeLike = jnp.float32) -> Array:
    """Uniform numbers on [0, 1), [B, *shape], row i from keys[i]."""
    return jax.vmap(lambda k: jax.random.uniform(k, tuple(shape), dtype))(keys)


# quick keys


def quick(keys: Array) -> Array:
    """Keys of the hash generator with the words of threefry keys: every jax.random function takes
    them.

    Number i of a key (k0, k1) is mix(mix(i ^ k0) + k1), with an invertible 32-bit hash `mix`. It
    depends on the key and on i alone, as threefry's does, whatever vmap, jit or sharding is around
    it; a hardware generator (JAX's "rbg") is as cheap, but under vmap all examples would share the
    numbers of the first key. Uniform, uncorrelated between neighbours, examples and purposes
    (tests/test_randomness.py), and of no cryptographic strength.

    Args:
      keys: typed keys of any shape, two words each.
    """
    return jax.random.wrap_key_data(jax.random.key_data(typed(keys)), impl=_HASH)


def _mix(x: Array) -> Array:
    """An invertible hash of uint32: shifts and odd factors with low bias.

    The constants are those of "lowbias32" by C. Wellons.
    """
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _hash_fold_in(key: Array, data: Array | int) -> Array:
    first = _mix(_mix(key[0] ^ data) + key[1])
    return jnp.stack([first, _mix(_mix(key[1] + data) ^ first)])


def _hash_split(key: Array, shape: tuple[int, ...]) -> Array:
    count = lax.iota(np.uint32, math.prod(shape))
    return jax.vmap(_hash_fold_in, in_axes=(None, 0))(key, count).reshape(*shape, 2)


def _hash_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    if bit_width == 64:
        low, high = (_hash_bits(k, 32, shape).astype(np.uint64) for k in _hash_split(key, (2,)))
        return low | (high << np.uint64(32))
    # The place in row-major order, without a reshape that would move memory.
    index = jnp.zeros(shape, np.uint32)
    for axis, size in enumerate(shape):
        index = index * np.uint32(size) + lax.broadcasted_iota(np.uint32, shape, axis)
    bits = _mix(_mix(index ^ key[0]) + key[1])
    if bit_width == 32:
        return bits
    return (bits >> np.uint32(32 - bit_width)).astype(f"uint{bit_width}")


_HASH = prngs.define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: _hash_fold_in(jnp.zeros(2, np.uint32), jnp.asarray(seed).astype(np.uint32)),
    split=_hash_split,
    random_bits=_hash_bits,
    fold_in=_hash_fold_in,
    name="ogdm_hash",
    tag="oh",
)
