"""What Stable Diffusion's autoencoder and U-Net are built of (arXiv 2112.10752), NHWC.

Parameters have the names of diffusers' files. Fresh ones are PyTorch's default, uniform within
1 / sqrt(fan_in), as in the training code of these networks.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ogdm_jax.networks import layers
from ogdm_jax.typing import Array

INIT = layers.scaled_init("kaiming_uniform", 1 / math.sqrt(3))
Conv = functools.partial(layers.Conv, kernel_init=INIT, bias_init=INIT)
Dense = functools.partial(layers.Dense, kernel_init=INIT, bias_init=INIT)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


class ResBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), the first term through a 1x1
    convolution where the width changes. time = Linear(silu(emb)) where there is an embedding.

    Attributes:
      width: channels of the output.
      groups: of the norms.
      eps: of the norms.
      dtype: compute type; statistics are at least float32.
    """

    width: int
    groups: int
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, emb: Array | None = None) -> Array:
        """Of x [B,h,w,C] and emb [B,E] or None -> [B,h,w,width]."""
        norm = functools.partial(layers.GroupNorm, self.eps, self.groups)
        conv = functools.partial(Conv, self.width, 3, dtype=self.dtype)
        h = conv(name="conv1")(nn.silu(norm(name="norm1")(x)))
        if emb is not None:
            time = Dense(self.width, dtype=self.dtype, name="time_emb_proj")(nn.silu(emb))
            h = h + time[:, None, None]
        h = conv(name="conv2")(nn.silu(norm(name="norm2")(h)))
        if x.shape[-1] != self.width:
            x = Conv(self.width, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


def attend(q: Array, k: Array, v: Array, heads: int, causal: bool = False) -> Array:
    """softmax(q k^T / sqrt(c)) v of each head, the weights in at least float32.

    Args:
      q: [B,N,C]; C = heads * c.
      k, v: [B,M,C].
      heads: number of heads.
      causal: token i sees 0..i.

    Returns:
      [B,N,C].
    """
    split = lambda t: t.reshape(*t.shape[:2], heads, -1)
    q_heads, k_heads, v_heads = split(q), split(k), split(v)
    if causal:
        found = jax.nn.dot_product_attention(q_heads, k_heads, v_heads, is_causal=True)
    else:
        found = layers.attend(q_heads, k_heads, v_heads)
    return found.reshape(q.shape)


def as_tokens(x: Array) -> Array:
    """[B,h,w,C] -> [B,hw,C]."""
    return jnp.reshape(x, (x.shape[0], -1, x.shape[-1]))
