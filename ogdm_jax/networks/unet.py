"""DDPM++ and NCSN++ in the form of EDM (SongUNet; 2011.13456 and 2206.00364, appendix F.1), NHWC.

DDPM++ = positional embedding, standard encoder, filter [1, 1]; NCSN++ = Fourier embedding, residual
encoder, filter [1, 3, 3, 1]. Parameters are named as in the published checkpoints, with "_" for "."
between part and layer (enc_32x32_block0), so that interop/names_edm.py is a table of transposes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ogdm_jax.networks import layers
from ogdm_jax.networks.blocks import Style
from ogdm_jax.networks.tapped import Asked
from ogdm_jax.networks.trunk import Step, UNet
from ogdm_jax.typing import Array

_INIT = layers.scaled_init("xavier_uniform")
_STYLE = Style(
    kernel_init=_INIT,
    zero_init=layers.scaled_init("xavier_uniform", 1e-5),
    attn_init=layers.scaled_init("xavier_uniform", math.sqrt(0.2)),
    eps=1e-6,
    skip_scale=math.sqrt(0.5),
    adaptive_scale=False,
    resample_proj=True,
)
_KNOWN = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "residual"),
    "decoder_type": ("standard",),
}


class SongUNet(UNet):
    """The raw network F of EDM's DDPM++ and NCSN++.

    Encoder blocks attend at attn_resolutions; of a decoder level at these only the last block does.

    Attributes: UNet's, and
      augment_dim: augmentation labels (9), 0 = none.
      embedding_type: positional or fourier.
      channel_mult_noise: 1 (DDPM++) or 2 (NCSN++).
      encoder_type: standard or residual.
      decoder_type: standard. The authors' 'skip' variants, which no published model has, are not
        offered.
      resample_filter: low-pass taps.

    Raises:
      ValueError: an unknown embedding_type, encoder_type or decoder_type.
    """

    augment_dim: int = 0
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: Sequence[int] = (1, 1)

    only_last_attends = True

    def __post_init__(self) -> None:
        for field, known in _KNOWN.items():
            if (value := getattr(self, field)) not in known:
                expected = " or ".join(map(repr, known))
                raise ValueError(f"SongUNet.{field}: {value!r} given; expected {expected}")
        super().__post_init__()

    @property
    def _head_prefix(self) -> str:
        return f"dec_{self.img_resolution}x{self.img_resolution}_aux_"

    @property
    def _style(self) -> Style:
        return dataclasses.replace(_STYLE, taps=tuple(self.resample_filter))

    @property
    def _first_width(self) -> int:
        return self.model_channels

    def heads(self, channels: int) -> int:
        """One head."""
        return 1

    def _join_image(self, step: Step, h: Array, image: Array) -> tuple[Array, Array]:
        if self.encoder_type == "standard":
            return h, image
        # The low-passed input image travels beside the blocks and joins them at every level.
        name = step.name.replace("down", "aux_residual")
        taps = tuple(self.resample_filter)
        image = self._conv(name, h.shape[-1], down=True, fused=True, taps=taps)(image)
        h = (h + image) * math.sqrt(0.5)
        return h, h

    def _embed(self, batch: int, c_noise: Array, asked: Asked) -> Array:
        width = self.model_channels * self.channel_mult_noise
        c_noise = jnp.broadcast_to(jnp.asarray(c_noise), (batch,))
        if self.embedding_type == "fourier":
            emb = layers.FourierEmbedding(width, name="map_noise")(c_noise)
        else:
            emb = layers.positional_embedding(c_noise, width, endpoint=True)
        # [sin | cos], as the checkpoints expect
        emb = jnp.concatenate(jnp.split(emb, 2, axis=1)[::-1], axis=1)

        def dense(name: str, features: int, h: Array, **more: Any) -> Array:
            return layers.Dense(features, _INIT, name=name, dtype=emb.dtype, **more)(h)

        if self.label_dim:
            hot = layers.one_hot(asked.label, batch, self.label_dim) * math.sqrt(self.label_dim)
            emb = emb + dense("map_label", width, hot)
        augment = asked.augment
        if self.augment_dim and (augment is not None or self.is_initializing()):
            augment = jnp.zeros((batch, self.augment_dim)) if augment is None else augment
            emb = emb + dense("map_augment", width, augment, use_bias=False)
        total = self.model_channels * self.channel_mult_emb
        emb = nn.silu(dense("map_layer0", total, emb))
        return nn.silu(dense("map_layer1", total, emb))
