"""Attention, of pixels and of tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.networks.groupnorm import wide
from ogdm_jax.typing import Array


@jax.custom_vjp
def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(c)) v of each head, q [B,N,heads,c], k and v [B,M,heads,c] -> like q.

    Logits and weights are at least float32, whatever the inputs: rounded to bfloat16, logits near
    55 would put weights off by up to 15 %.

    The gradient is written out, and keeps the weights in the inputs' type alone. For four
    attentions over 32x32 pixels on a TPU v5e, bfloat16, `jax.nn.dot_product_attention` makes 31 %
    more traffic and takes twice the memory, by the compiler. The numbers of a head are brought
    together first: from einsums XLA's CPU compiler makes products with transposed results, at up
    to four times the cost.
    """
    return _attended(q, k, v)[0]


def _scaled(x: Array) -> Array:
    """Divided by sqrt(c): keys, as this costs less than of logits."""
    factor = np.asarray(1 / np.sqrt(x.shape[-1]), wide(x.dtype))
    return (x * factor).astype(x.dtype)


def _heads_first(x: Array) -> Array:
    return jnp.swapaxes(x, 1, 2)


def _attended(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    """The value of `attend`, and what its gradient needs: all [B,heads,...]."""
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    k = _scaled(k)
    logits = jnp.matmul(q, jnp.swapaxes(k, 2, 3), preferred_element_type=wide(q.dtype))
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = weights @ v
    return _heads_first(out), (q, k, v, weights, out)


def _attend_backward(saved: tuple[Array, ...], dout: Array) -> tuple[Array, Array, Array]:
    """With P the weights: dv = P^T dout, and dlogits = P (dout v^T - <dout, out>)."""
    q, k, v, weights, out = saved
    dout = _heads_first(dout)
    type_ = wide(dout.dtype)
    along = jnp.sum((dout * out).astype(type_), axis=-1, keepdims=True)
    dweights = (dout @ jnp.swapaxes(v, 2, 3)).astype(type_)
    dlogits = (weights.astype(type_) * (dweights - along)).astype(q.dtype)
    dq = dlogits @ k
    dk = _scaled(jnp.swapaxes(dlogits, 2, 3) @ q)
    dv = jnp.swapaxes(weights, 2, 3) @ dout
    return _heads_first(dq), _heads_first(dk), _heads_first(dv)


attend.defvjp(_attended, _attend_backward)
