"""EDM's non-leaky geometric augmentation with its nine conditioning labels.

Source: arXiv 2206.00364, appendix F.2, table 6. Flips move pixels exactly; scale, rotation, stretch
and translation are one resampling. Every operation is drawn per example, so the result depends on
an example's key alone. All shapes are static: the pipe is jittable and differentiable in the
images.

Difference from the authors' code: they pad each batch by the largest margin its transforms need (a
dynamic shape); we always pad by the largest margin possible, width - 1 per side, which changes
pixels by float rounding only (~1e-5). The fixed linear parts (reflect padding, 2x upsampling, the
final low-pass and crop) are one matrix per axis, so an accelerator runs two matrix products, one
bilinear gather and two matrix products.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Key, Shaped

from ogdm_jax import randomness
from ogdm_jax.pixels import check_floats
from ogdm_jax.typing import Array

# Low-pass filter of the orthogonal wavelet "symlet 6": 12 taps of sum sqrt(2).
SYM6 = np.array(
    [0.0154041093, 0.0034907121, -0.1179901111, -0.0483117426, 0.4910559419, 0.7876411410]
    + [0.3379294217, -0.0726375228, -0.0210602925, 0.0447249018, 0.0017677119, -0.0078007083]
)
_CROP = len(SYM6) // 4  # pixels of border that the final low-pass needs on each side

Draws = dict[str, Array]
Keys = Key[Array, " b"]  # typed
Pixels = Shaped[Array, "b h w c"]  # of any dtype
Images = Float[Array, "b h w c"]
Labels = Float[Array, "b k"]
Maps = Float[Array, "b 2 3"]
Flags = Bool[Array, " b"]
# of a resampling: its matrix [B,2,3], output to input in pixels about the centre; its labels [B,k]
Part = tuple[Array, Array]


def xflip(keys: Keys, images: Pixels) -> Pixels:
    """Mirrors each image left to right with probability 1/2. Images are of any dtype."""
    return jnp.where(flipped(keys)[:, None, None, None], images[:, :, ::-1], images)


def flipped(keys: Keys) -> Flags:
    """Which images `xflip` mirrors [B]."""
    return randomness.uniform(randomness.fold_in_each(keys, "xflip")) < 0.5


def flip(images: Pixels, augment: Labels) -> Pixels:
    """Mirrors images by columns 0 (x-flip) and 1 (y-flip) of augmentation labels [B,9].

    Doing so twice gives the images back.
    """
    images = jnp.where(augment[:, 0][:, None, None, None] != 0, images[:, :, ::-1], images)
    return jnp.where(augment[:, 1][:, None, None, None] != 0, images[:, ::-1], images)


def isometric(augment: Labels) -> Flags:
    """Whether no operation but flips acted: the other columns of labels [B,9] are zero."""
    return jnp.all(augment[:, 2:] == 0, axis=1)


@dataclasses.dataclass(frozen=True)
class AugmentPipe:
    """Settings of the pipe; hashable, so usable as a static argument.

    An operation acts with probability p * its multiplier; a multiplier of 0 removes the operation
    and its labels. Defaults are EDM's recipe; p is 0.12 for CIFAR-10 and 0.15 for FFHQ and AFHQv2.
    xflip's multiplier saturates: its draw always happens and flips half of the images. yflip flips
    p / 2 of them.

    Labels, in this order, are zero where an operation did not act: xflip, yflip, scale,
    cos(rotation) - 1, sin(rotation), aniso x, aniso y, translation x, translation y (`label_dim` of
    them).

    Raises:
      ValueError: p outside [0, 1], or a negative multiplier or standard deviation.
    """

    p: float = 0.12
    xflip: float = 1e8
    yflip: float = 1.0
    scale: float = 1.0
    rotate_frac: float = 1.0
    aniso: float = 1.0
    translate_frac: float = 1.0
    scale_std: float = 0.2  # log2 of the isotropic scale
    rotate_frac_max: float = 1.0  # 1 = a full turn
    aniso_std: float = 0.2  # log2 of the stretch
    aniso_rotate_prob: float = 0.5  # probability that the stretch has a random direction
    translate_frac_std: float = 0.125  # in image widths

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"AugmentPipe: p is {self.p}; expected a probability in [0, 1]")
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"AugmentPipe: {name} is {value}; expected a number >= 0")

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations that are on, in the order in which they act."""
        return tuple(name for name in _LABELS if getattr(self, name) > 0)

    @property
    def label_dim(self) -> int:
        """Number of label columns: 9 when every operation is on."""
        return sum(_LABELS[name] for name in self.ops)

    def draw(self, keys: Keys) -> Draws:
        """All random numbers of B examples by name; each name folds into the key by itself.

        `*_u` are uniform thresholds (the operation acts where u < multiplier * p), flips' `w` are 0
        or 1, other `w` are standard normal, `v` are uniform angles, `aniso_ur` < 0.5 keeps the
        stretch's direction. Shapes [B] except trans_w [2,B] and trans_u [1,B].
        """
        keys = randomness.quick(keys)
        return {
            name: draw(randomness.fold_in_each(keys, f"augment_{name}"))
            for op in self.ops
            for name, draw in _DRAWS[op].items()
        }

    def apply(self, draws: Draws, images: Images) -> tuple[Images, Labels]:
        """Transforms images by draws of `draw`.

        Memory in between: (6H, 6W, C) numbers per example.

        Returns:
          (images, labels [B,label_dim]).

        Raises:
          ValueError: images not of rank 4, with a side below 2, or of integers.
        """
        if images.ndim != 4 or min(images.shape[1:3]) < 2:
            raise ValueError(
                f"AugmentPipe: images have shape {images.shape}; expected [B,H,W,C] with H, W >= 2"
            )
        check_floats(images.dtype)
        batch, height, width, _ = images.shape
        labels = [jnp.zeros((batch, 0), images.dtype)]
        for name in (name for name in self.ops if name in _FLIPS):
            w = _acts(
                jnp.asarray(draws[f"{name}_w"], images.dtype),
                draws[f"{name}_u"],
                getattr(self, name) * self.p,
            )
            images = jnp.where(w[:, None, None, None] > 0, jnp.flip(images, _FLIPS[name]), images)
            labels.append(w[:, None])
        parts = [_PARTS[name](self, draws, height, width) for name in self.ops if name in _PARTS]
        if parts:
            matrix = functools.reduce(_compose, [matrix for matrix, _ in parts])
            images = warp(images, matrix.astype(images.dtype))
        labels += [own.astype(images.dtype) for _, own in parts]
        return images, jnp.concatenate(labels, axis=1)

    def augment(self, keys: Keys, images: Images) -> tuple[Images, Labels]:
        """`draw`, then `apply`: (images, labels [B,label_dim])."""
        return self.apply(self.draw(keys), images)


