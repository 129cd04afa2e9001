"""Measurement operators y = A(x0) + noise, images [B,H,W,C] in [-1, 1], and the losses made of
them.

Linear operators have an adjoint; those whose singular values are known (`spectrum`) also serve the
methods that need a pseudo-inverse or a proximal step. Operators are pure functions and may be built
inside a compiled function, so that masks can differ from image to image. Settings follow DPS and
DSG (arXiv 2209.14687, 2402.03201).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ogdm_jax.brief import brief
from ogdm_jax.inverse import degradations
from ogdm_jax.pixels import check_floats
from ogdm_jax.typing import Array

Function = Callable[[Array], Array]
Loss = Callable[[Array], Array]
HIGHEST = jax.lax.Precision.HIGHEST


class Spectrum(NamedTuple):
    """A = U S V^T by its parts, for images of one shape; coordinates have the shape of the image.

    Attributes:
      to: x -> V^T x.
      back: V^T x -> x.
      measured: y -> U^T y, zero where S is.
      values: S >= 0, broadcastable.
    """

    to: Function
    back: Function
    measured: Function
    values: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Operator:
    """What a measurement does to clean images.

    Attributes:
      name: for messages.
      forward: x0 [B,H,W,C] -> y [B,...].
      transpose: y -> A^T y of a linear operator, else None.
      spectrum: (h, w, c) -> Spectrum where it is known, else None.
      hide: y -> y, clears the numbers that carry none (hidden pixels); None: there are none.
    """

    name: str
    forward: Function
    transpose: Function | None = None
    spectrum: Callable[[tuple[int, int, int]], Spectrum] | None = None
    hide: Function | None = None
    __repr__ = brief

    def __post_init__(self) -> None:
        """Puts the check of the numbers' type before `forward`: integers would be cut off."""
        forward = self.forward

        def checked(x: Array) -> Array:
            x = jnp.asarray(x)
            check_floats(x.dtype, f"images of operator {self.name!r}")
            return forward(x)

        object.__setattr__(self, "forward", checked)

    def after(self, function: Function) -> "Operator":
        """The operator of function(z), such as of decoded latents: no adjoint, no spectrum."""
        forward = lambda z: self.forward(function(z))
        return Operator(self.name, forward, hide=self.hide)

    @property
    def linear(self) -> bool:
        """Whether there is an adjoint."""
        return self.transpose is not None

    def adjoint(self, y: Array) -> Array:
        """A^T y.

        Raises:
          ValueError: the operator is not linear.
        """
        if self.transpose is None:
            raise ValueError(f"operator {self.name!r} has no adjoint; expected a linear operator")
        return self.transpose(y)

    def need_spectrum(self, method: str) -> Callable[[tuple[int, int, int]], Spectrum]:
        """The singular values, for a method that needs them.

        Raises:
          ValueError: they are not known.
        """
        if self.spectrum is None:
            raise ValueError(
                f"{method} with operator {self.name!r}: its singular values are not known; "
                "expected inpaint, super_resolution, gaussian_blur or identity, or another method "
                "such as dsg or dps"
            )
        return self.spectrum

    def measured(self, y: Array, x: Array) -> Array:
        """Measurements y, of each image or one of all, in the type of images x.

        Raises:
          ValueError: measurements of no images like x.
        """
        shape = jax.eval_shape(self.forward, x).shape
        if np.shape(y) not in (shape, (1, *shape[1:])):
            raise ValueError(f"y: shape {np.shape(y)}; expected {shape}, what {self.name} gives")
        check_floats(y.dtype, "y")
        return jnp.asarray(y).astype(x.dtype)

    def count(self, y: Array) -> Array:
        """[B] how many numbers of y are measured (m of the residual ratio)."""
        ones = jnp.ones_like(y)
        seen = ones if self.hide is None else self.hide(ones)
        return jnp.sum(seen.reshape(len(y), -1), axis=1)


def image_shape(x: Array) -> tuple[int, int, int]:
    """(h, w, c) of images [B,H,W,C], for `Operator.spectrum`."""
    _, h, w, c = x.shape
    return h, w, c


