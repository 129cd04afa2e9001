"""DDPM++ and NCSN++ in the form of EDM (SongUNet; 2011.13456 and 2206.00364, appendix F.1), NHWC.

DDPM++ = positional embedding, standard encoder, filter [1, 1]; NCSN++ = Fourier embedding, residual
encoder, filter [1, 3, 3, 1]. Parameters are named as in the published checkpoints, with "_" for "."
between part and layer (enc_32x32_block0), so that interop/names_edm.py is a table of transposes.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from ogdm_jax.networks import layers
from ogdm_jax.networks.blocks import UNetBlock
from ogdm_jax.typing import Array

TAPS = (None, "mid", "emb")


def check_input(
    network: str, x: Array, resolution: int, channels: int, levels: int, tap: str | None
) -> None:
    """Raises ValueError where x is not [B,H,W,channels] with sides that the levels can halve, or
    the tap is unknown.
    """
    factor = 2 ** (levels - 1)
    if (
        x.ndim != 4
        or x.shape[-1] != channels
        or x.shape[1] % factor
        or x.shape[2] % factor
        or resolution % factor
    ):
        raise ValueError(
            f"{network}: x has shape {x.shape} (img_resolution {resolution}); expected [B, H, W, "
            f"{channels}] "
            f"with sides divisible by {factor}"
        )
    if tap not in TAPS:
        raise ValueError(f"{network}: tap {tap!r} given; expected None, 'mid' or 'emb'")


class SongUNet(nn.Module):
    """The raw network F of EDM's DDPM++ and NCSN++.

    Attributes:
      img_resolution, img_channels: of the input.   out_channels: of the output; None =
        img_channels.
      label_dim: classes, 0 = unconditional.   augment_dim: augmentation labels (9), 0 = none.
      model_channels, channel_mult, channel_mult_emb, num_blocks, attn_resolutions: widths and
        depths; encoder blocks attend at the resolutions named, decoder levels only in their last
        block, the deepest level always.
      dropout: probability; active only where dropout_keys are given.
      embedding_type: positional or fourier.   channel_mult_noise: 1 (DDPM++) or 2 (NCSN++).
      encoder_type: standard or residual.   resample_filter: low-pass taps.
      dtype: compute type of the blocks; parameters, embedding and statistics stay float32.
      remat: recompute the blocks' activations in the backward pass.

    Raises:
      ValueError: an unknown embedding_type, encoder_type or decoder_type ('skip' variants of the
      authors' code, which
        no published model uses, are not offered).
    """

    img_resolution: int
    img_channels: int = 3
    out_channels: int | None = None
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.10
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: Sequence[int] = (1, 1)
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def __post_init__(self):
        for field, known in (
            ("embedding_type", ("positional", "fourier")),
            ("encoder_type", ("standard", "residual")),
            ("decoder_type", ("standard",)),
        ):
            given = getattr(self, field)
            if given not in known:
                raise ValueError(
                    f"SongUNet.{field}: {given!r} given; expected {' or '.join(map(repr, known))}"
                )
        super().__post_init__()

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
        """F(x; c_noise, label, augment).

        Args:
          x: [B,H,W,C], already times c_in.   c_noise: [B] or a scalar.
          label: [B] int32 (-1 = no class), [B, label_dim] float, or None (no class). Ignored where
            label_dim is 0.
          augment: [B, augment_dim] or None (not augmented, the same as zeros).
          dropout_keys: [B] typed keys; None switches dropout off.
          tap: None, "mid" (output of the deepest level's second block, no decoder behind it) or
            "emb".

        Returns:
          [B,H,W,out_channels], at least float32. With a tap: the features [B,h,w,c], or the
          embedding [B,e].
        """
        levels = len(self.channel_mult)
        check_input("SongUNet", x, self.img_resolution, self.img_channels, levels, tap)
        init = layers.scaled_init("xavier_uniform")
        almost_zero = layers.scaled_init("xavier_uniform", 1e-5)
        taps = tuple(self.resample_filter)
        make = nn.remat(UNetBlock) if self.remat else UNetBlock

        def conv(name: str, features: int, kernel_init=init, **more) -> layers.Conv:
            return layers.Conv(features, 3, kernel_init, name=name, dtype=self.dtype, **more)

        emb = self._embed(x.shape[0], c_noise, label, augment, init)
        if tap == "emb":
            return emb

        def block(h: Array, name: str, features: int, attend: bool = False, **more) -> Array:
            module = make(
                out=features,
                heads=int(attend),
                kernel_init=init,
                zero_init=almost_zero,
                attn_init=layers.scaled_init("xavier_uniform", math.sqrt(0.2)),
                dropout=self.dropout,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
                taps=taps,
                adaptive_scale=False,
                resample_proj=True,
                dtype=self.dtype,
                name=name,
                **more,
            )
            return module(h, emb, dropout_keys)

        sides = [self.img_resolution >> level for level in range(levels)]
        widths = [self.model_channels * mult for mult in self.channel_mult]
        out_type = layers.wide(x.dtype)
        h = aux = x.astype(self.dtype)
        skips = []
        for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
            at = f"enc_{side}x{side}_"
            if level == 0:
                h = conv(at + "conv", self.model_channels)(h)
            else:
                h = block(h, at + "down", h.shape[-1], down=True)
                if self.encoder_type == "residual":
                    # The low-passed input image travels beside the blocks and joins them at every
                    # level.
                    aux = conv(at + "aux_residual", h.shape[-1], down=True, fused=True, taps=taps)(
                        aux
                    )
                    h = aux = (h + aux) * math.sqrt(0.5)
            skips.append(h)
            for i in range(self.num_blocks):
                h = block(h, f"{at}block{i}", width, side in self.attn_resolutions)
                skips.append(h)

        for level in reversed(range(levels)):
            side, width = sides[level], widths[level]
            at = f"dec_{side}x{side}_"
            if level == levels - 1:
                h = block(h, at + "in0", h.shape[-1], True)
                h = block(h, at + "in1", h.shape[-1])
                if tap == "mid":
                    return h
            else:
                h = block(h, at + "up", h.shape[-1], up=True)
            for i in range(self.num_blocks + 1):
                attend = i == self.num_blocks and side in self.attn_resolutions
                h = block(
                    jnp.concatenate([h, skips.pop()], axis=-1), f"{at}block{i}", width, attend
                )

        at = f"dec_{self.img_resolution}x{self.img_resolution}_"
        h = layers.settle(self, h, at + "aux_norm")
        h = nn.silu(layers.GroupNorm(1e-6, name=at + "aux_norm")(h))
        features = self.img_channels if self.out_channels is None else self.out_channels
        return conv(at + "aux_conv", features, almost_zero)(h).astype(out_type)

    def _embed(
        self, batch: int, c_noise: Array, label: Array | None, augment: Array | None, init
    ) -> Array:
        """Noise level, class and augmentation as one vector [B, model_channels *
        channel_mult_emb].
        """
        width = self.model_channels * self.channel_mult_noise
        c_noise = jnp.broadcast_to(jnp.asarray(c_noise), (batch,))
        if self.embedding_type == "fourier":
            emb = layers.FourierEmbedding(width, name="map_noise")(c_noise)
        else:
            emb = layers.positional_embedding(c_noise, width, endpoint=True)
        emb = jnp.concatenate(
            jnp.split(emb, 2, axis=1)[::-1], axis=1
        )  # [sin | cos], as the checkpoints expect

        def dense(name: str, features: int, h: Array, **more) -> Array:
            return layers.Dense(features, init, name=name, dtype=emb.dtype, **more)(h)

        if self.label_dim:
            hot = layers.one_hot(label, batch, self.label_dim) * math.sqrt(self.label_dim)
            emb = emb + dense("map_label", width, hot)
        if self.augment_dim and (augment is not None or self.is_initializing()):
            given = jnp.zeros((batch, self.augment_dim)) if augment is None else augment
            emb = emb + dense("map_augment", width, given, use_bias=False)
        total = self.model_channels * self.channel_mult_emb
        emb = nn.silu(dense("map_layer0", total, emb))
        return nn.silu(dense("map_layer1", total, emb))
