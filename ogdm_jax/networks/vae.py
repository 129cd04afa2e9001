"""Stable Diffusion's autoencoder (arXiv 2112.10752; AutoencoderKL of diffusers), NHWC.

An image [B,H,W,3] in [-1, 1] is encoded to the moments of a Gaussian on an 8 times coarser grid of
4 channels. A diffusion model sees latents z = (posterior sample - shift) * scale; `decode` takes
what z / scale + shift is. The decoder does not clip.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ogdm_jax.networks import layers
from ogdm_jax.networks.sd_blocks import Conv, Dense, ResBlock, as_tokens, attend
from ogdm_jax.typing import Array

_EPS = 1e-6  # of every norm
_LOG_VARIANCE = (-30.0, 20.0)


def posterior(moments: Array) -> tuple[Array, Array]:
    """(mean, std) [B,h,w,z] of the latent's Gaussian: the logarithm of its variance is clipped to
    -30..20.
    """
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_variance, *_LOG_VARIANCE) / 2)


def kl_divergence(moments: Array) -> Array:
    """[B]: KL(posterior || N(0, I)) = sum (mean^2 + var - 1 - ln var) / 2 of each image."""
    mean, std = posterior(moments)
    each = jnp.square(mean) + jnp.square(std) - 1 - 2 * jnp.log(std)
    return each.sum((1, 2, 3)) / 2


class Attention(nn.Module):
    """x + attention of one head over all pixels.

    Attributes:
      groups: of the norm.
      dtype: compute type.
    """

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,h,w,C] -> the same shape."""
        dense = functools.partial(Dense, x.shape[-1], dtype=self.dtype)
        h = as_tokens(layers.GroupNorm(_EPS, self.groups, name="group_norm")(x))
        q, k, v = (dense(name=f"to_{part}")(h) for part in "qkv")
        return x + dense(name="to_out.0")(attend(q, k, v, 1)).reshape(x.shape)


class _Coder(nn.Module):
    """What encoder and decoder share. Attributes as AutoencoderKL's."""

    channels: int
    widths: Sequence[int]
    num_blocks: int
    groups: int
    dtype: DTypeLike
    remat: bool

    def _block(self, h: Array, width: int, name: str) -> Array:
        make: Callable[..., Any] = nn.remat(ResBlock) if self.remat else ResBlock
        return make(width, self.groups, _EPS, self.dtype, name=name)(h)

    def _middle(self, h: Array) -> Array:
        width, attention = self.widths[-1], nn.remat(Attention) if self.remat else Attention
        h = self._block(h, width, "mid_block.resnets.0")
        h = attention(self.groups, self.dtype, name="mid_block.attentions.0")(h)
        return self._block(h, width, "mid_block.resnets.1")

    def _last(self, h: Array, channels: int) -> Array:
        h = nn.silu(layers.GroupNorm(_EPS, self.groups, name="conv_norm_out")(h))
        return Conv(channels, 3, dtype=self.dtype, name="conv_out")(h)


class Encoder(_Coder):
    """Image -> 2 z channels, before quant_conv."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,img_channels] -> [B,h,w,channels]."""
        h = Conv(self.widths[0], 3, dtype=self.dtype, name="conv_in")(x)
        for level, width in enumerate(self.widths):
            at = f"down_blocks.{level}"
            for i in range(self.num_blocks):
                h = self._block(h, width, f"{at}.resnets.{i}")
            if level < len(self.widths) - 1:  # zeros at the right and at the bottom only
                name, pads = f"{at}.downsamplers.0.conv", ((0, 1), (0, 1))
                h = Conv(width, 3, stride=2, pads=pads, dtype=self.dtype, name=name)(h)
        return self._last(self._middle(h), self.channels)


class Decoder(_Coder):
    """Latent behind post_quant_conv -> image. Blocks are counted from the coarse end."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """[B,h,w,z] -> [B,H,W,channels]."""
        h = Conv(self.widths[-1], 3, dtype=self.dtype, name="conv_in")(z)
        h = self._middle(h)
        for level, width in enumerate(reversed(self.widths)):
            at = f"up_blocks.{level}"
            for i in range(self.num_blocks + 1):
                h = self._block(h, width, f"{at}.resnets.{i}")
            if level < len(self.widths) - 1:
                name = f"{at}.upsamplers.0.conv"
                h = Conv(width, 3, up=True, dtype=self.dtype, name=name)(h)
        return self._last(h, self.channels)


class AutoencoderKL(nn.Module):
    """Encoder and decoder; call `network.apply(variables, x, method="encode")` or "decode".

    Attributes:
      img_channels: of the images.
      latent_channels: z.
      widths: channels of each level; a level halves the sides, but for the last one.
      num_blocks: residual blocks of an encoder level; a decoder level has one more.
      groups: of the norms.
      scale: a diffusion model's latent is (z - shift) * scale.
      shift: see scale; 0 for Stable Diffusion.
      dtype: compute type; statistics and softmax are at least float32.
      remat: recompute each block's activations in the backward pass. Guidance through the decoder
        at 512 pixels needs 6 GiB an image without it, in float32.
    """

    img_channels: int = 3
    latent_channels: int = 4
    widths: Sequence[int] = (128, 256, 512, 512)
    num_blocks: int = 2
    groups: int = 32
    scale: float = 0.18215
    shift: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Makes the four parts under the names of the files."""
        shape = (tuple(self.widths), self.num_blocks, self.groups, self.dtype, self.remat)
        self.encoder = Encoder(2 * self.latent_channels, *shape)
        self.decoder = Decoder(self.img_channels, *shape)
        self.quant_conv = Conv(2 * self.latent_channels, 1, dtype=self.dtype)
        self.post_quant_conv = Conv(self.latent_channels, 1, dtype=self.dtype)

    @property
    def factor(self) -> int:
        """Pixels along the side of a latent's pixel."""
        return 2 ** (len(self.widths) - 1)

    def picture_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, C) of what a latent of (h, w, z) is decoded to."""
        height, width, _ = latent_shape
        return height * self.factor, width * self.factor, self.img_channels

    def encode(self, x: Array) -> Array:
        """Moments [B,h,w,2z] of x [B,H,W,C]: mean and ln variance (`posterior`), unscaled.

        Raises:
          ValueError: sides that the levels do not halve, or other channels.
        """
        if x.shape[-1] != self.img_channels or any(side % self.factor for side in x.shape[1:3]):
            raise ValueError(
                f"AutoencoderKL: x has shape {x.shape}; expected [B, H, W, {self.img_channels}] "
                f"with sides divisible by {self.factor}"
            )
        return self.quant_conv(self.encoder(x)).astype(layers.wide(x.dtype))

    def decode(self, z: Array) -> Array:
        """The image [B,H,W,C] of an unscaled latent [B,h,w,z], not clipped."""
        return self.decoder(self.post_quant_conv(z)).astype(layers.wide(z.dtype))

    def __call__(self, x: Array) -> Array:
        """The image of the posterior's mean."""
        return self.decode(posterior(self.encode(x))[0])

    def from_scaled(self, z: Array) -> Array:
        """A diffusion model's latent as `decode` takes it."""
        return z / self.scale + self.shift

    def to_scaled(self, z: Array) -> Array:
        """An encoded latent as a diffusion model sees it."""
        return (z - self.shift) * self.scale
