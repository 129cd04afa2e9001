"""What measurements are made of: masks, blur kernels, resampling matrices, and noise.

Masks and kernels are NumPy arrays made once, before anything is compiled; noise is drawn per image
from its own key.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from ogdm_jax import randomness
from ogdm_jax.pixels import check_floats
from ogdm_jax.typing import Array


def box_mask(rng: np.random.Generator, size: int, box: int, margin: int = 16) -> np.ndarray:
    """[size, size, 1] of ones with a box x box square of zeros, at least `margin` from the top and
    left border.

    DPS's and DSG's box task: 128 of 256 pixels, margin 16, corner uniform in [margin, size - box -
    margin).

    Raises:
      ValueError: the box does not fit.
    """
    if box < 1 or box + 2 * margin > size:
        raise ValueError(
            f"box={box}, margin={margin}; expected a box of at least 1 that fits in {size} pixels"
        )
    top, left = rng.integers(margin, max(size - box - margin, margin + 1), 2)
    mask = np.ones((size, size, 1), np.float32)
    mask[top : top + box, left : left + box] = 0
    return mask


def random_mask(
    rng: np.random.Generator, size: int, low: float = 0.3, high: float = 0.7
) -> np.ndarray:
    """[size, size, 1] of ones with int(size^2 p) zeros at random places, p ~ U(low, high).

    The released configurations of DPS and DSG hide 30 to 70 %; DPS's paper says 92 %.

    Raises:
      ValueError: not 0 <= low <= high <= 1.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low={low}, high={high}; expected shares with 0 <= low <= high <= 1")
    hidden = int(size * size * rng.uniform(low, high))
    mask = np.ones(size * size, np.float32)
    mask[rng.choice(size * size, hidden, replace=False)] = 0
    return mask.reshape(size, size, 1)


def gaussian_taps(size: int, std: float) -> np.ndarray:
    """[size] float64 weights whose outer product is the official kernel: scipy's filter of a delta,
    cut at 4 std.

    Raises:
      ValueError: an even or non-positive size, or a non-positive std.
    """
    if size < 1 or size % 2 == 0 or not std > 0:
        raise ValueError(
            f"size={size}, std={std}; expected an odd kernel size and a positive standard deviation"
        )
    delta = np.zeros(size)
    delta[size // 2] = 1
    return ndimage.gaussian_filter1d(delta, std)


def motion_kernel(rng: np.random.Generator, size: int = 61, intensity: float = 0.5) -> np.ndarray:
    """[size, size] float64, sum 1: the trace of a camera that shakes, drawn as a random walk with
    inertia.

    intensity in [0, 1]: 0 is a straight line, 1 a walk that turns at every step. The published
    experiments use the external package motionblur with the same two settings; kernels of other
    packages may be given to the operator.

    Raises:
      ValueError: size even or below 5, which has no room for a path, or an intensity outside
        [0, 1].
    """
    if size < 5 or size % 2 == 0 or not 0 <= intensity <= 1:
        raise ValueError(
            f"size={size}, intensity={intensity}; expected an odd size of 5 or more and 0 <= "
            "intensity <= 1"
        )
    steps = 16 * size
    turns = rng.normal(0, intensity * 4 / np.sqrt(steps), steps).cumsum() + rng.uniform(
        0, 2 * np.pi
    )
    path = np.stack([np.sin(turns), np.cos(turns)]).cumsum(1)
    path -= (path.max(1, keepdims=True) + path.min(1, keepdims=True)) / 2
    path *= (size - 3) / 2 / max(np.abs(path).max(), 1e-12)
    fine = np.zeros((size, size))
    low = np.floor(path).astype(int)
    part = path - low
    for dy in (0, 1):  # each point of the path is shared by its four nearest pixels
        for dx in (0, 1):
            weight = np.abs(1 - dy - part[0]) * np.abs(1 - dx - part[1])
            np.add.at(fine, (low[0] + dy + size // 2, low[1] + dx + size // 2), weight)
    return fine / fine.sum()


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@functools.cache
def resize_matrix(factor: int, size: int) -> np.ndarray:
    """W [size / factor, size] float64 of the official super-resolution operator: y = W x W^T.

    Cubic with anti-aliasing: output o is centred at c = (o + 1/2) factor - 1/2, input j weighs
    cubic((c - j) / factor) / factor (4 factor taps, sum 1), and taps outside fold back with the
    border repeated (.. 1 0 | 0 1 ..).

    Raises:
      ValueError: factor < 1, or one that does not divide size.
    """
    if factor < 1 or size % factor:
        raise ValueError(
            f"factor={factor}, size={size}; expected a factor of at least 1 that divides the size"
        )
    start, half = divmod(factor - 1, 2)  # the first centre is at pixel start + half / 2
    taps = _cubic((half / 2 - np.arange(-2 * factor, 2 * factor + 1)) / factor)
    rows = ndimage.correlate1d(np.eye(size), taps / taps.sum(), axis=0, mode="reflect")
    return rows[start::factor].copy()


@functools.cache
def gaussian_matrix(size: int, std: float, side: int) -> np.ndarray:
    """[side, side] float64: one axis of the Gaussian blur with a kernel of `size`, borders mirrored
    without repetition (.. 2 1 | 0 1 2 ..).
    """
    return ndimage.correlate1d(np.eye(side), gaussian_taps(size, std), axis=0, mode="mirror")


def gaussian_noise(keys: Array, y: Array, std: float) -> Array:
    """Measurements y + std * noise, keys [B]; std in the units of y, images in [-1, 1] (published:
    0.05).

    Raises:
      ValueError: integers.
    """
    check_floats(y.dtype, "y")
    return y + jnp.asarray(std, y.dtype) * randomness.normal(keys, y.shape[1:], y.dtype)


def poisson_noise(keys: Array, y: Array, rate: float = 1.0) -> Array:
    """Photon counts: y in [-1, 1] -> counts ~ Poisson(255 rate (y + 1) / 2), scaled back and
    clipped. keys [B].

    Raises:
      ValueError: rate not positive, or integers.
    """
    check_floats(y.dtype, "y")
    if not rate > 0:
        raise ValueError(f"rate={rate}; expected a positive number of counts per grey level")
    mean = 255 * rate * jnp.clip((y + 1) / 2, 0, 1)
    # jax.random.poisson knows one generator only: keys of any other become its seeds.
    seeds = jax.vmap(jax.random.bits)(keys)
    known = jax.vmap(randomness.seeded)(seeds)
    counts = jax.vmap(jax.random.poisson)(known, mean).astype(y.dtype)
    return jnp.clip(counts / (255 * rate) * 2 - 1, -1, 1)


def poisson_std(y: Array, rate: float = 1.0) -> Array:
    """Standard deviation of `poisson_noise` at brightness y, at least that of one count."""
    return 2 * jnp.sqrt(jnp.maximum(255 * rate * jnp.clip((y + 1) / 2, 0, 1), 1.0)) / (255 * rate)
