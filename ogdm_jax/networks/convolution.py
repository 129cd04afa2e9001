"""Convolution and FIR resampling of NHWC arrays, differentiable to any order."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from ogdm_jax.networks import cpu
from ogdm_jax.networks.cpu import Pads
from ogdm_jax.typing import Array


def _convolve(x: Array, kernel: Array, pads: Pads, stride: int = 1) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=layout)


def _depthwise(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=lax.Precision.HIGHEST,
    )


_convolve_unit_stride = cpu.choose(_convolve, cpu.convolve)
_depthwise_chosen = cpu.choose(_depthwise, cpu.depthwise)


def conv2d(x: Array, kernel: Array, padding: int | Pads | None = None, stride: int = 1) -> Array:
    """Cross-correlation, as every deep-learning "convolution".

    Args:
      x: [B, H, W, I].
      kernel: [kh, kw, I, O], the dtype of x.
      padding: zeros on each side, one int or ((top, bottom), (left, right)); default k // 2 ("same"
        for odd kernels).
      stride: of both axes.

    Returns:
      [B, H', W', O].

    Raises:
      ValueError: the shapes do not fit.
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"conv2d: x {x.shape} and kernel {kernel.shape}: expected [B, H, W, I] and "
            "[kh, kw, I, O]"
        )
    if padding is None:
        top, left = (k // 2 for k in kernel.shape[:2])
        pads = ((top, top), (left, left))
    elif isinstance(padding, int):
        pads = ((padding, padding), (padding, padding))
    else:
        pads = padding
    if stride == 1:
        return _convolve_unit_stride(x, kernel, pads)
    return _convolve(x, kernel, pads, stride)


def depthwise(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Cross-correlation of every channel with a filter of its own, padded to "SAME".

    Always in full float32: a distance must not depend on the accelerator.

    Args:
      x: [B, H, W, C].
      kernel: [kh, kw, 1, C], the dtype of x.
      stride: of both axes.

    Returns:
      [B, H', W', C] with H' = H / stride, rounded up.

    Raises:
      ValueError: the shapes do not fit.
    """
    if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[-1]):
        raise ValueError(
            f"depthwise: x {x.shape} and kernel {kernel.shape}: expected [B, H, W, C] and "
            "[kh, kw, 1, C]"
        )
    pads = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
    return _depthwise_chosen(x, kernel, stride, tuple(pads))


def fir(
    x: Array, taps: Sequence[float], up: int = 1, down: int = 1, padding: int | tuple[int, int] = 0
) -> Array:
    """Up-samples by zero insertion, pads, filters both axes with the same taps, down-samples.

    y = pad(insert(x)) * taps, a true convolution (taps flipped), of which every `down`-th number is
    kept ("upfirdn"). `insert` puts up - 1 zeros after every pixel, the last one included. The taps
    are not rescaled: to keep the brightness they must sum to `up`. It is a sum of shifted slices,
    differentiable to any order in both modes.

    Args:
      x: [B, H, W, C].
      taps: the one-dimensional filter.
      up: factor of the zero insertion.
      down: every which number is kept.
      padding: zeros before and after each axis, after insertion; a negative number crops.

    Returns:
      [B, H', W', C] with H' = floor((H * up + before + after - len(taps)) / down) + 1.

    Raises:
      ValueError: the padded image is smaller than the filter.
    """
    before, after = (padding, padding) if isinstance(padding, int) else padding
    values = np.asarray(taps, np.float64)[::-1]
    edge = (before, after + up - 1, up - 1)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), edge, edge, (0, 0, 0)))
    for axis in (1, 2):
        size = (x.shape[axis] - len(values)) // down + 1
        if size < 1:
            raise ValueError(
                f"fir: {len(values)} taps do not fit in {x.shape[axis]} padded pixels of axis "
                f"{axis}"
            )
        shifted = (
            lax.slice_in_dim(x, j, j + (size - 1) * down + 1, down, axis)
            * jnp.asarray(tap, x.dtype)
            for j, tap in enumerate(values)
        )
        x = functools.reduce(jnp.add, shifted)
    return x


def downsample(x: Array, taps: Sequence[float] = (1, 1)) -> Array:
    """Halves the even sides of x [B,H,W,C] with the normalised low-pass filter `taps` ([1,1] or
    [1,3,3,1] in 2206.00364).
    """
    if tuple(taps) == (1, 1):
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    values = np.asarray(taps, np.float64)
    return fir(x, values / values.sum(), down=2, padding=(len(values) - 1) // 2)


def upsample(x: Array, taps: Sequence[float] = (1, 1)) -> Array:
    """Doubles the sides of x [B,H,W,C] with the normalised filter `taps`: 4 times the transpose of
    `downsample`.
    """
    if tuple(taps) == (1, 1):
        b, h, w, c = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        return doubled.reshape(b, 2 * h, 2 * w, c)
    values = np.asarray(taps, np.float64)
    pad = len(values) - 1 - (len(values) - 1) // 2
    return fir(x, 2 * values / values.sum(), up=2, padding=(pad, pad - 1))


def _convolve_doubled(x: Array, kernel: Array) -> Array:
    return _convolve(upsample(x), kernel, ((1, 1), (1, 1)))


_convolve_doubled_chosen = cpu.choose(_convolve_doubled, cpu.convolve_doubled)


def conv2d_upsampled(x: Array, kernel: Array, taps: Sequence[float] = (1, 1)) -> Array:
    """conv2d(upsample(x, taps), kernel): x [B,H,W,I], kernel [k,k,I,O] -> [B,2H,2W,O].

    A kernel of one pixel comes before the doubling: the same numbers for a quarter of the work.

    Raises:
      ValueError: the shapes do not fit.
    """
    if tuple(taps) == (1, 1):
        if kernel.shape[:2] == (1, 1):
            return upsample(conv2d(x, kernel))
        if kernel.shape[:3] == (3, 3, x.shape[-1]):
            return _convolve_doubled_chosen(x, kernel)
    return conv2d(upsample(x, taps), kernel)