def inpaint(mask: Array | np.ndarray) -> Operator:
    """Hidden pixels: y = mask * x0. Singular values are the mask.

    Args:
      mask: 1 where a pixel is seen, 0 where it is hidden, between them where it is seen darkened:
        [H,W], [H,W,1], or one per image [B,H,W,1]; with C in place of the last 1, one per channel.

    Raises:
      ValueError: another rank, or numbers outside [0, 1]; images that it does not fit.
    """
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    values = np.zeros(()) if isinstance(mask, Tracer) else np.asarray(mask)
    if np.any(values < 0) or np.any(values > 1):
        raise ValueError(
            f"mask: numbers from {values.min()} to {values.max()}; expected 1 where a pixel is "
            "seen and 0 where it is hidden"
        )
    if np.ndim(mask) not in (2, 3, 4):
        raise ValueError(f"mask: shape {np.shape(mask)}; expected [H,W], [H,W,1] or [B,H,W,1]")
    if np.ndim(mask) == 2:
        mask = mask[..., None]
    if np.ndim(mask) == 3:
        mask = mask[None]

    def times(factor: Array | np.ndarray, x: Array) -> Array:
        if mask.shape[1:3] != x.shape[1:3]:
            raise ValueError(
                f"mask: {mask.shape[1:3]} pixels; expected those of the images, {x.shape[1:3]}"
            )
        if mask.shape[0] not in (1, x.shape[0]) or mask.shape[3] not in (1, x.shape[3]):
            raise ValueError(f"mask: shape {mask.shape}; expected one that fits {x.shape}")
        return jnp.asarray(factor, x.dtype) * x

    cover, hide = functools.partial(times, mask), functools.partial(times, mask > 0)

    def spectrum(shape: tuple[int, int, int]) -> Spectrum:
        return Spectrum(lambda x: x, lambda x: x, hide, 1.0 * mask)

    return Operator("inpaint", cover, cover, spectrum, hide)


def _both_axes(rows: np.ndarray, columns: np.ndarray, x: Array) -> Array:
    """Both matrices applied: rows [o,h], x [B,h,w,c], columns [p,w] -> [B,o,p,c]."""
    y = jnp.einsum("oh,bhwc->bowc", jnp.asarray(rows, x.dtype), x, precision=HIGHEST)
    return jnp.einsum("pw,bowc->bopc", jnp.asarray(columns, x.dtype), y, precision=HIGHEST)


@functools.cache
def _decompose(
    matrix_of: Callable[[int], np.ndarray], side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(matrix_of(side))
    return u, s, vt


def separable(name: str, matrix_of: Callable[[int], np.ndarray], factor: int = 1) -> Operator:
    """Both axes by a matrix: y = W_h x W_w^T per channel, W_side = matrix_of(side)
    [side / factor, side] float64; its SVD comes with it.
    """

    def forward(x: Array) -> Array:
        return _both_axes(matrix_of(x.shape[1]), matrix_of(x.shape[2]), x)

    def transpose(y: Array) -> Array:
        return _both_axes(matrix_of(y.shape[1] * factor).T, matrix_of(y.shape[2] * factor).T, y)

    def spectrum(shape: tuple[int, int, int]) -> Spectrum:
        (uh, sh, vh), (uw, sw, vw) = (_decompose(matrix_of, side) for side in shape[:2])
        pad = [(0, shape[0] - len(sh)), (0, shape[1] - len(sw))]

        def measured(y: Array) -> Array:
            return jnp.pad(_both_axes(uh.T, uw.T, y), [(0, 0), *pad, (0, 0)])

        values = np.pad(np.outer(sh, sw), pad)
        return Spectrum(
            lambda x: _both_axes(vh, vw, x),
            lambda x: _both_axes(vh.T, vw.T, x),
            measured,
            values[None, ..., None],
        )

    return Operator(name, forward, transpose, spectrum)


def super_resolution(factor: int, size: int) -> Operator:
    """Cubic reduction by `factor` of images of `size` pixels a side: [B,H,W,C] ->
    [B,H/factor,W/factor,C].

    Exact to the released operator (`degradations.resize_matrix`): 4 factor taps, which
    jax.image.resize matches only three and more pixels away from the border.

    Raises:
      ValueError: a factor that does not divide the size.
    """
    degradations.resize_matrix(factor, size)
    return separable(
        "super_resolution", functools.partial(degradations.resize_matrix, factor), factor
    )


def gaussian_blur(size: int = 61, std: float = 3.0) -> Operator:
    """Blur with a size x size Gaussian of this standard deviation, cut at 4 std, borders mirrored.

    Raises:
      ValueError: an even size, or a std that is not positive.
    """
    degradations.gaussian_taps(size, std)
    return separable("gaussian_blur", functools.partial(degradations.gaussian_matrix, size, std))


def motion_blur(kernel: Array | np.ndarray) -> Operator:
    """Correlation with any kernel [k,k], borders mirrored. `degradations.motion_kernel` draws one.

    Raises:
      ValueError: a kernel that is not square with an odd side.
    """
    shape = np.shape(kernel)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] % 2 == 0:
        raise ValueError(f"kernel: shape {shape}; expected [k,k] with an odd k")

    def blur(x: Array) -> Array:
        return _correlate(jnp.asarray(kernel, x.dtype), x)

    def transpose(y: Array) -> Array:
        return jax.linear_transpose(blur, jax.ShapeDtypeStruct(y.shape, y.dtype))(y)[0]

    return Operator("motion_blur", blur, transpose)


