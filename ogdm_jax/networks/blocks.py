"""The residual block with attention that every U-Net and encoder here is made of."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from ogdm_jax.networks.layers import Conv, Dense, GroupNorm, Initializer, attention, dropout, settle
from ogdm_jax.typing import Array


class UNetBlock(nn.Module):
    """Norm, silu, conv (with resampling), embedding, norm, silu, dropout, conv, plus the skip; then
    attention.

    h = conv0(silu(norm0(x))) and e = affine(emb). With adaptive_scale, h = silu(norm1(h) (1 +
    scale) + shift) where e = [scale | shift]; otherwise h = silu(norm1(h + e)). x = (skip(x) +
    conv1(dropout(h))) skip_scale. With heads, x = (x + proj(attention(qkv(norm2(x))))) skip_scale.
    (2206.00364, appendix F; 2105.05233, appendix A.)

    Attributes:
      out: channels.   heads: attention heads, 0 = none.   up, down: resample by 2 with the low-pass
        `taps`.
      skip_scale: factor of every residual sum.   resample_proj: a resampling skip has a 1x1 kernel.
      groups, eps: of the norms (GroupNorm).   dropout: probability where dropout_keys are given.
      kernel_init, bias_init: initialisers; zero_init (zero biases): last layer of each branch;
        attn_init: qkv.
    """

    out: int
    kernel_init: Initializer
    zero_init: Initializer
    attn_init: Initializer
    bias_init: Initializer | None = None
    heads: int = 0
    up: bool = False
    down: bool = False
    dropout: float = 0.0
    skip_scale: float = 1.0
    eps: float = 1e-5
    groups: int = 0
    taps: Sequence[float] = (1, 1)
    adaptive_scale: bool = True
    resample_proj: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array, dropout_keys: Array | None = None) -> Array:
        """x [B,H,W,C], emb [B,E], dropout_keys [B] or None -> [B,H',W',out], H' = H, 2H or H/2."""
        common = {"dtype": self.dtype, "bias_init": self.bias_init}
        resample = {"up": self.up, "down": self.down, "taps": self.taps}
        norm = lambda name: GroupNorm(self.eps, self.groups, name=name)

        x = settle(self, x, "norm0")
        h = nn.silu(norm("norm0")(x))
        h = Conv(self.out, 3, self.kernel_init, name="conv0", **resample, **common)(h)
        width = self.out * (2 if self.adaptive_scale else 1)
        # The embedding path keeps its own type; only its result joins the block's compute type.
        e = Dense(width, self.kernel_init, self.bias_init, name="affine", dtype=emb.dtype)(emb)
        e = e.astype(self.dtype)[:, None, None, :]
        if self.adaptive_scale:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = nn.silu(norm("norm1")(h) * (1 + scale) + shift)
        else:
            h = nn.silu(norm("norm1")(h + e))
        h = dropout(h, self.dropout, dropout_keys, "/".join(self.path))
        h = Conv(self.out, 3, self.zero_init, name="conv1", dtype=self.dtype)(h)

        projected = self.out != x.shape[-1] or (self.resample_proj and (self.up or self.down))
        if projected or self.up or self.down:
            x = Conv(
                self.out, 1 if projected else 0, self.kernel_init, name="skip", **resample, **common
            )(x)
        x = (x.astype(self.dtype) + h) * self.skip_scale
        if not self.heads:
            return x
        qkv = Conv(3 * self.out, 1, self.attn_init, name="qkv", **common)(norm("norm2")(x))
        mixed = Conv(self.out, 1, self.zero_init, name="proj", dtype=self.dtype)(
            attention(qkv, self.heads)
        )
        return (x + mixed) * self.skip_scale
