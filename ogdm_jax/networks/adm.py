"""The ADM U-Net in EDM's form (DhariwalUNet; 2105.05233 and 2206.00364, appendix F.1), NHWC.

OpenAI's conventions (32 groups in every norm, time steps instead of c_noise, other heads and
resampling) have their own modules (adm_openai.py), which share the embedding.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ogdm_jax.networks import layers
from ogdm_jax.networks.blocks import Style
from ogdm_jax.networks.tapped import Asked
from ogdm_jax.networks.trunk import UNet
from ogdm_jax.typing import Array

# PyTorch's default for weights and biases
INIT = layers.scaled_init("kaiming_uniform", math.sqrt(1 / 3))
STYLE = Style(
    kernel_init=INIT,
    zero_init=layers.scaled_init("kaiming_uniform", 0.0),
    attn_init=INIT,
    bias_init=INIT,
)


class ADM(UNet):
    """What EDM's and OpenAI's forms of the ADM networks share beside the trunk.

    Attributes: as UNet's.
    """

    model_channels: int = 192
    channel_mult: Sequence[float] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: Sequence[int] = (32, 16, 8)

    time_scale = 1.0  # factor of the noise input

    @property
    def _style(self) -> Style:
        return STYLE

    def _embed(self, batch: int, c_noise: Array, asked: Asked) -> Array:
        """silu(MLP(noise embedding + augmentation) + class embedding)."""
        c_noise = jnp.broadcast_to(jnp.asarray(c_noise), (batch,))
        c_noise = c_noise.astype(layers.wide(c_noise.dtype)) * self.time_scale
        emb = layers.positional_embedding(c_noise, self.model_channels)
        total = self.model_channels * self.channel_mult_emb

        def dense(name: str, width: int, h: Array, init: layers.Initializer, **more: Any) -> Array:
            return layers.Dense(width, init, INIT, name=name, dtype=emb.dtype, **more)(h)

        augment = asked.augment
        if self.augment_dim and (augment is not None or self.is_initializing()):
            augment = jnp.zeros((batch, self.augment_dim)) if augment is None else augment
            zero = STYLE.zero_init
            emb = emb + dense("map_augment", self.model_channels, augment, zero, use_bias=False)
        emb = dense("map_layer1", total, nn.silu(dense("map_layer0", total, emb, INIT)), INIT)
        if self.label_dim:
            hot = layers.one_hot(asked.label, batch, self.label_dim)
            emb = emb + dense("map_label", total, hot, nn.initializers.normal(1.0), use_bias=False)
        return nn.silu(emb)


class DhariwalUNet(ADM):
    """The raw network F of EDM's ImageNet-64 models.

    Heads have 64 channels, so that blocks with fewer do not attend. All blocks of a level at
    attn_resolutions attend.

    Attributes: UNet's, and
      augment_dim: augmentation labels (9), 0 = none.
    """

    augment_dim: int = 0

    def heads(self, channels: int) -> int:
        """Of 64 channels each."""
        return channels // 64
