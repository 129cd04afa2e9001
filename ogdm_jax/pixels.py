"""The two value ranges: files hold uint8 images of 0..255, whatever computes holds numbers in [-1,
1].
"""

import numpy as np

from ogdm_jax.typing import Array


def to_float(images: Array | np.ndarray, dtype=np.float32) -> Array | np.ndarray:
    """uint8 images as image / 127.5 - 1, numbers as they are; of dtype, and of the caller's library
    (NumPy or JAX).
    """
    return images.astype(dtype) / 127.5 - 1.0 if images.dtype == np.uint8 else images.astype(dtype)


def to_uint8(images) -> np.ndarray:
    """[-1, 1] -> 0..255 as EDM's generate.py: x * 127.5 + 128, clipped, the fraction cut off. uint8
    passes unchanged.

    Cutting after adding 128 (not 127.5) is rounding to the nearest level of x * 127.5 + 127.5, so
    `to_float` comes back to the same integer.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32)  # bfloat16 and integers in [-1, 1]
    if np.isnan(images).any():
        raise ValueError("images: contain NaN; expected numbers in [-1, 1].")
    return np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8)