def _correlate(kernel: Array, x: Array) -> Array:
    b, h, w, c = x.shape
    r = kernel.shape[0] // 2
    x = jnp.pad(x, [(0, 0), (r, r), (r, r), (0, 0)], mode="reflect")
    planes = jnp.moveaxis(x, 3, 1).reshape(b * c, h + 2 * r, w + 2 * r, 1)
    y = jax.lax.conv_general_dilated(
        planes,
        kernel[..., None, None],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=HIGHEST,
    )
    return jnp.moveaxis(y.reshape(b, c, h, w), 1, 3)


def nonlinear_blur(
    kernel: Array | np.ndarray, gamma: float = 2.2, network: Function | None = None
) -> Operator:
    """A blur that averages light, not pixel values: y = blur(v^gamma)^(1/gamma) with v = (x + 1) /
    2 in [0, 1].

    The published task takes a trained blur network (bkse) instead: give it as network, images in
    [0, 1] in and out; the kernel is then not used. Either way the result is clipped and returned in
    [-1, 1].

    Raises:
      ValueError: a bad kernel, or gamma not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}; expected a positive exponent")
    blur = motion_blur(kernel).forward

    def forward(x: Array) -> Array:
        light = jnp.clip((x + 1) / 2, 0, 1)
        if network is not None:
            blurred = network(light)
        else:  # the floor keeps the gradient of both powers finite at black
            blurred = jnp.maximum(blur(jnp.maximum(light, 1e-3) ** gamma), 1e-7) ** (1 / gamma)
        return jnp.clip(blurred, 0, 1) * 2 - 1

    return Operator("nonlinear_blur", forward)


def phase_retrieval(oversample: float = 2.0) -> Operator:
    """Amplitudes of the centred orthonormal Fourier transform of the zero-padded image; the phases
    are lost.

    int(oversample / 8 * H) zeros are put on each side: 256 pixels become 384 at the published 2.0.

    Raises:
      ValueError: a negative oversample.
    """
    if oversample < 0:
        raise ValueError(f"oversample={oversample}; expected at least 0")

    def forward(x: Array) -> Array:
        pads = [(0, 0)] + [(int(oversample / 8 * n),) * 2 for n in x.shape[1:3]] + [(0, 0)]
        centred = jnp.fft.ifftshift(jnp.pad(x, pads), axes=(1, 2))
        return jnp.abs(
            jnp.fft.fftshift(jnp.fft.fft2(centred, axes=(1, 2), norm="ortho"), axes=(1, 2))
        )

    return Operator("phase_retrieval", forward)


def high_dynamic_range(gain: float = 2.0) -> Operator:
    """clip(gain x, -1, 1): over-exposure (DAPS, arXiv 2407.01521)."""
    return Operator("high_dynamic_range", lambda x: jnp.clip(gain * x, -1, 1))


def identity() -> Operator:
    """Measurements of the image itself: plain denoising of a noisy image."""
    spectrum = Spectrum(lambda x: x, lambda x: x, lambda y: y, np.ones((1, 1, 1, 1), np.float32))
    return Operator("identity", lambda x: x, lambda y: y, lambda shape: spectrum)


def measurement_loss(
    operator: Operator, y: Array, squared: bool = True, std: Array | float | None = None
) -> Loss:
    """The loss x0_hat [B,H,W,C] -> ||y - A(x0_hat)||^2 [B], summed over each measurement.

    DPS's released code uses the root (squared=False); DSG's step is the same for both. The released
    losses are norms over the whole batch and not differentiable at residual 0; here each image has
    its own, and the root's gradient at 0 is 0. As in the released code, what y holds at hidden
    pixels is a constant of the sum (`Operator.hide` clears it).

    Args:
      y: measurements, shaped like operator.forward(x0).
      squared: False for the norm.
      std: noise of each number of y (`degradations.poisson_std`); residuals are divided by it.
        Broadcastable to y.

    Raises:
      ValueError: y of integers, or of another shape, when the loss is called.
    """
    check_floats(y.dtype, "y")

    def loss(x0_hat: Array) -> Array:
        predicted = operator.forward(x0_hat)
        if predicted.shape != y.shape:
            raise ValueError(
                f"y: shape {y.shape}; expected {predicted.shape}, what {operator.name} gives"
            )
        residual = y - predicted
        if std is not None:
            residual = residual / std
        total = jnp.sum(jnp.square(residual).reshape(residual.shape[0], -1), axis=1)
        if squared:
            return total
        positive = total != 0  # of nan too, which stays
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1.0)), 0.0)

    return loss


def residual_ratio(operator: Operator, y: Array, x0: Array, std: Array | float) -> Array:
    """||y - A(x0)|| / (std sqrt(m)) [B], m numbers measured: about 1 where x0 explains y but not
    its noise.

    std: noise of y's numbers, a number or broadcastable to y. Hidden pixels do not count.
    """
    seen = y if operator.hide is None else operator.hide(y)
    return measurement_loss(operator, seen, squared=False, std=std)(x0) / jnp.sqrt(
        operator.count(y)
    )
