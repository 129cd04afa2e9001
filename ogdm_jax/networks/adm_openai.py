"""OpenAI's ADM networks (2105.05233): the U-Net and its encoder half as a classifier, NHWC.

They consist of the same blocks as DhariwalUNet, under the same parameter names. What differs: every
norm has 32 groups, the noise input is a time step, heads are counted or given by their width, and
resampling may be a convolution of its own. OGDM_adm's, DSG's and DG's checkpoints are of these two
kinds.
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ogdm_jax.networks import layers
from ogdm_jax.networks.adm import Block, decode, encode, middle
from ogdm_jax.networks.blocks import UNetBlock
from ogdm_jax.networks.unet import check_input
from ogdm_jax.typing import Array

_GROUPS, _EPS = 32, 1e-5
_SPATIAL_WIDTH = 2048
_INIT = layers.scaled_init(
    "kaiming_uniform", math.sqrt(1 / 3)
)  # PyTorch's default for weights and biases
_ZERO = layers.scaled_init("kaiming_uniform", 0.0)


class _Trunk(nn.Module):
    """Settings and parts that the U-Net and the encoder share."""

    img_resolution: int
    img_channels: int = 3
    out_channels: int | None = None
    label_dim: int = 0
    model_channels: int = 192
    channel_mult: Sequence[float] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: Sequence[int] = (32, 16, 8)
    num_heads: int = 1
    head_channels: int = 0
    scale_shift: bool = True
    resblock_updown: bool = True
    dropout: float = 0.0
    time_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @property
    def augment_dim(self) -> int:
        """No augmentation labels."""
        return 0

    @property
    def sides(self) -> list[int]:
        """Resolution of each level."""
        return [self.img_resolution >> level for level in range(len(self.channel_mult))]

    @property
    def widths(self) -> list[int]:
        """Channels of each level; multipliers below 1 occur (512 pixels)."""
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    def heads(self, channels: int) -> int:
        """Attention heads of a block: channels // head_channels where that is given, else
        num_heads.
        """
        count = channels // self.head_channels if self.head_channels > 0 else self.num_heads
        if count < 1 or channels % count:
            raise ValueError(
                f"{type(self).__name__}: {channels} channels do not divide into heads "
                f"(num_heads {self.num_heads}, head_channels {self.head_channels})"
            )
        return count

    def _check(self, x: Array, augment: Array | None, tap: str | None) -> None:
        name = type(self).__name__
        check_input(name, x, self.img_resolution, self.img_channels, len(self.channel_mult), tap)
        if augment is not None:
            raise ValueError(
                f"{name}: augmentation labels given; expected None, the network has no place for "
                "them"
            )

    def _embed(self, batch: int, time: Array, label: Array | None) -> Array:
        """silu(MLP(embedding of time_scale * time) + class embedding), [B, model_channels *
        channel_mult_emb].
        """
        time = jnp.broadcast_to(jnp.asarray(time), (batch,))
        emb = layers.positional_embedding(
            time.astype(layers.wide(time.dtype)) * self.time_scale, self.model_channels
        )
        total = self.model_channels * self.channel_mult_emb
        dense = lambda name: layers.Dense(total, _INIT, _INIT, name=name, dtype=emb.dtype)
        h = dense("map_layer1")(nn.silu(dense("map_layer0")(emb)))
        if self.label_dim:
            hot = layers.one_hot(label, batch, self.label_dim)
            table = nn.initializers.normal(1.0)
            h = h + layers.Dense(total, table, use_bias=False, name="map_label", dtype=emb.dtype)(
                hot
            )
        return nn.silu(h)

    def _block(self, emb: Array, dropout_keys: Array | None) -> Block:
        """The function with which the trunk makes and applies its blocks."""
        make = nn.remat(UNetBlock) if self.remat else UNetBlock

        def block(
            h: Array,
            name: str,
            features: int,
            attend: bool = False,
            up: bool = False,
            down: bool = False,
        ):
            if (up or down) and not self.resblock_updown:
                stride = {"stride": 2} if down else {"up": True}
                return layers.Conv(
                    features, 3, _INIT, _INIT, name=name, dtype=self.dtype, **stride
                )(h)
            module = make(
                out=features,
                heads=self.heads(features) if attend else 0,
                up=up,
                down=down,
                kernel_init=_INIT,
                zero_init=_ZERO,
                attn_init=_INIT,
                bias_init=_INIT,
                groups=_GROUPS,
                eps=_EPS,
                dropout=self.dropout,
                adaptive_scale=self.scale_shift,
                dtype=self.dtype,
                name=name,
            )
            return module(h, emb, dropout_keys)

        return block

    def _encode(self, x: Array, block: Block) -> tuple[Array, list[Array]]:
        first = f"enc_{self.img_resolution}x{self.img_resolution}_conv"
        conv = layers.Conv(self.widths[0], 3, _INIT, _INIT, name=first, dtype=self.dtype)
        h = conv(x.astype(self.dtype))
        return encode(h, block, self.sides, self.widths, self.num_blocks, self.attn_resolutions)


class ADMUNet(_Trunk):
    """guided-diffusion's UNetModel, which predicts eps, and a variance in further channels where
    trained to.

    Attributes:
      img_resolution, img_channels: of the input (6 channels for the super-resolution networks: the
        noisy image, then the bilinearly enlarged small one).   out_channels: None = img_channels; 2
        img_channels with learned variance.
      label_dim: classes, 0 = unconditional.   model_channels, channel_mult, channel_mult_emb,
        num_blocks: sizes.
      attn_resolutions: image sides (not downsampling factors) at which blocks attend; the deepest
        level always does.
      num_heads, head_channels: heads of each attention, or the width of one where that is above 0.
      scale_shift: the embedding scales and shifts (use_scale_shift_norm).   resblock_updown: blocks
        resample; otherwise a strided convolution, and nearest neighbours followed by a convolution.
      dropout, dtype, remat: as SongUNet's.   time_scale: factor of the time input.
    """

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
        """Output [B,H,W,out_channels] at time steps c_noise [B] (0 to 999, fractions allowed), at
        least float32.

        label, dropout_keys, tap: as SongUNet's ("mid" is the output of OpenAI's middle_block).
          augment must be None.
        """
        self._check(x, augment, tap)
        emb = self._embed(x.shape[0], c_noise, label)
        if tap == "emb":
            return emb
        block = self._block(emb, dropout_keys)
        h, skips = self._encode(x, block)
        h = middle(h, block, self.sides[-1])
        if tap == "mid":
            return h
        h = decode(h, skips, block, self.sides, self.widths, self.num_blocks, self.attn_resolutions)
        h = layers.settle(self, h, "out_norm")
        h = nn.silu(layers.GroupNorm(_EPS, _GROUPS, name="out_norm")(h))
        features = self.img_channels if self.out_channels is None else self.out_channels
        h = layers.Conv(features, 3, _ZERO, name="out_conv", dtype=self.dtype)(h)
        return h.astype(layers.wide(x.dtype))


class AttentionPool(nn.Module):
    """CLIP's attention pooling: [B,h,w,C] -> [B,features], the answer of the mean pixel to all
    pixels and itself.
    """

    features: int
    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        tokens = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
        place = self.param("positional_embedding", nn.initializers.normal(c**-0.5), (h * w + 1, c))
        tokens = tokens + place[None].astype(x.dtype)
        qkv = layers.Dense(3 * c, _INIT, _INIT, name="qkv_proj", dtype=x.dtype)(tokens)
        q, k, v = (
            part.reshape(b, -1, self.heads, c // self.heads) for part in jnp.split(qkv, 3, axis=-1)
        )
        logits = jnp.einsum("bhc,bthc->bht", q[:, 0], k) / math.sqrt(
            c // self.heads
        )  # only token 0 is returned
        weights = jax.nn.softmax(logits.astype(layers.wide(logits.dtype)), axis=-1).astype(v.dtype)
        pooled = jnp.einsum("bht,bthc->bhc", weights, v).reshape(b, c)
        return layers.Dense(self.features, _INIT, _INIT, name="c_proj", dtype=x.dtype)(pooled)


class ADMEncoder(_Trunk):
    """guided-diffusion's EncoderUNetModel: the U-Net's first half and a pooling head, a classifier
    of noisy images.

    It serves OpenAI's classifiers (time steps 0 to 999) and DG's extractor and discriminator head
    (times in [0, 1]: time_scale 999). A conditional head has label_dim (1000 in DG's files,
    whatever the data set). DG's final sigmoid is
    not part of it: the output is the logit.

    Attributes: as ADMUNet's, and
      out_channels: classes or logits (None is not allowed).
      pool: "attention" (the default of all published ones), "adaptive" (mean), "spatial" or
        "spatial_v2" (means of all levels through two dense layers).
    """

    pool: str = "attention"

    def __post_init__(self):
        if self.pool not in ("attention", "adaptive", "spatial", "spatial_v2"):
            expected = "'attention', 'adaptive', 'spatial' or 'spatial_v2'"
            raise ValueError(f"ADMEncoder.pool: {self.pool!r} given; expected {expected}")
        if self.out_channels is None:
            raise ValueError(
                "ADMEncoder.out_channels: None given; expected the number of classes or logits"
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
        """Logits [B,out_channels] at times c_noise [B]; with tap "mid" the features [B,h,w,C] that
        are pooled.
        """
        self._check(x, augment, tap)
        emb = self._embed(x.shape[0], c_noise, label)
        if tap == "emb":
            return emb
        block = self._block(emb, dropout_keys)
        h, skips = self._encode(x, block)
        h = middle(h, block, self.sides[-1])
        if tap == "mid":
            return h
        pool: Callable[..., Array] = (
            self._spatial if self.pool.startswith("spatial") else self._pooled
        )
        return pool(h, skips).astype(layers.wide(x.dtype))

    def _pooled(self, h: Array, _: list[Array]) -> Array:
        h = nn.silu(layers.GroupNorm(_EPS, _GROUPS, name="out_norm")(h))
        if self.pool == "attention":
            return AttentionPool(self.out_channels, self.heads(h.shape[-1]), name="out_pool")(h)
        h = h.mean(axis=(1, 2), keepdims=True)
        return layers.Conv(self.out_channels, 1, _ZERO, name="out_conv", dtype=self.dtype)(h)[
            :, 0, 0
        ]

    def _spatial(self, h: Array, skips: list[Array]) -> Array:
        dense = lambda name, width: layers.Dense(
            width, _INIT, _INIT, name=name, dtype=layers.wide(h.dtype)
        )
        means = jnp.concatenate([level.mean(axis=(1, 2)) for level in [*skips, h]], axis=-1)
        hidden = dense("out_dense0", _SPATIAL_WIDTH)(means)
        if self.pool == "spatial":
            return dense("out_dense1", self.out_channels)(nn.relu(hidden))
        norm = layers.GroupNorm(_EPS, _GROUPS, name="out_norm")
        return dense("out_dense1", self.out_channels)(nn.silu(norm(hidden[:, None, None])[:, 0, 0]))
