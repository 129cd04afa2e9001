"""OpenAI's ADM networks (2105.05233): the U-Net and its encoder half as a classifier, NHWC.

They consist of the same blocks as DhariwalUNet, under the same parameter names. What differs: every
norm has 32 groups, the noise input is a time step, heads are counted or chosen by their width, and
resampling may be a convolution of its own. The checkpoints of OGDM_adm, DSG and DG are of these two
kinds.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from ogdm_jax.networks import layers
from ogdm_jax.networks.adm import ADM, INIT, STYLE
from ogdm_jax.networks.blocks import Style
from ogdm_jax.networks.trunk import Step
from ogdm_jax.typing import Array

_SPATIAL_WIDTH = 2048
_POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


class OpenAIADM(ADM):
    """Settings that the U-Net and the encoder share.

    Attributes: UNet's, and
      num_heads: heads of each attention, where head_channels is 0.
      head_channels: width of a head; 0 = num_heads decides.
      scale_shift: the embedding scales and shifts (use_scale_shift_norm); otherwise it is added.
      resblock_updown: blocks resample; otherwise a strided convolution halves, and nearest
        neighbours followed by a convolution double.
      time_scale: factor of the time input.
    """

    dropout: float = 0.0
    num_heads: int = 1
    head_channels: int = 0
    scale_shift: bool = True
    resblock_updown: bool = True
    time_scale: float = 1.0

    @property
    def _style(self) -> Style:
        return dataclasses.replace(STYLE, groups=32, adaptive_scale=self.scale_shift)

    def heads(self, channels: int) -> int:
        """Attention heads of a block: channels // head_channels where that is set, else num_heads.

        Raises:
          ValueError: the heads do not divide the channels.
        """
        count = channels // self.head_channels if self.head_channels > 0 else self.num_heads
        if count < 1 or channels % count:
            raise ValueError(
                f"{type(self).__name__}: {channels} channels do not divide into heads "
                f"(num_heads {self.num_heads}, head_channels {self.head_channels})"
            )
        return count

    def _block(self, step: Step, h: Array, emb: Array, dropout_keys: Array | None) -> Array:
        if self.resblock_updown or not (step.up or step.down):
            return super()._block(step, h, emb, dropout_keys)
        return self._conv(step.name, h.shape[-1], stride=2 if step.down else 1, up=step.up)(h)


class ADMUNet(OpenAIADM):
    """guided-diffusion's UNetModel, which predicts eps, and a variance in further channels where it
    was trained to.

    c_noise [B] are time steps (0 to 999, fractions allowed), augment must be None. The
    super-resolution networks have 6 img_channels: the noisy image, then the bilinearly enlarged
    small one. With a learned variance out_channels is 2 img_channels.

    Attributes: OpenAIADM's.
    """


class AttentionPool(nn.Module):
    """CLIP's attention pooling, [B,h,w,C] -> [B,features].

    One query, made from the mean of all pixels, attends to the pixels and to that mean.

    Attributes:
      features: width of the output.
      heads: attention heads.
    """

    features: int
    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B,h,w,C] to [B,features]."""
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        tokens = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
        place = self.param("positional_embedding", nn.initializers.normal(c**-0.5), (h * w + 1, c))
        tokens = tokens + place[None].astype(x.dtype)
        qkv = layers.Dense(3 * c, INIT, INIT, name="qkv_proj", dtype=x.dtype)(tokens)
        width = c // self.heads
        q, k, v = (part.reshape(b, -1, self.heads, width) for part in jnp.split(qkv, 3, axis=-1))
        pooled = layers.attend(q[:, :1], k, v).reshape(b, c)
        return layers.Dense(self.features, INIT, INIT, name="c_proj", dtype=x.dtype)(pooled)


class ADMEncoder(OpenAIADM):
    """guided-diffusion's EncoderUNetModel: the U-Net's first half and a pooling head, a classifier
    of noisy images.

    c_noise [B] -> logits [B,out_channels]. It serves OpenAI's classifiers (time steps 0 to 999) and
    DG's extractor and discriminator head (times in [0, 1]: time_scale 999). A conditional head has
    label_dim (1000 in DG's files, whatever the data set). The authors' final sigmoid of DG is no
    part of it. The features "mid" are what is pooled.

    Attributes: OpenAIADM's, where out_channels is the number of classes or logits and must be set,
    and
      pool: "attention" (that of all published encoders), "adaptive" (mean), "spatial" or
        "spatial_v2" (means of all levels through two dense layers).
    """

    pool: str = "attention"

    def __post_init__(self) -> None:
        if self.pool not in _POOLS:
            expected = "'attention', 'adaptive', 'spatial' or 'spatial_v2'"
            raise ValueError(f"ADMEncoder.pool: {self.pool!r} given; expected {expected}")
        if self.out_channels is None:
            raise ValueError(
                "ADMEncoder.out_channels: None given; expected the number of classes or logits"
            )
        super().__post_init__()

    def plan(self) -> list[Step]:
        """The encoder's blocks and the two behind them."""
        return self._encoder()

    def _head(self, h: Array, skips: list[Array]) -> Array:
        if self.pool.startswith("spatial"):
            return self._pool_levels([*skips, h])
        h = nn.silu(self._norm(h))
        if self.pool == "attention":
            return AttentionPool(self._outputs, self.heads(h.shape[-1]), name="out_pool")(h)
        conv = layers.Conv(self._outputs, 1, STYLE.zero_init, name="out_conv", dtype=self.dtype)
        return conv(h.mean(axis=(1, 2), keepdims=True))[:, 0, 0]

    def _pool_levels(self, levels: list[Array]) -> Array:
        dense = lambda name, width: layers.Dense(
            width, INIT, INIT, name=name, dtype=layers.wide(levels[-1].dtype)
        )
        means = jnp.concatenate([level.mean(axis=(1, 2)) for level in levels], axis=-1)
        hidden = dense("out_dense0", _SPATIAL_WIDTH)(means)
        if self.pool == "spatial":
            return dense("out_dense1", self._outputs)(nn.relu(hidden))
        hidden = self._norm(hidden[:, None, None])[:, 0, 0]
        return dense("out_dense1", self._outputs)(nn.silu(hidden))
