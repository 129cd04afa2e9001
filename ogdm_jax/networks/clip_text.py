"""CLIP's text encoder (arXiv 2103.00020), as Stable Diffusion uses it: all tokens behind the last
norm, padding included, and no mask but the causal one.

SD 1.x has OpenAI's ViT-L/14, with the quick GELU. SD 2.x has OpenCLIP's ViT-H/14 without its last
layer, with the exact GELU: 23 layers of 24 and the final norm. Parameters have the names of the
files that transformers writes.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ogdm_jax.networks import layers
from ogdm_jax.networks.sd_blocks import Dense, LayerNorm, attend
from ogdm_jax.typing import Array

_TABLE = nn.initializers.normal(0.02)


class Layer(nn.Module):
    """x += Attention(LN1 x), then x += MLP(LN2 x).

    Attributes:
      heads: of the attention.
      hidden: width inside the MLP.
      quick: x sigmoid(1.702 x) in place of the exact GELU.
      dtype: compute type.
    """

    heads: int
    hidden: int
    quick: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B,M,D] -> the same shape."""
        dense = functools.partial(Dense, dtype=self.dtype)
        own = functools.partial(dense, h.shape[-1])
        norm = lambda i: LayerNorm(name=f"layer_norm{i}", dtype=layers.wide(h.dtype))
        x = norm(1)(h).astype(h.dtype)
        q, k, v = (own(name=f"self_attn.{part}_proj")(x) for part in "qkv")
        h = h + own(name="self_attn.out_proj")(attend(q, k, v, self.heads, causal=True))
        inside = dense(self.hidden, name="mlp.fc1")(norm(2)(h).astype(h.dtype))
        quick = lambda v: v * jax.nn.sigmoid(1.702 * v)
        inside = quick(inside) if self.quick else nn.gelu(inside, approximate=False)
        return h + own(name="mlp.fc2")(inside)


class CLIPText(nn.Module):
    """Tokens [B,M] int32 -> the U-Net's context [B,M,width].

    Attributes:
      vocabulary: rows of the table of tokens.
      positions: most tokens of a text.
      width: of a token.
      depth: layers.
      heads: of each attention.
      hidden: width inside the MLP.
      quick: the activation of OpenAI's models; otherwise the exact GELU.
      dtype: compute type; norms and softmax are at least float32.
    """

    vocabulary: int = 49408
    positions: int = 77
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    quick: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """See the class. Raises ValueError for more tokens than positions."""
        if ids.ndim != 2 or ids.shape[1] > self.positions:
            raise ValueError(
                f"CLIPText: ids have shape {ids.shape}; expected [B, at most {self.positions}]"
            )
        at = "text_model.embeddings"
        table = lambda name, rows: self.param(f"{at}.{name}.embedding", _TABLE, (rows, self.width))
        tokens = table("token_embedding", self.vocabulary)[ids]
        h = tokens + table("position_embedding", self.positions)[None, : ids.shape[1]]
        h = h.astype(self.dtype)
        for i in range(self.depth):
            name = f"text_model.encoder.layers.{i}"
            h = Layer(self.heads, self.hidden, self.quick, self.dtype, name=name)(h)
        norm = LayerNorm(name="text_model.final_layer_norm", dtype=layers.wide(h.dtype))
        return norm(h)


def pooled(context: Array, ids: Array, eos: int) -> Array:
    """[B,width]: the row of the first end-of-text token. Stable Diffusion does not use it."""
    row = jnp.argmax(ids == eos, axis=1)
    return jnp.take_along_axis(context, row[:, None, None], axis=1)[:, 0]
