"""Layers of the score networks (2206.00364, appendix F; 2105.05233), NHWC.

Parameters are float32 and are cast to the compute type where they are used; statistics, embeddings
and attention weights are float32 (float64 for float64 inputs) whatever the compute type.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ogdm_jax import randomness
from ogdm_jax.networks.convolution import (
    conv2d,
    downsample,
    fir,
    mean_pool,
    nearest,
    settled,
    upsample,
)
from ogdm_jax.typing import Array

__all__ = [
    "Conv",
    "Dense",
    "FourierEmbedding",
    "GroupNorm",
    "Initializer",
    "attention",
    "conv2d",
    "downsample",
    "dropout",
    "fir",
    "mean_pool",
    "nearest",
    "one_hot",
    "positional_embedding",
    "scaled_init",
    "settle",
    "upsample",
]

Initializer = Callable[..., Array]


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The type statistics are computed in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def scaled_init(mode: str, scale: float = 1.0) -> Initializer:
    """EDM's initialisers by name, times scale: xavier_uniform, xavier_normal, kaiming_uniform,
    kaiming_normal.

    Variance 2 / (fan_in + fan_out) for xavier, 1 / fan_in for kaiming; a uniform law has bound
    sqrt(3 variance). The fans are those of a kernel [..., in, out], or given as `fans` (a bias
    shares those of its kernel).
    """
    scheme, law = mode.split("_")
    if scheme not in ("xavier", "kaiming") or law not in ("uniform", "normal"):
        raise ValueError(
            f"mode: {mode!r} given; expected xavier or kaiming, then _uniform or _normal"
        )

    def init(
        key: Array, shape: Sequence[int], dtype=jnp.float32, fans: tuple[int, int] | None = None
    ) -> Array:
        field = math.prod(shape[:-2])
        fan_in, fan_out = fans or (field * shape[-2], field * shape[-1])
        variance = 2 / (fan_in + fan_out) if scheme == "xavier" else 1 / fan_in
        if scale == 0:
            return jnp.zeros(shape, dtype)
        if law == "normal":
            return scale * math.sqrt(variance) * jax.random.normal(key, shape, dtype)
        bound = scale * math.sqrt(3 * variance)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """Fully connected layer, kernel [in, out]: x [..., in] -> [..., features]."""

    features: int
    kernel_init: Initializer
    bias_init: Initializer | None = None  # None: zeros
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fans = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, fans)
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        return y + _bias(self, fans, y.ndim).astype(self.dtype) if self.use_bias else y


class Conv(nn.Module):
    """k x k convolution with zero padding k // 2, after resampling by 2 where up or down is set.

    The kernel is [k, k, in, out]; kernel=0 only resamples. fused (with down): kernel first,
    low-pass and every second pixel after it, then the bias, as in NCSN++'s residual input. stride=2
    is OpenAI's learned halving. A 1x1 kernel is
    a convolution as well: on a CPU the gradient of the equivalent matrix product is slow.
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
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        fused = self.fused and self.down
        if self.up:
            x = upsample(x, self.taps)
        if self.down and not fused:
            x = downsample(x, self.taps)
        if not self.kernel:
            return x
        area, inputs = self.kernel**2, x.shape[-1]
        kernel = self.param(
            "kernel", self.kernel_init, (self.kernel, self.kernel, inputs, self.features)
        )
        margin = (len(self.taps) - 1) // 2 if fused else 0
        x = conv2d(x, kernel.astype(self.dtype), self.kernel // 2 + margin, self.stride)
        if fused:
            taps = np.asarray(self.taps, np.float64)
            x = fir(x, taps / taps.sum(), down=2)
        return x + _bias(self, (inputs * area, self.features * area), x.ndim).astype(self.dtype)


def _bias(module: Dense | Conv, fans: tuple[int, int], ndim: int) -> Array:
    init = module.bias_init
    make = nn.initializers.zeros if init is None else functools.partial(init, fans=fans)
    bias = module.param("bias", make, (module.features,))
    return bias.reshape((1,) * (ndim - 1) + (module.features,))


class GroupNorm(nn.Module):
    """Group normalisation of x [B,H,W,C] with biased variance.

    groups: 0 = EDM's rule min(32, C // 4); OpenAI's networks always use 32. The gradient is the
    closed form (`_normalise_backward`): on CPU a tenth of a train step faster than autodiff's, on
    TPU half of its memory.
    """

    eps: float
    groups: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        groups = self.groups or max(1, min(32, channels // 4))
        if channels % groups:
            raise ValueError(
                f"GroupNorm: {channels} channels given; expected a multiple of the {groups} groups"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return _closed_form(
            x, scale[None, None, None, :], bias[None, None, None, :], groups, self.eps
        )


def _normalise(x: Array, scale: Array, bias: Array, groups: int, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias of each group, in at least float32; x
    [B,H,W,C], scale, bias [1,1,1,C]."""
    return _normalise_forward(x, scale, bias, groups, eps)[0]


def _statistics(x: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """(mean, 1 / sqrt(variance + eps)) of every channel's group, [B,1,1,C].

    Sums per channel in one pass over x, then combined per group. The channel's centre pixel is
    subtracted before
    squaring: it cancels in the result, and unlike E[x^2] - E[x]^2 nothing is lost where a channel's
    mean is large against its spread.
    """
    h, w = x.shape[1:3]
    x = x.astype(wide(x.dtype))
    anchor = lax.stop_gradient(x[:, h // 2 : h // 2 + 1, w // 2 : w // 2 + 1])
    centred = x - anchor
    first = jnp.mean(centred, axis=(1, 2), keepdims=True)
    spread = jnp.mean(jnp.square(centred), axis=(1, 2), keepdims=True) - jnp.square(first)
    mean_c = first + anchor
    mean = _group_mean(mean_c, groups)
    variance = _group_mean(spread + jnp.square(mean_c - mean), groups)
    return mean, lax.rsqrt(jnp.maximum(variance, 0.0) + eps)


def _group_mean(v: Array, groups: int) -> Array:
    """The mean over a group's channels, at each of them: [B,1,1,C] -> [B,1,1,C].

    A product with a constant matrix: cutting channels into groups by a reshape costs a TPU, where
    channels lie along the lanes of its registers, three copies for every mean.
    """
    size = v.shape[-1] // groups
    within = np.kron(np.eye(groups), np.full((size, size), 1 / size))
    return jnp.einsum(
        "bhwc,cd->bhwd", v, jnp.asarray(within, v.dtype), precision=lax.Precision.HIGHEST
    )


_closed_form = jax.custom_vjp(_normalise, nondiff_argnums=(3, 4))


def _normalise_forward(x: Array, scale: Array, bias: Array, groups: int, eps: float):
    mean, inverse = _statistics(x, groups, eps)
    y = ((x.astype(mean.dtype) - mean) * (inverse * scale) + bias).astype(x.dtype)
    return y, (x, scale, mean, inverse)


def _normalise_backward(groups: int, eps: float, residuals, dy: Array):
    """With z = (x - mean) inverse, g = dy scale and means <.> over a group: dx = inverse (g - <g> -
    z <g z>).

    Two passes over x and dy, one for the sums and one for dx; differentiable again like any other
    function.
    """
    x, scale, mean, inverse = residuals
    pixels = x.shape[1] * x.shape[2]
    centred, dy = x.astype(mean.dtype) - mean, dy.astype(mean.dtype)
    sum_dy = jnp.sum(dy, axis=(1, 2), keepdims=True)
    sum_dyz = jnp.sum(dy * centred, axis=(1, 2), keepdims=True) * inverse
    along = inverse * _group_mean(sum_dyz * scale / pixels, groups)
    dx = inverse * (dy * scale - _group_mean(sum_dy * scale / pixels, groups) - centred * along)
    parameters = (jnp.sum(v, axis=0, keepdims=True).astype(scale.dtype) for v in (sum_dyz, sum_dy))
    return dx.astype(x.dtype), *parameters


_closed_form.defvjp(_normalise_forward, _normalise_backward)


def settle(module: nn.Module, x: Array, norm: str) -> Array:
    """x before the module's norm of this name and whatever else reads it: see
    `convolution.settled`.
    """
    if module.is_initializing():
        return x
    return settled(x, module.variables["params"][norm]["scale"])


def positional_embedding(c_noise: Array, channels: int, endpoint: bool = False) -> Array:
    """[cos | sin] of c_noise * f_j, f_j = 10000^(-j / (n/2 - endpoint)), j < n/2; c_noise [B] ->
    [B, channels].

    endpoint=False is OpenAI's timestep embedding. Frequencies are float64 numbers rounded once.
    """
    half = channels // 2
    c_noise = c_noise.astype(wide(c_noise.dtype))
    frequencies = 10000.0 ** (-np.arange(half) / (half - (1 if endpoint else 0)))
    angles = c_noise[:, None] * jnp.asarray(frequencies, c_noise.dtype)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


class FourierEmbedding(nn.Module):
    """[cos | sin] of 2 pi f c_noise with frozen f ~ scale N(0, 1) in collection "buffers"; [B] ->
    [B, channels].
    """

    channels: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, c_noise: Array) -> Array:
        make = lambda: (
            self.scale * jax.random.normal(self.make_rng("params"), (self.channels // 2,))
        )
        freqs = self.variable("buffers", "freqs", make).value
        c_noise = c_noise.astype(wide(c_noise.dtype))
        angles = c_noise[:, None] * (2 * np.pi * freqs)[None, :]
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def dropout(x: Array, rate: float, keys: Array | None, site: str) -> Array:
    """Inverted dropout, one mask per example from its own key and the site's name; the identity
    where keys is None.

    The masks come from `randomness.quick` keys: of the network's own size and dozens a step, they
    would be a third of all element-wise work with threefry.
    """
    if keys is None or rate == 0:
        return x
    own = randomness.fold_in_each(randomness.quick(keys), site)
    masks = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, x.shape[1:]))(own)
    return jnp.where(masks, x / (1 - rate), jnp.zeros((), x.dtype))


def one_hot(label: Array | None, batch: int, classes: int) -> Array:
    """Classes as [B, classes] numbers: int labels [B] (-1: no class) or None (no class) -> 0 and 1;
    floats unchanged.

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
    """softmax(q k^T / sqrt(c)) v of each head over the pixels, the weights in float32.

    Args:
      qkv: [B,H,W,3C], channels ordered ({q, k, v}, head, c). The published checkpoints order them
        otherwise; interop permutes the kernel once, so that here q, k and v are contiguous.

    Returns:
      [B,H,W,C], channels ordered (head, c).
    """
    b, h, w, width = qkv.shape
    c = width // 3 // heads
    q, k, v = (part.reshape(b, h * w, heads, c) for part in jnp.split(qkv, 3, axis=-1))
    logits = jnp.einsum("bqhc,bkhc->bhqk", q, k * np.asarray(1 / math.sqrt(c), k.dtype))
    weights = jax.nn.softmax(logits.astype(wide(logits.dtype)), axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(b, h, w, heads * c)
