"""OGDM's discriminator: StyleGAN2's residual discriminator, conditional on a pair of noise levels.

2310.04041 trains it beside the denoiser, on (noised real image, projected image) pairs. The layers
are those of StyleGAN2-ADA's "resnet" discriminator (2006.06676, no augmentation, no half precision,
no clamping) whose label input is widened by the two numbers that say from which level to which
level the projection went. Images are judged in the compute type that the network is given; the
condition, the minibatch statistics and the logit stay float32.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ogdm_jax.networks.layers import conv2d, fir, one_hot, wide
from ogdm_jax.typing import Array

_TAPS = (1 / 8, 3 / 8, 3 / 8, 1 / 8)  # the binomial low-pass in front of every halving


def _leaky(x: Array, gain: float = math.sqrt(2.0)) -> Array:
    return nn.leaky_relu(x, 0.2) * gain


def _to_unit(x: Array) -> Array:
    """Rows of mean square 1."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + 1e-8)


class EqualConv(nn.Module):
    """Convolution with equalised learning rate: kernel ~ N(0, 1) is stored, kernel / sqrt(fan_in)
    is used.

    Because of the stored scale, a step of Adam changes every layer by the same share; this is part
    of the method.

    Attributes:
      features: channels of the output.
      kernel: side of the square kernel.
      stride: of both axes.
      padding: zeros on each side.
      bias: whether there is one.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B,H,W,C] to [B,H',W',features]."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape)
        kernel = kernel * (1.0 / math.sqrt(math.prod(shape[:3])))
        x = conv2d(x, kernel.astype(x.dtype), self.padding, self.stride)
        if not self.bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x + bias.astype(x.dtype)[None, None, None, :]


class EqualDense(nn.Module):
    """Fully connected layer with equalised learning rate and a learning-rate multiplier m.

    kernel ~ N(0, 1) / m is stored; kernel * m / sqrt(fan_in) and bias * m are used.

    Attributes:
      features: width of the output.
      multiplier: m.
    """

    features: int
    multiplier: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B,C] to [B,features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0 / self.multiplier), shape)
        kernel = kernel * (self.multiplier / math.sqrt(shape[0]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) * self.multiplier
        return jnp.dot(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)[None, :]


class Mapping(nn.Module):
    """The condition's embedding, its second-moment normalisation, and slowly learning layers.

    The normalisation keeps only the direction of the embedding, whose bias is zero at first. A
    fresh network therefore sees only the ratio of the two noise levels; it learns to see their size
    through the bias.

    Attributes:
      features: width of the result.
      layers: how many follow the embedding.
      normalised: whether the result has mean square 1, too. A wide network's has about 1.4 when it
        is fresh; that of a narrow one is chance, and with it the size of the logits.
    """

    features: int
    layers: int = 8
    normalised: bool = False

    @nn.compact
    def __call__(self, cond: Array) -> Array:
        """Maps cond [B,d] to [B,features]."""
        e = EqualDense(self.features, name="embed")(cond)
        e = _to_unit(e)
        for i in range(self.layers):
            e = _leaky(EqualDense(self.features, multiplier=0.01, name=f"fc{i}")(e))
        return _to_unit(e) if self.normalised else e


class ResidualBlock(nn.Module):
    """Two convolutions beside a 1x1 skip, both branches times sqrt(1/2); halves the resolution.

    Attributes:
      features: channels between the convolutions.
      out: channels of the output.
      from_rgb: whether a 1x1 convolution makes features of the image first.
    """

    features: int
    out: int
    from_rgb: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B,r,r,c] to [B,r/2,r/2,out]."""
        if self.from_rgb:
            x = _leaky(EqualConv(self.features, 1, name="fromrgb")(x))
        y = EqualConv(self.out, 1, bias=False, name="skip")(
            fir(x, _TAPS, down=2, padding=1)
        ) * math.sqrt(0.5)
        h = _leaky(EqualConv(self.features, 3, padding=1, name="conv0")(x))
        h = EqualConv(self.out, 3, stride=2, name="conv1")(fir(h, _TAPS, padding=2))
        return y + _leaky(h, gain=1.0)  # sqrt(2) of the activation times sqrt(1/2) of the branch


class Epilogue(nn.Module):
    """The last layers: minibatch statistics, a convolution, and the product with the condition.

    Attributes:
      features: channels.
      mbstd_group: see minibatch_deviation.
      mbstd_batch: see minibatch_deviation.
    """

    features: int
    mbstd_group: int
    mbstd_batch: int | None

    @nn.compact
    def __call__(self, x: Array, cmap: Array) -> Array:
        """Maps x [B,4,4,c] and the mapped condition cmap [B,c'] to logits [B]."""
        deviation = minibatch_deviation(x.astype(wide(x.dtype)), self.mbstd_group, self.mbstd_batch)
        x = jnp.concatenate([x, deviation.astype(x.dtype)], axis=-1)
        x = _leaky(EqualConv(self.features, 3, padding=1, name="conv")(x))
        x = _leaky(EqualDense(self.features, name="fc")(x.reshape(x.shape[0], -1)))
        x = EqualDense(cmap.shape[-1], name="out")(x).astype(cmap.dtype)
        return jnp.sum(x * cmap, axis=1) / math.sqrt(cmap.shape[-1])


