"""Stable Diffusion's U-Net, conditioned on a text (arXiv 2112.10752; UNet2DConditionModel of
diffusers), NHWC.

Residual blocks with attention to the image and to the text's tokens behind them. Parameters have
the names of diffusers' files.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ogdm_jax.networks import layers
from ogdm_jax.networks.sd_blocks import Conv, Dense, LayerNorm, ResBlock, as_tokens, attend
from ogdm_jax.networks.tapped import Asked, Tapped
from ogdm_jax.typing import Array

_EPS = 1e-5  # of the residual blocks' norms
_TRANSFORMER_EPS = 1e-6


class CrossAttention(nn.Module):
    """Attention of tokens to a context.

    Attributes:
      heads: number of heads.
      dtype: compute type.
    """

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Array, context: Array) -> Array:
        """Of h [B,N,C] and context [B,M,D] -> [B,N,C]."""
        dense = functools.partial(Dense, h.shape[-1], dtype=self.dtype)
        linear = functools.partial(dense, use_bias=False)
        q, k, v = linear(name="to_q")(h), linear(name="to_k")(context), linear(name="to_v")(context)
        return dense(name="to_out.0")(attend(q, k, v, self.heads))


class Transformer(nn.Module):
    """x + proj_out(block(proj_in(norm(x)))): attention to the image, to the text, a gated MLP.

    Attributes:
      heads: of both attentions.
      groups: of the norm.
      dtype: compute type.
    """

    heads: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """Of x [B,h,w,C] and context [B,M,D] -> [B,h,w,C]."""
        width, at = x.shape[-1], "transformer_blocks.0"
        dense = functools.partial(Dense, dtype=self.dtype)
        attention = functools.partial(CrossAttention, self.heads, self.dtype)
        norm = lambda i: LayerNorm(name=f"{at}.norm{i}", dtype=layers.wide(x.dtype))
        h = as_tokens(layers.GroupNorm(_TRANSFORMER_EPS, self.groups, name="norm")(x))
        h = dense(width, name="proj_in")(h)
        own = norm(1)(h).astype(h.dtype)
        h = h + attention(name=f"{at}.attn1")(own, own)
        h = h + attention(name=f"{at}.attn2")(norm(2)(h).astype(h.dtype), context)
        both = dense(8 * width, name=f"{at}.ff.net.0.proj")(norm(3)(h).astype(h.dtype))
        value, gate = jnp.split(both, 2, axis=-1)
        h = h + dense(width, name=f"{at}.ff.net.2")(value * nn.gelu(gate, approximate=False))
        return x + dense(width, name="proj_out")(h).reshape(x.shape)


class UNet2DCondition(Tapped):
    """F(x; c_noise, context): eps or v of the published models.

    c_noise [B] are time steps (0 to 999, fractions allowed). The label is the context: the text
    encoder's tokens [B,M,context_dim]. There is no dropout in it. The layers are "down0" to the
    last and "up0" to the last (a level's output, resampling included; up0 is the coarsest).

    Attributes:
      img_resolution: side of the latents that it is made for.
      img_channels: channels of a latent.
      out_channels: of the output; None = img_channels.
      widths: channels of each level; all but the last level halve the sides.
      attends: whether a level has transformers; the middle always has one.
      heads: of each level's attentions (diffusers calls this number attention_head_dim).
      context_dim: width of the context's tokens.
      num_blocks: residual blocks of a level on the way down; one more on the way up.
      groups: of the norms.
      linear_projection: the files hold proj_in and proj_out as matrices (2.x), not as 1x1
        convolutions (1.x); the numbers are the same.
      dtype: compute type; norms' statistics and softmax are at least float32.
      remat: recompute each block's activations in the backward pass.
    """

    img_resolution: int = 64
    img_channels: int = 4
    out_channels: int | None = None
    widths: Sequence[int] = (320, 640, 1280, 1280)
    attends: Sequence[bool] = (True, True, True, False)
    heads: Sequence[int] = (8, 8, 8, 8)
    context_dim: int = 768
    num_blocks: int = 2
    groups: int = 32
    linear_projection: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    label_dim = 0

    @property
    def layer_names(self) -> list[str]:
        """The levels on the way down and up."""
        return [f"{way}{i}" for way in ("down", "up") for i in range(len(self.widths))]

    def check_widths(self) -> None:
        """Raises ValueError where widths, heads and groups do not fit together."""
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % self.groups or width % heads:
                raise ValueError(
                    f"UNet2DCondition: {width} channels; expected a multiple of the {self.groups} "
                    f"groups and of the {heads} heads"
                )

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.widths) - 1)

    def _embed(self, batch: int, c_noise: Array, asked: Asked) -> Array:
        """MLP(time features); the text enters in the layers."""
        label = asked.label
        if label is None or label.ndim != 3 or label.shape[-1] != self.context_dim:
            raise ValueError(
                f"UNet2DCondition: label {None if label is None else label.shape} given; expected "
                f"a text's tokens [B, M, {self.context_dim}]"
            )
        time = layers.positional_embedding(jnp.broadcast_to(c_noise, (batch,)), self.widths[0])
        dense = functools.partial(Dense, 4 * self.widths[0], dtype=time.dtype)
        first = dense(name="time_embedding.linear_1")(time)
        return dense(name="time_embedding.linear_2")(nn.silu(first))

    def _layers(self, x: Array, emb: Array, asked: Asked) -> Iterator[tuple[str, Array]]:
        """Gives the output of each level."""
        context = jnp.asarray(asked.label)
        levels, dtype = len(self.widths), self.dtype
        h = Conv(self.widths[0], 3, dtype=dtype, name="conv_in")(x)
        skips = [h]
        for level, width in enumerate(self.widths):
            at = f"down_blocks.{level}"
            for i in range(self.num_blocks):
                h = self._pair(h, emb, context, level, at, i)
                skips.append(h)
            if level < levels - 1:
                h = Conv(width, 3, stride=2, dtype=dtype, name=f"{at}.downsamplers.0.conv")(h)
                skips.append(h)
            yield f"down{level}", h
        last = levels - 1
        h = self._residual(h, emb, self.widths[last], "mid_block.resnets.0")
        h = self._transformer(h, context, self.heads[last], "mid_block.attentions.0")
        h = self._residual(h, emb, self.widths[last], "mid_block.resnets.1")
        yield "mid", h
        for i, level in enumerate(reversed(range(levels))):
            at = f"up_blocks.{i}"
            for j in range(self.num_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._pair(h, emb, context, level, at, j)
            if level:
                width, name = self.widths[level], f"{at}.upsamplers.0.conv"
                h = Conv(width, 3, up=True, dtype=dtype, name=name)(h)
            yield f"up{i}", h
        h = nn.silu(layers.GroupNorm(_EPS, self.groups, name="conv_norm_out")(h))
        h = Conv(self.out_channels or self.img_channels, 3, dtype=dtype, name="conv_out")(h)
        yield "out", h.astype(layers.wide(x.dtype))

    def _pair(self, h: Array, emb: Array, context: Array, level: int, at: str, i: int) -> Array:
        """A residual block, and a transformer behind it where the level has them."""
        h = self._residual(h, emb, self.widths[level], f"{at}.resnets.{i}")
        if not self.attends[level]:
            return h
        return self._transformer(h, context, self.heads[level], f"{at}.attentions.{i}")

    def _residual(self, h: Array, emb: Array, width: int, name: str) -> Array:
        make: Any = nn.remat(ResBlock) if self.remat else ResBlock
        return make(width, self.groups, _EPS, self.dtype, name=name)(h, emb)

    def _transformer(self, h: Array, context: Array, heads: int, name: str) -> Array:
        make: Any = nn.remat(Transformer) if self.remat else Transformer
        return make(heads, self.groups, self.dtype, name=name)(h, context)