def warp(images: Images, matrix: Maps) -> Images:
    """Resamples images, band-limited by sym6.

    The reflect-padded image is upsampled twice, read bilinearly (zero beyond the padding),
    low-passed and decimated.

    Args:
      images: to resample.
      matrix: maps from output to input, in pixels about the centre.
    """
    _, height, width, _ = images.shape
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    rows, columns = (jnp.asarray(_upsample(n), images.dtype) for n in (height, width))
    fine = product("vw,bhwc->bhvc", columns, images)
    fine = product("uh,bhvc->buvc", rows, fine)
    y, x = _grid(matrix, height, width)
    warped = jax.vmap(_bilinear)(fine, y, x)
    rows, columns = (jnp.asarray(_downsample(n), images.dtype) for n in (height, width))
    return product("wv,bhvc->bhwc", columns, product("hu,buvc->bhvc", rows, warped))


def _grid(matrix: Array, height: int, width: int) -> tuple[Array, Array]:
    """Where each fine output pixel looks in the zero-ringed upsampled image.

    Row and column, [B, 2(H+6), 2(W+6)] each. With u the offset of an output pixel from the centre
    in fine pixels, the image point is A (u + 1/2) + 2 t - 1/2: the filter of even length shifts the
    fine lattice by half a fine pixel against the coarse one.
    """
    out = [np.arange(2 * (n + 2 * _CROP)) + 1.0 - (n + 2 * _CROP) for n in (height, width)]
    v, h = (jnp.asarray(o, matrix.dtype) for o in (out[0][None, :, None], out[1][None, None, :]))
    m = matrix[:, :, :, None, None]
    x = m[:, 0, 0] * h + m[:, 0, 1] * v + 2 * m[:, 0, 2]
    y = m[:, 1, 0] * h + m[:, 1, 1] * v + 2 * m[:, 1, 2]
    # Fine image: 2 (3n-2) pixels, centre at 3n-2-1/2; another -1/2 from above; +1 for the ring.
    # Beyond the ring: zeros.
    y = jnp.clip(y + (3 * height - 2), 0.0, 2.0 * (3 * height - 2) + 1)
    x = jnp.clip(x + (3 * width - 2), 0.0, 2.0 * (3 * width - 2) + 1)
    return y, x


