"""Aliases and Protocols that the whole package uses.

b h w c name dimensions; images are NHWC float32 in [-1, 1].
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax

Array = jax.Array
PyTree = Any
AxisName = str | tuple[str, ...]  # of mapped axes, as jax.lax takes them
Features = Callable[[Array, Array], Array]  # of a noisy image: (x [b,h,w,c], sigma [b]) -> [b, ...]


class NetworkFn(Protocol):
    """The raw network F: (x [b,h,w,c] already scaled by c_in, c_noise [b], label) -> [b,h,w,c']."""

    def __call__(self, x: Array, c_noise: Array, label: PyTree = None, /) -> Array:
        """F [b,h,w,c']."""
        ...


class Denoise(Protocol):
    """E[x0 | x] for x = x0 + sigma * eps: (x [b,h,w,c], sigma [b] > 0, label) -> x0_hat [b,h,w,c].

    A label is int32 [b] classes (-1: none), float vectors [b,k], any pytree of arrays with a row
    per image, or None. `diffusion.denoiser.Denoiser` is one; a plain function is another.
    """

    def __call__(self, x: Array, sigma: Array, label: PyTree = None, /) -> Array:
        """x0_hat [b,h,w,c]."""
        ...


class LogRatio(Protocol):
    """log p_data(x; sigma) / p_model(x; sigma) in variance-exploding coordinates -> [b]."""

    def __call__(self, x: Array, sigma: Array, label: Array | None = None) -> Array:
        """The log ratio [b]."""
        ...
