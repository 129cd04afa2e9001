"""The ADM U-Net in EDM's form (DhariwalUNet; 2105.05233 and 2206.00364, appendix F.1), NHWC.

`encode`, `middle` and `decode` are the trunk shared with OpenAI's form (adm_openai.py): the same
blocks under the same parameter names, EDM's (enc_64x64_block0, dec_8x8_in0, ...).
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from ogdm_jax.networks import layers
from ogdm_jax.networks.blocks import UNetBlock
from ogdm_jax.networks.unet import check_input
from ogdm_jax.typing import Array

Block = Callable[..., Array]  # block(h, name, features, attend=False, up=False, down=False) -> h


def encode(
    h: Array,
    block: Block,
    sides: Sequence[int],
    widths: Sequence[int],
    depth: int,
    attend_at: Sequence[int],
):
    """The encoder behind its first convolution: (deepest features, skips of every block),
    parameters enc_RxR_*.
    """
    skips = [h]
    for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
        if level:
            h = block(h, f"enc_{side}x{side}_down", h.shape[-1], down=True)
            skips.append(h)
        for i in range(depth):
            h = block(h, f"enc_{side}x{side}_block{i}", width, side in attend_at)
            skips.append(h)
    return h, skips


def middle(h: Array, block: Block, side: int) -> Array:
    """Two blocks at the deepest level, the first with attention: dec_RxR_in0, dec_RxR_in1."""
    h = block(h, f"dec_{side}x{side}_in0", h.shape[-1], True)
    return block(h, f"dec_{side}x{side}_in1", h.shape[-1])


def decode(
    h: Array,
    skips: list[Array],
    block: Block,
    sides: Sequence[int],
    widths: Sequence[int],
    depth: int,
    attend_at: Sequence[int],
) -> Array:
    """The decoder in front of the last norm; every block takes one skip, and attends at the
    resolutions named.
    """
    for level in reversed(range(len(sides))):
        side, width = sides[level], widths[level]
        if level < len(sides) - 1:
            h = block(h, f"dec_{side}x{side}_up", h.shape[-1], up=True)
        for i in range(depth + 1):
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = block(h, f"dec_{side}x{side}_block{i}", width, side in attend_at)
    return h


class DhariwalUNet(nn.Module):
    """The raw network F of EDM's ImageNet-64 models. Heads have 64 channels: narrower blocks do not
    attend.

    Attributes: as SongUNet's, without its encoder, embedding and filter variants. OpenAI's
    conventions (32 groups in every norm, time steps instead of c_noise, other heads and resampling)
    have their own module, ADMUNet.
    """

    img_resolution: int
    img_channels: int = 3
    out_channels: int | None = None
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: Sequence[int] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: Sequence[int] = (32, 16, 8)
    dropout: float = 0.10
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        c_noise: Array,
        label: Array | None = None,
        augment: Array | None = None,
        dropout_keys: Array | None = None,
        tap: str | None = None,
    ) -> Array:
        """F(x; c_noise, label, augment): arguments, taps and result as SongUNet's."""
        levels = len(self.channel_mult)
        check_input("DhariwalUNet", x, self.img_resolution, self.img_channels, levels, tap)
        init = layers.scaled_init("kaiming_uniform", math.sqrt(1 / 3))
        zero = layers.scaled_init("kaiming_uniform", 0.0)
        make = nn.remat(UNetBlock) if self.remat else UNetBlock
        emb = self._embed(x.shape[0], c_noise, label, augment, init, zero)
        if tap == "emb":
            return emb

        def block(h: Array, name: str, features: int, attend: bool = False, **more) -> Array:
            module = make(
                out=features,
                heads=features // 64 if attend else 0,
                kernel_init=init,
                zero_init=zero,
                attn_init=init,
                bias_init=init,
                dropout=self.dropout,
                dtype=self.dtype,
                name=name,
                **more,
            )
            return module(h, emb, dropout_keys)

        sides = [self.img_resolution >> level for level in range(levels)]
        widths = [self.model_channels * mult for mult in self.channel_mult]
        plan = (block, sides, widths, self.num_blocks, self.attn_resolutions)
        first = f"enc_{sides[0]}x{sides[0]}_conv"
        h = layers.Conv(widths[0], 3, init, init, name=first, dtype=self.dtype)(
            x.astype(self.dtype)
        )
        h, skips = encode(h, *plan)
        h = middle(h, block, sides[-1])
        if tap == "mid":
            return h
        h = layers.settle(self, decode(h, skips, *plan), "out_norm")
        h = nn.silu(layers.GroupNorm(1e-5, name="out_norm")(h))
        features = self.img_channels if self.out_channels is None else self.out_channels
        h = layers.Conv(features, 3, zero, name="out_conv", dtype=self.dtype)(h)
        return h.astype(layers.wide(x.dtype))

    def _embed(
        self, batch: int, c_noise: Array, label: Array | None, augment: Array | None, init, zero
    ) -> Array:
        """Noise level, augmentation and class as one vector [B, model_channels *
        channel_mult_emb].
        """
        c_noise = jnp.broadcast_to(jnp.asarray(c_noise), (batch,))
        emb = layers.positional_embedding(c_noise, self.model_channels)

        def dense(
            name: str, features: int, h: Array, kernel_init=init, bias_init=init, **more
        ) -> Array:
            return layers.Dense(
                features, kernel_init, bias_init, name=name, dtype=emb.dtype, **more
            )(h)

        if self.augment_dim and (augment is not None or self.is_initializing()):
            given = jnp.zeros((batch, self.augment_dim)) if augment is None else augment
            emb = emb + dense("map_augment", self.model_channels, given, zero, use_bias=False)
        total = self.model_channels * self.channel_mult_emb
        emb = dense("map_layer1", total, nn.silu(dense("map_layer0", total, emb)))
        if self.label_dim:
            embedding = layers.scaled_init("kaiming_normal", math.sqrt(self.label_dim))
            hot = layers.one_hot(label, batch, self.label_dim)
            emb = emb + dense("map_label", total, hot, embedding, use_bias=False)
        return nn.silu(emb)