def _bilinear(fine: Array, y: Array, x: Array) -> Array:
    """The image fine [h,w,c] at real positions y, x [p,q]: [p,q,c].

    A row and a column must follow each position.
    """
    top, left = jnp.floor(y), jnp.floor(x)
    fy, fx = (y - top)[None], (x - left)[None]
    # All four neighbours at once, positions last: four gathers of pixels would move 40 times the
    # memory on a TPU.
    squares = jax.lax.gather(
        fine,
        jnp.stack([top, left], axis=-1).astype(jnp.int32),
        jax.lax.GatherDimensionNumbers(
            offset_dims=(0, 1, 2), collapsed_slice_dims=(), start_index_map=(0, 1)
        ),
        slice_sizes=(2, 2, fine.shape[-1]),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    (a, b), (c, d) = squares
    return jnp.moveaxis((1 - fy) * ((1 - fx) * a + fx * b) + fy * ((1 - fx) * c + fx * d), 0, -1)


@functools.lru_cache(maxsize=32)
def _upsample(n: int) -> np.ndarray:
    """Reflect-pads by n-1, inserts zeros, low-passes, adds zeros (1 before, 2 after).

    As a matrix [2(3n-2)+3, n], float64.
    """
    padded = 3 * n - 2
    reflect = np.pad(np.eye(n), [(n - 1, n - 1), (0, 0)], mode="reflect")
    fine = np.zeros((2 * padded - 1, n))
    fine[::2] = reflect
    half = len(SYM6) // 2
    return np.pad(_filter(np.pad(fine, [(half, half), (0, 0)]), SYM6[::-1]), [(1, 2), (0, 0)])


@functools.lru_cache(maxsize=32)
def _downsample(n: int) -> np.ndarray:
    """Low-passes, keeps every second row, crops 3 per side: [n, 2(n+6)], float64."""
    half = (len(SYM6) - 1) // 2
    return _filter(np.pad(np.eye(2 * (n + 2 * _CROP)), [(half, half), (0, 0)]), SYM6)[::2][
        _CROP:-_CROP
    ]


def _filter(rows: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Correlation along axis 0 without padding."""
    count = len(rows) - len(taps) + 1
    parts = [tap * rows[k : k + count] for k, tap in enumerate(taps)]
    return functools.reduce(np.add, parts)


def _compose(left: Array, right: Array) -> Array:
    """Product of two affine maps [B,2,3] as 3x3 matrices.

    Elementwise, which is exact float32 on every device.
    """
    a, b = left[:, :, :, None], right[:, None, :, :]  # [B,2,3,1], [B,1,2,3]
    linear = a[:, :, 0] * b[:, :, 0] + a[:, :, 1] * b[:, :, 1]
    return linear + jnp.pad(left[:, :, 2:], [(0, 0), (0, 0), (2, 0)])


def _affine(
    a: ArrayLike, b: ArrayLike, tx: ArrayLike, c: ArrayLike, d: ArrayLike, ty: ArrayLike
) -> Array:
    """[B,2,3] from six numbers or [B] arrays; at least one is an array."""
    rows = jnp.broadcast_arrays(*(jnp.asarray(value) for value in (a, b, tx, c, d, ty)))
    return jnp.stack(rows, axis=-1).reshape(-1, 2, 3)


def _rotation(angle: Array) -> Array:
    """The matrix [cos -sin; sin cos]."""
    return _affine(jnp.cos(angle), -jnp.sin(angle), 0.0, jnp.sin(angle), jnp.cos(angle), 0.0)


def _acts(value: Array, u: Array, probability: float) -> Array:
    return jnp.where(u < probability, value, jnp.zeros_like(value))


def _scale(pipe: AugmentPipe, draws: Draws, height: int, width: int) -> Part:
    w = _acts(draws["scale_w"], draws["scale_u"], pipe.scale * pipe.p)
    inverse = jnp.exp2(-pipe.scale_std * w)
    return _affine(inverse, 0.0, 0.0, 0.0, inverse, 0.0), w[:, None]


def _rotate(pipe: AugmentPipe, draws: Draws, height: int, width: int) -> Part:
    angle = (2 * draws["rot_v"] - 1) * (np.pi * pipe.rotate_frac_max)
    angle = _acts(angle, draws["rot_u"], pipe.rotate_frac * pipe.p)
    return _rotation(angle), jnp.stack([jnp.cos(angle) - 1, jnp.sin(angle)], axis=1)


def _aniso(pipe: AugmentPipe, draws: Draws, height: int, width: int) -> Part:
    w = _acts(draws["aniso_w"], draws["aniso_u"], pipe.aniso * pipe.p)
    angle = _acts((2 * draws["aniso_v"] - 1) * np.pi, draws["aniso_ur"], pipe.aniso_rotate_prob)
    stretch = jnp.exp2(pipe.aniso_std * w)
    inverse = _affine(1 / stretch, 0.0, 0.0, 0.0, stretch, 0.0)
    matrix = _compose(_compose(_rotation(-angle), inverse), _rotation(angle))
    return matrix, jnp.stack([w * jnp.cos(angle), w * jnp.sin(angle)], axis=1)


def _translate(pipe: AugmentPipe, draws: Draws, height: int, width: int) -> Part:
    w = _acts(draws["trans_w"], draws["trans_u"], pipe.translate_frac * pipe.p)
    shift = pipe.translate_frac_std * w
    return _affine(1.0, 0.0, -shift[0] * width, 0.0, 1.0, -shift[1] * height), w.T


_FLIPS = {"xflip": 2, "yflip": 1}  # the axis that is mirrored
_PARTS = {"scale": _scale, "rotate_frac": _rotate, "aniso": _aniso, "translate_frac": _translate}
_LABELS = {"xflip": 1, "yflip": 1, "scale": 1, "rotate_frac": 2, "aniso": 2, "translate_frac": 2}
_uniform, _normal = randomness.uniform, randomness.normal
_coin = lambda keys: jnp.floor(2 * _uniform(keys))
_DRAWS: Mapping[str, Mapping[str, Callable[[Array], Array]]] = {
    "xflip": {"xflip_w": _coin, "xflip_u": _uniform},
    "yflip": {"yflip_w": _coin, "yflip_u": _uniform},
    "scale": {"scale_w": _normal, "scale_u": _uniform},
    "rotate_frac": {"rot_v": _uniform, "rot_u": _uniform},
    "aniso": dict.fromkeys(("aniso_v", "aniso_u", "aniso_ur"), _uniform) | {"aniso_w": _normal},
    "translate_frac": {
        "trans_w": lambda keys: _normal(keys, (2,)).T,
        "trans_u": lambda keys: _uniform(keys)[None],
    },
}
