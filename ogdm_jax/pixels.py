"""The two value ranges of images: uint8 of 0..255 in files, numbers in [-1, 1] in computations.

Processes that only read files import this module, so it imports JAX for type checkers alone.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ogdm_jax.typing import Array

    Images = TypeVar("Images", np.ndarray, Array)


FAR = 3.0  # numbers beyond it are of another range than [-1, 1], not samples that overshoot


def crop_all(side: int) -> str:
    """What a person gives to make squares of one size of all images, for a sentence."""
    return (
        f"crop and resize them by --config.data.resolution={side} (train.py, ogdm plan), or once "
        f"for all by ogdm data prepare SOURCE --resolution {side} --out PLACE, whose result "
        "ogdm evaluate takes too"
    )


def to_float(images: "Images", dtype: np.dtype | type = np.float32) -> "Images":
    """uint8 images as image / 127.5 - 1; floating-point numbers as they are.

    The result has the given dtype and is an array of the caller's library (NumPy or JAX).

    Raises:
      ValueError: numbers of another type, of which nobody knows the range.
    """
    check_type(images.dtype)
    return images.astype(dtype) / 127.5 - 1.0 if images.dtype == np.uint8 else images.astype(dtype)


def to_uint8(images: npt.ArrayLike) -> np.ndarray:
    """[-1, 1] -> 0..255 as EDM's generate.py: x * 127.5 + 128, clipped, the fraction cut off.

    Cutting after adding 128 (not 127.5) is rounding to the nearest level of x * 127.5 + 127.5, so
    an image that `to_float` made comes back unchanged. uint8 images pass as they are.

    Raises:
      ValueError: NaN or infinity (the images [n,h,w,c] are named), integers that are not uint8, or
        whole numbers of 0 to 255 as floats.
    """
    images = np.asarray(images)
    check_type(images.dtype)
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32)  # bfloat16
    if not np.isfinite(images).all():
        raise ValueError(
            f"images: {which(~np.isfinite(images))} NaN or infinity; expected numbers in [-1, 1]."
        )
    # Samples may leave [-1, 1] and are clipped; levels of 0 to 255 would all become white.
    if images.max(initial=0) > FAR and images.min() >= 0 and (images == np.rint(images)).all():
        raise ValueError(
            f"images: whole numbers from {images.min():g} to {images.max():g} of type "
            f"{images.dtype}; expected uint8, or numbers in [-1, 1]."
        )
    return np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8)


def check_type(dtype: np.dtype, name: str = "images") -> None:
    """Raises ValueError for images of another type than uint8 and floating-point numbers."""
    if dtype != np.uint8 and dtype.kind not in "fV":  # V: bfloat16 and its like
        raise ValueError(
            f"{name}: type {dtype}; expected uint8 of 0 to 255, or floats in [-1, 1] "
            "(.astype(np.uint8) where the values are 0 to 255)"
        )


def check_floats(dtype: np.dtype, name: str = "images") -> None:
    """Raises ValueError for integers where only floating-point numbers can be computed with."""
    if dtype.kind not in "fV":
        raise ValueError(
            f"{name}: type {dtype}; expected floats in [-1, 1] (pixels.to_float makes them of "
            "uint8)"
        )


def check_range(images: np.ndarray, name: str = "images") -> None:
    """Raises ValueError for images that are not uint8, nor about [-1, 1]. NaN passes.

    Samples may overshoot; FAR is where that ends.
    """
    check_type(images.dtype, name)
    if images.dtype == np.uint8:
        return
    far = np.abs(images.astype(np.float64)) > FAR
    if far.any():
        largest = np.nanmax(np.abs(images.astype(np.float64)))
        raise ValueError(
            f"{name}: {which(far)} numbers up to {largest:.4g}; expected [-1, 1] (x / 127.5 - 1 "
            "of 0 to 255), or uint8"
        )


def which(bad: np.ndarray) -> str:
    """The images that hold a marked pixel, for a sentence: "number 3 and 7 more of 50 hold"."""
    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1)) if bad.ndim == 4 else ()
    if len(rows) == 0:
        return "some hold"
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"number {rows[0]}{more} of {len(bad)} {'hold' if more else 'holds'}"
