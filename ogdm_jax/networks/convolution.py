"""Convolution and FIR resampling, differentiable to any order and quick on every platform.

On CPU, XLA's own convolution gradients are slow inside a scan or while loop, because the labels
that autodiff leaves in a called computation miss the fast path. `conv2d` therefore writes both
gradients as plain NHWC/HWIO convolutions there. Its rule is closed under differentiation: the
backward rules call the same two functions, so R1 penalties (a gradient of a gradient) stay on the
fast path. GPU and TPU keep autodiff.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ogdm_jax import platforms

Array = jax.Array
Pads = tuple[tuple[int, int], tuple[int, int]]

CPU_RULE = "cpu_rule"


def _plain(
    x: Array, kernel: Array, stride: int, padding: Pads, groups: int = 1, precision=None
) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


def _transposed_pads(kernel_size: Sequence[int], padding: Pads) -> Pads:
    """Padding of the convolution that is the transpose of one with this padding (stride 1)."""
    (ky, kx), ((top, bottom), (left, right)) = kernel_size, padding
    return (ky - 1 - top, ky - 1 - bottom), (kx - 1 - left, kx - 1 - right)


def _turned(kernel: Array) -> Array:
    """The kernel of the transposed convolution: flipped in space, inputs and outputs exchanged."""
    return jnp.swapaxes(kernel[::-1, ::-1], 2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, kernel: Array, padding: Pads) -> Array:
    return _plain(x, kernel, 1, padding)


def _conv_forward(x: Array, kernel: Array, padding: Pads):
    return _plain(x, kernel, 1, padding), (x, kernel)


def _conv_backward(padding: Pads, residuals, dy: Array):
    x, kernel = residuals
    dy = _settled(dy, kernel)
    dx = _conv(dy, _turned(kernel), _transposed_pads(kernel.shape[:2], padding))
    return dx, _kernel_gradient(x, dy, padding)


@jax.custom_vjp
def _settled(x: Array, witness: Array) -> Array:
    """x, written to memory once; its gradient likewise.

    XLA's CPU backend copies chains of cheap operations into every operation that reads them. What
    travels along a network's skip connections is such a chain: every block would add up all earlier
    blocks again (in the gradient all later ones) in each of its operations, some of them with
    strided reads. The branch is decided at run time by a
    number of the witness that is always finite, so no compiler can look through it: a parameter,
    which every device has.
    """
    known = jnp.isfinite(witness[(0,) * witness.ndim])
    return lax.cond(known, lambda x: x, lambda x: jnp.full_like(x, jnp.nan), x)


_settled.defvjp(
    lambda x, witness: (_settled(x, witness), witness),
    lambda witness, dx: (_settled(dx, witness), jnp.zeros_like(witness)),
)


def settled(x: Array, witness: Array) -> Array:
    """x itself; on CPU x and its gradient are computed once, not by every operation that reads them
    (`_settled`).
    """
    return cpu_rule(_settled)(x, witness) if on_cpu() else x


def on_cpu() -> bool:
    """Whether the program now traced is for a CPU, whose compiler needs rules of its own. Never
    asked at import.
    """
    return platforms.current() == "cpu"


def cpu_rule(function: Callable[..., Array]) -> Callable[..., Array]:
    """Names what a CPU-only rule computes, so that a test can look for it in programs of other
    platforms.
    """
    return jax.named_scope(CPU_RULE)(function)


_conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_gradient(x: Array, dy: Array, padding: Pads) -> Array:
    """dL/dkernel as a convolution of x read as [C,H,W,N] with dy read as a kernel [H,W,N,O]."""
    gradient = _plain(jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(dy, (1, 2, 0, 3)), 1, padding)
    return jnp.transpose(gradient, (1, 2, 0, 3))


def _kernel_gradient_forward(x: Array, dy: Array, padding: Pads):
    return _kernel_gradient(x, dy, padding), (x, dy)


def _kernel_gradient_backward(padding: Pads, residuals, g: Array):
    # <g, kernel_gradient(x, dy)> = <dy, conv(x, g)>: both gradients are convolutions with g in the
    # place of the kernel.
    x, dy = residuals
    dx = _conv(dy, _turned(g), _transposed_pads(g.shape[:2], padding))
    return dx, _conv(x, g, padding)


_kernel_gradient.defvjp(_kernel_gradient_forward, _kernel_gradient_backward)


def conv2d(x: Array, kernel: Array, padding: int | Pads | None = None, stride: int = 1) -> Array:
    """Cross-correlation, as every deep-learning "convolution".

    Args:
      x: [B, H, W, I].
      kernel: [kh, kw, I, O], the dtype of x.
      padding: zeros on each side, one int or ((top, bottom), (left, right)); default k // 2 ("same"
        for odd kernels).
      stride: of both axes. A stride above 1 always uses autodiff.

    Returns:
      [B, H', W', O].

    Raises:
      ValueError: where the shapes do not fit.
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"conv2d: x {x.shape} and kernel {kernel.shape}: expected [B, H, W, I] and [kh, kw, I, "
            "O]"
        )
    if padding is None:
        padding = tuple((k // 2, k // 2) for k in kernel.shape[:2])
    elif isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    padding = tuple((int(low), int(high)) for low, high in padding)
    if stride == 1 and on_cpu():
        return cpu_rule(_conv)(x, kernel, padding)
    return _plain(x, kernel, stride, padding)


def depthwise(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Cross-correlation of every channel with a filter of its own, padded to "SAME" (H' = H /
    stride, rounded up).

    Args:
      x: [B, H, W, C].
      kernel: [kh, kw, 1, C], the dtype of x.

    Always in full float32: a distance must not depend on the accelerator. On CPU a sum of shifted
    slices, because XLA's grouped convolution is slow there.

    Raises:
      ValueError: where the shapes do not fit.
    """
    b, *sides, channels = x.shape
    if kernel.ndim != 4 or kernel.shape[2:] != (1, channels):
        raise ValueError(
            f"depthwise: x {x.shape} and kernel {kernel.shape}: expected [B, H, W, C] and [kh, kw, "
            "1, C]"
        )
    pads = tuple(lax.padtype_to_pads(sides, kernel.shape[:2], (stride, stride), "SAME"))
    if not on_cpu():
        return _plain(x, kernel, stride, pads, channels, lax.Precision.HIGHEST)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = (((side - 1) // stride) * stride + 1 for side in sides)

    def shifted(i: int, j: int) -> Array:
        seen = lax.slice(
            x, (0, i, j, 0), (b, i + height, j + width, channels), (1, stride, stride, 1)
        )
        return seen * kernel[i : i + 1, j : j + 1]

    with jax.named_scope(CPU_RULE):
        return functools.reduce(jnp.add, (shifted(i, j) for i, j in np.ndindex(*kernel.shape[:2])))


def fir(
    x: Array, taps: Sequence[float], up: int = 1, down: int = 1, padding: int | tuple[int, int] = 0
) -> Array:
    """Up-sample by zero insertion, pad, filter both axes with the same taps, down-sample
    ("upfirdn").

    y = pad(insert(x)) * taps, a true convolution (taps flipped), of which every `down`-th number is
    kept. `insert` puts up - 1 zeros after every pixel, the last one included. The taps are used as
    given: normalise them, and multiply by `up` to keep the brightness when up-sampling. Sums of
      shifted slices: differentiable to any order in both modes.

    Args:
      x: [B, H, W, C].
      taps: the one-dimensional filter.
      padding: zeros before and after each axis, after insertion; negative crops.

    Returns:
      [B, H', W', C] with H' = floor((H * up + before + after - len(taps)) / down) + 1.
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


def mean_pool(x: Array) -> Array:
    """[B, H, W, C] -> [B, H/2, W/2, C], the mean of each 2x2 square."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def nearest(x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C], each pixel repeated."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(
        b, 2 * h, 2 * w, c
    )


def downsample(x: Array, taps: Sequence[float] = (1, 1)) -> Array:
    """Halves the resolution with the normalised filter `taps` (arXiv 2206.00364's [1,1] or
    [1,3,3,1]); even sizes.
    """
    if tuple(taps) == (1, 1):
        return mean_pool(x)
    values = np.asarray(taps, np.float64)
    return fir(x, values / values.sum(), down=2, padding=(len(values) - 1) // 2)


def upsample(x: Array, taps: Sequence[float] = (1, 1)) -> Array:
    """Doubles the resolution with the normalised filter `taps`: 4 times the transpose of
    `downsample`.
    """
    if tuple(taps) == (1, 1):
        return nearest(x)
    values = np.asarray(taps, np.float64)
    pad = len(values) - 1 - (len(values) - 1) // 2
    return fir(x, 2 * values / values.sum(), up=2, padding=(pad, pad - 1))
