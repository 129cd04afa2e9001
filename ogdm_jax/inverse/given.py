"""Masks, blur kernels and measurements that people bring, as pictures or as arrays of NumPy."""

from collections.abc import Iterable

import numpy as np
from etils import epath

from ogdm_jax import places
from ogdm_jax.config import ConfigError
from ogdm_jax.data import pictures
from ogdm_jax.data.arrays import DAMAGED

ARRAYS = (".npy", ".npz")


def array(path: epath.Path, field: str) -> np.ndarray:
    """The array of a .npy file, or of an .npz that holds one; float32, uint8 as it is.

    Args:
      path: of the file.
      field: the option that named it, for messages.

    Raises:
      ConfigError: unreadable, several arrays, no plain numbers, or NaN.
    """
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.lib.npyio.NpzFile):
                names = list(found.files)
                if len(names) != 1:
                    raise ConfigError(
                        f"{field}: {str(path)!r} holds the arrays {', '.join(names)[:100]}; "
                        "expected one"
                    )
                found = found[names[0]]
    except ConfigError:
        raise
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ConfigError(f"{field}: {str(path)!r} is no readable array ({reason})") from None
    if found.dtype.kind not in "buif" or not found.size:
        raise ConfigError(
            f"{field}: {str(path)!r} is {found.dtype} {found.shape}; expected an array of numbers"
        )
    if found.dtype == np.uint8:
        return found
    found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise ConfigError(f"{field}: {str(path)!r} holds NaN or infinity; expected finite numbers")
    return found


def _plane(where: str, field: str) -> np.ndarray:
    """The numbers of a picture or an array, float32 [h,w,c] with c = 1 or 3, from 0 up.

    Raises:
      ConfigError: none of both, of another shape, or with transparent parts, of which nobody knows
        whether they mean black or white.
    """
    path = places.place(where, field)
    if path.suffix.lower() in ARRAYS:
        values = array(path, field)
        shape = values.shape
        while values.ndim > 2 and values.shape[0] == 1:
            values = values[0]
        values = values[..., None] if values.ndim == 2 else values
        if values.ndim != 3 or values.shape[-1] not in (1, 3):
            raise ConfigError(
                f"{field}: {where!r} has shape {shape}; expected [h,w], [h,w,1] or [h,w,3]"
            )
        return values.astype(np.float32)
    try:
        content = path.read_bytes()
        values = pictures.decode(content)
        opaque = pictures.opacity(content)
    except pictures.PictureError as error:
        raise ConfigError(f"{field}: {where} {error}") from None
    if opaque is not None and opaque.min() < 255:
        raise ConfigError(
            f"{field}: {where!r} has transparent parts, which may mean black or white; expected "
            "black and white without transparency (magick IN.png -alpha extract OUT.png takes the "
            "transparency: black where it is)"
        )
    return values.astype(np.float32)


def check_mask(where: str, sizes: Iterable[tuple[int, int]], field: str = "--task.mask") -> None:
    """Raises ConfigError where a mask lies otherwise than pictures of these heights and widths.

    It has their proportions, or is square: drawn over the square that is restored.
    """
    height, width = _plane(where, field).shape[:2]
    for other in sizes:
        if height != width and height * other[1] != width * other[0]:
            raise ConfigError(
                f"{field}: {where!r} is {height} x {width} where a picture is {other[0]} x "
                f"{other[1]} (height, width); expected its proportions, or a square"
            )


def mask(where: str, side: int, field: str = "--task.mask") -> np.ndarray:
    """A mask for images of `side` pixels, float32 [side,side,1]: 1 seen, 0 hidden.

    A pixel is seen where it is brighter than half of the brightest one, so masks of 0 and 1, of 0
    and 255 and of False and True mean the same. The mask is cropped and resized as the pictures
    are, so that it lies where it was drawn.

    Args:
      where: a picture, or an array of NumPy.
      side: of the images.
      field: the option, for messages.

    Raises:
      ConfigError: unreadable, colours, many greys, or a mask that hides every pixel or none.
    """
    values = _plane(where, field)
    half = max(float(values.max()), 0.0) / 2
    bright = values > half
    between = (values > half / 2) & (values < 3 * half / 2)
    if (bright.any(-1) != bright.all(-1)).mean() > 0.01 or between.mean() > 0.5:
        raise ConfigError(
            f"{field}: {where!r} has {'colours' if values.shape[-1] > 1 else 'many greys'}; "
            "expected black where pixels are hidden and white where they are seen"
        )
    seen = values.mean(-1, keepdims=True) > half
    fitted = pictures.fit(seen * np.uint8(255), side, nearest=True) > 0
    if seen.all() or not seen.any() or not fitted.any():
        what = "none" if seen.all() else "all"
        raise ConfigError(
            f"{field}: {where} hides {what} of its pixels"
            f"{' inside the square that is restored' if seen.any() and not seen.all() else ''}; "
            "expected black where pixels are hidden and white where they are seen"
        )
    return fitted.astype(np.float32)


def kernel(where: str, field: str = "--task.kernel") -> np.ndarray:
    """A blur kernel, float64 [k,k] with sum 1, of a picture (black: 0) or an array of NumPy.

    Raises:
      ConfigError: unreadable, colours, not square with an odd side, negative, or all zero.
    """
    values = _plane(where, field).astype(np.float64)
    height, width = values.shape[:2]
    if height != width or height % 2 == 0 or (values != values[..., :1]).any():
        raise ConfigError(
            f"{field}: {where!r} is {height} x {width} x {values.shape[-1]}; expected a grey "
            "square with an odd side"
        )
    if values.min() < 0 or not values.sum() > 0:
        raise ConfigError(f"{field}: {where!r}; expected numbers from 0 up, some of them positive")
    return values[..., 0] / values[..., 0].sum()