def minibatch_deviation(x: Array, group: int = 4, batch: int | None = None) -> Array:
    """How much the examples of a group differ: one number per group, as an extra channel
    (1710.10196, section 3).

    In a chunk of n examples, example i shares its group with i + n/g, i + 2n/g, ... where g =
    min(group, n); the number is the mean over pixels and channels of the standard deviation over
    the group.

    Args:
      x: [B, h, w, c].
      group: examples in a group.
      batch: examples in a chunk; None takes the whole batch as one chunk. Chunks are contiguous, so
        that a batch that is cut over devices at multiples of `batch` has the same numbers as the
        uncut one.

    Returns:
      [B, h, w, 1].

    Raises:
      ValueError: chunks do not divide the batch, or groups do not divide a chunk.
    """
    size, (h, w, c) = x.shape[0], x.shape[1:]
    chunk = size if batch is None else min(batch, size)
    members = min(group, chunk)
    if size % chunk or chunk % members:
        raise ValueError(
            f"discriminator batch: {size} examples given; expected a multiple of "
            f"{chunk if size % chunk else members} for the minibatch statistics"
        )
    y = x.reshape(size // chunk, members, chunk // members, h, w, c)
    variance = jnp.var(y, axis=1, keepdims=True)
    deviation = jnp.mean(jnp.sqrt(variance + 1e-8), axis=(3, 4, 5), keepdims=True)
    return jnp.broadcast_to(deviation, (*y.shape[:3], h, w, 1)).reshape(size, h, w, 1)


class StyleGAN2Discriminator(nn.Module):
    """D(x, (t, s), label) -> logit: is x a noised real image of level s, or a projection from level
    t to s?

    Parameters at the published sizes: 23,872,000 (32x32), 23,877,120 (32x32, 10 classes),
    28,853,760 (64x64).

    Attributes:
      img_resolution: side of the square images, a power of two of at least 8.
      img_channels: channels of the images.
      label_dim: number of classes, 0 if unconditional.
      t_dim: numbers of the noise condition (2: from which level, to which level).
      channel_base, channel_max: channels at side r are min(channel_base // r, channel_max).
      normalised: see Mapping.
      mbstd_group: group of the minibatch standard deviation.
      mbstd_batch: see minibatch_deviation; None is the authors' behaviour (statistics over a
        device's batch), a number makes the result independent of the number of devices.
      dtype: compute type of the convolutions and of the layers behind them; None = that of the
        images. Parameters are float32.
    """

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    t_dim: int = 2
    channel_base: int = 32768
    channel_max: int = 512
    normalised: bool = False
    mbstd_group: int = 4
    mbstd_batch: int | None = None
    dtype: jnp.dtype | None = None

    def channels(self, side: int) -> int:
        """Channels of the features with this side."""
        return min(self.channel_base // side, self.channel_max)

    @nn.compact
    def __call__(self, x: Array, cond_t: Array, label: Array | None = None) -> Array:
        """Logits of images.

        Args:
          x: [B, H, W, C], not rescaled by the network.
          cond_t: [B, t_dim].
          label: [B] int32 (-1 = no class), [B, label_dim] float, or None (= no class).

        Returns:
          [B] unbounded logits.

        Raises:
          ValueError: the image side is no power of two of at least 8, a shape does not fit, or the
            batch cannot be
            grouped (see minibatch_deviation).
        """
        side = self.img_resolution
        if side < 8 or side & (side - 1):
            raise ValueError(f"img_resolution: {side} given; expected a power of two of at least 8")
        if x.shape[1:] != (side, side, self.img_channels):
            raise ValueError(
                f"x: shape {x.shape} given; expected [B, {side}, {side}, {self.img_channels}]"
            )
        if cond_t.shape != (x.shape[0], self.t_dim):
            raise ValueError(
                f"cond_t: shape {cond_t.shape} given; expected {(x.shape[0], self.t_dim)}"
            )
        cond = cond_t.astype(x.dtype)
        if self.label_dim:
            label = one_hot(label, x.shape[0], self.label_dim).astype(x.dtype)
            cond = jnp.concatenate([label, cond], axis=1)
        cmap = Mapping(self.channels(4), normalised=self.normalised, name="mapping")(cond)
        x = x if self.dtype is None else x.astype(self.dtype)
        while side > 4:
            x = ResidualBlock(
                self.channels(side),
                self.channels(side // 2),
                side == self.img_resolution,
                name=f"b{side}",
            )(x)
            side //= 2
        return Epilogue(self.channels(4), self.mbstd_group, self.mbstd_batch, name="b4")(x, cmap)
