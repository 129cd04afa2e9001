"""Layers of the score networks (2206.00364, appendix F; 2105.05233), NHWC.

Parameters are float32 and are cast to the compute type where they are used; statistics, embeddings
and attention weights are float32 (float64 for float64 inputs) whatever the compute type.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ogdm_jax import randomness
from ogdm_jax.networks import cpu
from ogdm_jax.networks.attention import attend
from ogdm_jax.networks.convolution import (
    Pads,
    conv2d,
    conv2d_upsampled,
    downsample,
    fir,
    upsample,
)
from ogdm_jax.networks.groupnorm import group_norm, wide
from ogdm_jax.typing import Array

Initializer = Callable[..., Array]


def scaled_init(mode: str, scale: float = 1.0) -> Initializer:
    """EDM's initialisers by name, times scale.

    The variance is 2 / (fan_in + fan_out) for xavier and 1 / fan_in for kaiming; a uniform
    distribution has the bound sqrt(3 variance). The fans are those of a kernel [..., in, out], or
    `fans` where the initialiser is called with them (a bias has the fans of its kernel).

    Args:
      mode: xavier_uniform, xavier_normal, kaiming_uniform or kaiming_normal.
      scale: factor of the numbers; 0 gives zeros.

    Raises:
      ValueError: another mode.
    """
    scheme, _, distribution = mode.partition("_")
    if scheme not in ("xavier", "kaiming") or distribution not in ("uniform", "normal"):
        raise ValueError(
            f"mode: {mode!r} given; expected xavier or kaiming, then _uniform or _normal"
        )

    def init(
        key: Array,
        shape: Sequence[int],
        dtype: DTypeLike = jnp.float32,
        fans: tuple[int, int] | None = None,
    ) -> Array:
        field = math.prod(shape[:-2])
        fan_in, fan_out = fans or (field * shape[-2], field * shape[-1])
        variance = 2 / (fan_in + fan_out) if scheme == "xavier" else 1 / fan_in
        if scale == 0:
            return jnp.zeros(shape, dtype)
        if distribution == "normal":
            return scale * math.sqrt(variance) * jax.random.normal(key, shape, dtype)
        bound = scale * math.sqrt(3 * variance)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """Fully connected layer with a kernel [in, features].

    Attributes:
      features: width of the output.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias; None = zeros.
      use_bias: whether there is a bias.
      dtype: compute type.
    """

    features: int
    kernel_init: Initializer
    bias_init: Initializer | None = None
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [..., in] to [..., features]."""
        fans = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, fans)
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        return y + _bias(self, fans, y.ndim).astype(self.dtype) if self.use_bias else y


class Conv(nn.Module):
    """Resampling by 2 where up or down is set, then a k x k convolution, zero padding k // 2.

    A 1x1 kernel is a convolution as well: the gradient that autodiff makes of the equivalent matrix
    product is slow on a CPU.

    Attributes:
      features: channels of the output.
      kernel: side k of the kernel [k, k, in, features]; 0 only resamples.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias; None = zeros.
      up: double the resolution; not with pads or a stride.
      down: halve the resolution.
      taps: low-pass filter of the resampling.
      fused: with down, as in NCSN++'s residual input: the kernel comes first, then the low-pass and
        every second pixel of it, then the bias.
      stride: 2 is OpenAI's learned halving.
      pads: zeros ((top, bottom), (left, right)) in place of kernel // 2 on each side.
      dtype: compute type.
    """

    features: int
    kernel: int
    kernel_init: Initializer
    bias_init: Initializer | None = None
    up: bool = False
    down: bool = False
    taps: Sequence[float] = (1, 1)
    fused: bool = False
    stride: int = 1
    pads: Pads | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x [B,H,W,C] to [B,H',W',features]."""
        if self.up and (self.pads is not None or self.stride != 1):
            raise ValueError(
                f"Conv: up with pads={self.pads} and stride={self.stride}; expected neither with it"
            )
        x = x.astype(self.dtype)
        fused = self.fused and self.down
        if self.up and not self.kernel:
            x = upsample(x, self.taps)
        if self.down and not fused:
            x = downsample(x, self.taps)
        if not self.kernel:
            return x
        area, inputs = self.kernel**2, x.shape[-1]
        kernel = self.param(
            "kernel", self.kernel_init, (self.kernel, self.kernel, inputs, self.features)
        )
        kernel = kernel.astype(self.dtype)
        margin = (len(self.taps) - 1) // 2 if fused else 0
        if self.up:
            x = conv2d_upsampled(x, kernel, self.taps)
        else:
            x = conv2d(x, kernel, self.pads or self.kernel // 2 + margin, self.stride)
        if fused:
            taps = np.asarray(self.taps, np.float64)
            x = fir(x, taps / taps.sum(), down=2)
        return x + _bias(self, (inputs * area, self.features * area), x.ndim).astype(self.dtype)


def _bias(module: Dense | Conv, fans: tuple[int, int], ndim: int) -> Array:
    init = module.bias_init
    make = nn.initializers.zeros if init is None else functools.partial(init, fans=fans)
    bias = module.param("bias", make, (module.features,))
    return bias.reshape((1,) * (ndim - 1) + (module.features,))


def norm_groups(channels: int, groups: int = 0) -> int:
    """Groups of a norm: as many as are given, else of at least 4 channels, at most 32."""
    return groups or max(1, min(32, channels // 4))


class GroupNorm(nn.Module):
    """Group normalisation (`group_norm`) with a scale and a bias for each channel.

    Attributes:
      eps: added to the variance.
      groups: 0 = EDM's rule min(32, C // 4); OpenAI's networks always have 32.
    """

    eps: float
    groups: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Of x [B,H,W,C], the same shape. Raises ValueError where the groups do not divide C."""
        channels = x.shape[-1]
        groups = norm_groups(channels, self.groups)
        if channels % groups:
            raise ValueError(
                f"GroupNorm: {channels} channels given; expected a multiple of the {groups} groups"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))[None, None, None, :]
        bias = self.param("bias", nn.initializers.zeros, (channels,))[None, None, None, :]
        return group_norm(x, scale, bias, groups, self.eps)


