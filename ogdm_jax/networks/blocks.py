"""The residual block with attention that every U-Net and encoder here is made of."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ogdm_jax.networks import layers
from ogdm_jax.networks.layers import Conv, Dense, GroupNorm, Initializer
from ogdm_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Style:
    """In what the blocks of the published networks differ; one for all blocks of a network.

    Attributes:
      kernel_init: initialiser of kernels.
      zero_init: of the kernel of each branch's last layer, whose bias starts at zero.
      attn_init: of the kernel of qkv.
      bias_init: of the other biases; None = zeros.
      eps: of the norms.
      groups: of the norms (GroupNorm).
      skip_scale: factor of every residual sum.
      adaptive_scale: the embedding scales and shifts; otherwise it is added.
      resample_proj: a resampling skip has a 1x1 kernel also where the channels stay.
      taps: low-pass filter of resampling.
    """

    kernel_init: Initializer
    zero_init: Initializer
    attn_init: Initializer
    bias_init: Initializer | None = None
    eps: float = 1e-5
    groups: int = 0
    skip_scale: float = 1.0
    adaptive_scale: bool = True
    resample_proj: bool = False
    taps: Sequence[float] = (1, 1)


class UNetBlock(nn.Module):
    """A residual branch of two convolutions, then attention.

    h = conv0(silu(norm0(x))) and e = affine(emb). With adaptive_scale, h = silu(norm1(h) (1 +
    scale) + shift) where e = [scale | shift]; otherwise h = silu(norm1(h + e)). x = (skip(x) +
    conv1(dropout(h))) skip_scale. With heads, x = (x + proj(attention(qkv(norm2(x))))) skip_scale.
    conv0 and skip resample. (2206.00364, appendix F; 2105.05233, appendix A.)

    Attributes:
      style: see Style.
      out: channels of the output.
      heads: attention heads, 0 = no attention.
      up: double the resolution.
      down: halve the resolution.
      dropout: probability, where dropout_keys are given.
      dtype: compute type.
    """

    style: Style
    out: int
    heads: int = 0
    up: bool = False
    down: bool = False
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    @layers.input_computed_once
    def __call__(self, x: Array, emb: Array, dropout_keys: Array | None = None) -> Array:
        """Maps x [B,H,W,C], emb [B,E] and dropout_keys [B] or None to [B,H',W',out], H' = H, 2H or
        H/2.
        """
        style = self.style
        resample = {"up": self.up, "down": self.down, "taps": style.taps}

        h = nn.silu(self._norm("norm0")(x))
        h = self._conv("conv0", self.out, 3, style.kernel_init, **resample)(h)
        width = self.out * (2 if style.adaptive_scale else 1)
        # The embedding path keeps its own type; only its result joins the block's compute type.
        affine = Dense(width, style.kernel_init, style.bias_init, name="affine", dtype=emb.dtype)
        e = affine(emb).astype(self.dtype)[:, None, None, :]
        if style.adaptive_scale:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = nn.silu(self._norm("norm1")(h) * (1 + scale) + shift)
        else:
            h = nn.silu(self._norm("norm1")(h + e))
        h = layers.dropout(h, self.dropout, dropout_keys, "/".join(self.path))
        h = self._last("conv1", 3)(h)

        resampling = self.up or self.down
        projected = self.out != x.shape[-1] or (style.resample_proj and resampling)
        if projected or resampling:
            kernel = 1 if projected else 0
            x = self._conv("skip", self.out, kernel, style.kernel_init, **resample)(x)
        x = (x.astype(self.dtype) + h) * style.skip_scale
        if not self.heads:
            return x
        qkv = self._conv("qkv", 3 * self.out, 1, style.attn_init)(self._norm("norm2")(x))
        mixed = self._last("proj", 1)(layers.attention(qkv, self.heads))
        return (x + mixed) * style.skip_scale

    def _norm(self, name: str) -> GroupNorm:
        return GroupNorm(self.style.eps, self.style.groups, name=name)

    def _conv(self, name: str, width: int, kernel: int, init: Initializer, **more: Any) -> Conv:
        bias_init = self.style.bias_init
        return Conv(width, kernel, init, bias_init, name=name, dtype=self.dtype, **more)

    def _last(self, name: str, kernel: int) -> Conv:
        return Conv(self.out, kernel, self.style.zero_init, name=name, dtype=self.dtype)
