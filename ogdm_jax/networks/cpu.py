"""Rules that exist only for XLA's CPU compiler, and the one function that chooses them.

Layers are written as plain mathematics; where the CPU's compiler is slow on it, this file holds a
second way to compute the same numbers. `choose` joins the two, and no file outside knows more. The
platform is that of the program's devices (`platforms.current`), never that of the host.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ogdm_jax import platforms
from ogdm_jax.typing import Array

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


def _transpose(y: Array, kernel: Array, pads: Pads) -> Array:
    """The transpose of `convolve` with this kernel: a convolution with the kernel flipped in space
    and its inputs and outputs exchanged.
    """
    (ky, kx), ((top, bottom), (left, right)) = kernel.shape[:2], pads
    around = ((ky - 1 - top, ky - 1 - bottom), (kx - 1 - left, kx - 1 - right))
    return convolve(y, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), around)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_gradient(x: Array, dy: Array, pads: Pads) -> Array:
    """dL/dkernel: the convolution of x, read as [C,H,W,B], with dy, read as a kernel [H,W,B,O]."""
    gradient = _plain(jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(dy, (1, 2, 0, 3)), pads)
    return jnp.transpose(gradient, (1, 2, 0, 3))


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
