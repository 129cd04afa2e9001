"""Rules that exist only for XLA's CPU compiler, and the one function that chooses them.

Layers are written as plain mathematics; where the CPU's compiler is slow on it, this file holds a
second way to compute the same numbers. `choose` joins the two, and no file outside knows more. The
platform is that of the program's devices (`platforms.current`), never that of the host.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax import lax

from ogdm_jax import platforms
from ogdm_jax.typing import Array, PyTree

CPU_RULE = "cpu_rule"  # the scope of every operation made here: tests look for it in programs
Pads = tuple[tuple[int, int], tuple[int, int]]


def choose(general: Callable[..., Array], rule: Callable[..., Any]) -> Callable[..., Array]:
    """A function that computes `rule` in programs for a CPU and `general` in all others.

    Both take the same positional arguments and give the same numbers to rounding. The choice is
    made whenever the function is traced.
    """
    named = jax.named_scope(CPU_RULE)(rule)

    @functools.wraps(general)
    def chosen(*args: Any) -> Array:
        return (named if platforms.current() == "cpu" else general)(*args)

    return chosen


# Reading what is computed once


@jax.custom_vjp
def compute_once(x: Array, parameter: Array) -> Array:
    """Returns x. x is computed once and stored, and so is its gradient.

    XLA's CPU backend repeats a chain of cheap operations inside every operation that reads its
    result. The sum that runs through a network's residual blocks is such a chain: without this rule
    each operation of a block adds up the outputs of all earlier blocks again, and in the gradient
    those of all later ones.

    x passes through a branch whose condition is known only when the program runs, so the compiler
    cannot merge what lies before with what lies behind. The condition is that a number of the
    network's parameters is finite, which is always true; parameters are on every device, so asking
    needs no communication. Were it false, the result would be NaN.
    """
    always = jnp.isfinite(parameter[(0,) * parameter.ndim])
    return lax.cond(always, lambda x: x, lambda x: jnp.full_like(x, jnp.nan), x)


compute_once.defvjp(
    lambda x, parameter: (compute_once(x, parameter), parameter),
    lambda parameter, dx: (compute_once(dx, parameter), jnp.zeros_like(parameter)),
)


# Convolution


def _plain(x: Array, kernel: Array, pads: Pads) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Array, kernel: Array, pads: Pads) -> Array:
    """Cross-correlation with stride 1, x [B,H,W,I] and kernel [kh,kw,I,O] -> [B,H',W',O].

    XLA's own gradients of it are slow on a CPU inside a scan or while loop, because the labels that
    autodiff leaves in a called computation miss the fast path. Here both gradients are written as
    plain convolutions. Their gradients are again `convolve` and `_kernel_gradient`, so that a
    gradient of a gradient (an R1 penalty) stays on the fast path.
    """
    return _plain(x, kernel, pads)


def _around(kernel_sides: Sequence[int], pads: Pads) -> Pads:
    """The zeros around the result of a convolution with these pads when its kernel, flipped, runs
    over it and shall reach every pixel of the input.
    """
    (ky, kx), ((top, bottom), (left, right)) = kernel_sides, pads
    return ((ky - 1 - top, ky - 1 - bottom), (kx - 1 - left, kx - 1 - right))


def _transpose(y: Array, kernel: Array, pads: Pads) -> Array:
    """The transpose of `convolve` with this kernel: a convolution with the kernel flipped in space
    and its inputs and outputs exchanged.
    """
    around = _around(kernel.shape[:2], pads)
    return convolve(y, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), around)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_gradient(x: Array, dy: Array, pads: Pads) -> Array:
    """dL/dkernel: the convolution of x, read as [C,H,W,B], with dy, read as a kernel [H,W,B,O].

    Of x and dy the one with fewer channels is the input, whose patches are copied and whose
    channels come to the front: that takes up to two fifths off the time. The gradient of a kernel
    of one pixel is a product of two matrices, in a third of the time.
    """
    sides = [
        size + sum(pad) - moves + 1
        for size, pad, moves in zip(x.shape[1:3], pads, dy.shape[1:3], strict=True)
    ]
    if sides == [1, 1] and not np.any(pads):
        x_rows, dy_rows = (v.reshape(-1, v.shape[-1]) for v in (x, dy))
        return lax.dot_general(x_rows, dy_rows, (((0,), (0,)), ((), ())))[None, None]
    if x.shape[-1] > dy.shape[-1]:
        flipped = _correlate(dy, x, _around(sides, pads))
        return jnp.transpose(flipped, (1, 2, 3, 0))[::-1, ::-1]
    return jnp.transpose(_correlate(x, dy, pads), (1, 2, 0, 3))


def _correlate(x: Array, y: Array, pads: Pads) -> Array:
    """The sums over images and pixels of x [B,H,W,C] times y [B,H',W',O] at every shift of y that
    fits into x with its pads: [C,shifts,shifts,O].
    """
    return _plain(jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(y, (1, 2, 0, 3)), pads)


def _convolve_backward(pads: Pads, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    dy = compute_once(dy, kernel)
    return _transpose(dy, kernel, pads), _kernel_gradient(x, dy, pads)


def _kernel_gradient_backward(
    pads: Pads, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    # <g, kernel_gradient(x, dy)> = <dy, convolve(x, g)>: g takes the place of the kernel.
    x, dy = saved
    return _transpose(dy, g, pads), convolve(x, g, pads)


convolve.defvjp(lambda x, kernel, pads: (_plain(x, kernel, pads), (x, kernel)), _convolve_backward)
_kernel_gradient.defvjp(
    lambda x, dy, pads: (_kernel_gradient(x, dy, pads), (x, dy)), _kernel_gradient_backward
)


def convolve_doubled(x: Array, kernel: Array) -> Array:
    """`convolve` of x with every pixel repeated to a square of two, by a 3x3 kernel and a zero
    around: [B,H,W,I] -> [B,2H,2W,O].

    Of the three rows under the kernel two are the same row of x, so the sum of their weights is
    enough: four kernels of 2x2 on x give the four pixels of each square for 4/9 of the products.
    """

    def merged(kernel: Array, parity: int, axis: int) -> Array:
        first, second, third = jnp.split(kernel, 3, axis)
        pair = (first + second, third) if parity else (first, second + third)
        return jnp.concatenate(pair, axis)

    def pixels(i: int, j: int) -> Array:
        return convolve(x, merged(merged(kernel, i, 0), j, 1), ((1 - i, i), (1 - j, j)))

    b, h, w, _ = x.shape
    rows = [jnp.stack([pixels(i, 0), pixels(i, 1)], axis=3) for i in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)


# Filters of one channel


def depthwise(x: Array, kernel: Array, stride: int, pads: Sequence[tuple[int, int]]) -> Array:
    """Cross-correlation of every channel with its own filter, as a sum of shifted slices: XLA's
    grouped convolution is slow on a CPU. x [B,H,W,C], kernel [kh,kw,1,C].
    """
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    b, *sides, channels = x.shape
    kernel_sides = kernel.shape[:2]
    height, width = (
        (side - size) // stride * stride + 1 for side, size in zip(sides, kernel_sides, strict=True)
    )

    def shifted(i: int, j: int) -> Array:
        end = (b, i + height, j + width, channels)
        return (
            lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1)) * kernel[i : i + 1, j : j + 1]
        )

    return functools.reduce(jnp.add, (shifted(i, j) for i, j in np.ndindex(*kernel_sides)))


# Sums over all tensors of a network


def total(number: Callable[[Array], Array], tree: PyTree) -> Array:
    """Sum of `number` over all numbers of all tensors, laid out as one vector: one loop to compile
    in place of one for each tensor, which are a seventh of the loops of a small network's step.
    """
    return jnp.sum(number(jax.flatten_util.ravel_pytree(tree)[0]))