_stored = cpu.choose(lambda x, parameter: x, cpu.compute_once)


def input_computed_once(method: Callable[..., Array]) -> Callable[..., Array]:
    """Decorator of a module's method whose first argument x is read by several operations.

    x is computed before the method starts instead of by each operation that reads it. Values and
    gradients stay as they are.
    """

    @functools.wraps(method)
    def wrapped(module: nn.Module, x: Array, *args: Any, **kwargs: Any) -> Array:
        if not module.is_initializing():
            x = _stored(x, jax.tree.leaves(module.variables["params"])[0])
        return method(module, x, *args, **kwargs)

    return wrapped


def positional_embedding(c_noise: Array, channels: int, endpoint: bool = False) -> Array:
    """[cos | sin] of c_noise * f_j, f_j = 10000^(-j / (n/2 - endpoint)), j < n/2 for n channels.

    endpoint=False is OpenAI's timestep embedding. Frequencies are float64 numbers rounded once.

    Args:
      c_noise: [B].
      channels: n, even.
      endpoint: whether the last frequency is exactly 1 / 10000.

    Returns:
      [B, channels], at least float32.
    """
    half = channels // 2
    c_noise = c_noise.astype(wide(c_noise.dtype))
    frequencies = 10000.0 ** (-np.arange(half) / (half - (1 if endpoint else 0)))
    angles = c_noise[:, None] * jnp.asarray(frequencies, c_noise.dtype)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class FourierEmbedding(nn.Module):
    """[cos | sin] of 2 pi f c_noise with constant frequencies f ~ scale N(0, 1).

    The frequencies are drawn once and live in the collection "buffers".

    Attributes:
      channels: of the result, even.
      scale: standard deviation of the frequencies.
    """

    channels: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, c_noise: Array) -> Array:
        """c_noise [B] -> [B, channels]."""
        shape = (self.channels // 2,)
        draw = lambda: self.scale * jax.random.normal(self.make_rng("params"), shape)
        freqs = self.variable("buffers", "freqs", draw).value
        c_noise = c_noise.astype(wide(c_noise.dtype))
        angles = c_noise[:, None] * (2 * np.pi * freqs)[None, :]
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def dropout(x: Array, rate: float, keys: Array | None, site: str) -> Array:
    """Inverted dropout: each example's mask comes from its own key and the site's name.

    The masks come from `randomness.quick` keys: with threefry, dozens of masks as large as the
    activations would be a third of a step's element-wise work.

    Args:
      x: [B,...].
      rate: probability that a number becomes 0.
      keys: [B] typed keys; None switches dropout off.
      site: name of the layer, so that no two layers share a mask.
    """
    if keys is None or rate == 0:
        return x
    own = randomness.fold_in_each(randomness.quick(keys), site)
    masks = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, x.shape[1:]))(own)
    return jnp.where(masks, x / (1 - rate), jnp.zeros((), x.dtype))


def one_hot(label: Array | None, batch: int, classes: int) -> Array:
    """Classes as numbers [B, classes].

    Integer labels [B] become rows of zeros with a 1 at the class; -1 and None (no class) become
    zeros; float labels [B, classes] stay as they are.

    Raises:
      ValueError: float labels of another width, or integers of another shape.
    """
    if label is None:
        return jnp.zeros((batch, classes))
    if jnp.issubdtype(label.dtype, jnp.integer):
        if label.shape != (batch,):
            raise ValueError(f"label: shape {label.shape} given; expected integers [{batch}]")
        return jax.nn.one_hot(label, classes)
    if label.shape != (batch, classes):
        raise ValueError(f"label: shape {label.shape} given; expected numbers [{batch}, {classes}]")
    return label


def attention(qkv: Array, heads: int) -> Array:
    """softmax(q k^T / sqrt(c)) v of each head over the pixels, logits and weights in float32.

    Args:
      qkv: [B,H,W,3C], channels ordered ({q, k, v}, head, c). The published checkpoints order them
        otherwise; interop permutes the kernel once, so that here q, k and v are contiguous.
      heads: number of heads, a divisor of C.

    Returns:
      [B,H,W,C], channels ordered (head, c).
    """
    b, h, w, width = qkv.shape
    c = width // 3 // heads
    q, k, v = (part.reshape(b, h * w, heads, c) for part in jnp.split(qkv, 3, axis=-1))
    return attend(q, k, v).reshape(b, h, w, heads * c)
