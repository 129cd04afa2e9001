"""The two value ranges of images: uint8 of 0..255 in files, numbers in [-1, 1] in computations.

Processes that only read files import this module, so it imports JAX for type checkers alone.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ogdm_jax.typing import Array

    Images = TypeVar("Images", np.ndarray, Array)


def to_float(images: "Images", dtype: np.dtype | type = np.float32) -> "Images":
    """uint8 images as image / 127.5 - 1; other numbers as they are.

    The result has the given dtype and is an array of the caller's library (NumPy or JAX).
    """
    return images.astype(dtype) / 127.5 - 1.0 if images.dtype == np.uint8 else images.astype(dtype)


def to_uint8(images: npt.ArrayLike) -> np.ndarray:
    """[-1, 1] -> 0..255 as EDM's generate.py: x * 127.5 + 128, clipped, the fraction cut off.

    Cutting after adding 128 (not 127.5) is rounding to the nearest level of x * 127.5 + 127.5, so
    an image that `to_float` made comes back unchanged. uint8 images pass as they are.

    Raises:
      ValueError: NaN.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32)  # bfloat16 and integers in [-1, 1]
    if np.isnan(images).any():
        raise ValueError("images: contain NaN; expected numbers in [-1, 1].")
    return np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8)
