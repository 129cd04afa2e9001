"""Images for people: grids, PNG and animation files."""

import io
import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ogdm_jax import places
from ogdm_jax.pixels import to_uint8


def grid(images, columns: int | None = None, padding: int = 0, scale: int = 1) -> np.ndarray:
    """Images [n, h, w, c] (uint8, or floats in [-1, 1]) -> one uint8 array [rows * h, columns * w,
    c], row by row.

    columns: default the square root, rounded up. padding: white pixels between images. scale: each
    pixel becomes scale x scale, for images of a few pixels. Empty places are white.
    """
    images = to_uint8(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or len(images) == 0:
        raise ValueError(
            f"images: shape {images.shape}; expected [n, h, w, c] with n > 0 and c = 1, 3 or 4."
        )
    n, h, w, c = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1 or padding < 0 or scale < 1:
        raise ValueError(
            f"columns, padding, scale: {columns}, {padding}, {scale}; expected at least 1, 0 and 1."
        )
    rows = -(-n // columns)
    cells = np.full((rows * columns, h * scale + padding, w * scale + padding, c), 255, np.uint8)
    cells[:n, : h * scale, : w * scale] = images.repeat(scale, axis=1).repeat(scale, axis=2)
    page = (
        cells.reshape(rows, columns, *cells.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows * cells.shape[1], -1, c)
    )
    return page[: page.shape[0] - padding, : page.shape[1] - padding]


def sheet(images, columns: int | None = None) -> np.ndarray:
    """A `grid` to look at: a line between the images, and small ones enlarged to about 32
    pixels.
    """
    return grid(images, columns, padding=1, scale=max(1, 32 // np.shape(images)[1]))


def _pillow(image: np.ndarray) -> Image.Image:
    image = to_uint8(image)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (3, 4)):
        raise ValueError(
            f"image: shape {image.shape}; expected [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]."
        )
    return Image.fromarray(image)


def save_png(path: str | os.PathLike, image) -> None:
    """Writes one image [h, w] or [h, w, c] (uint8, or floats in [-1, 1]); makes the folder if
    needed.
    """
    picture = _pillow(np.asarray(image))
    content = io.BytesIO()
    picture.save(content, format="PNG")
    path = places.place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())


def save_animation(path: str | os.PathLike, frames: Sequence, milliseconds: int = 80) -> None:
    """Frames [t] of equal shape -> a looping animation; the ending (.webp, .gif, .png) chooses the
    format.
    """
    pictures = [_pillow(np.asarray(frame)) for frame in frames]
    ending = os.path.splitext(path)[1].lower()
    if not pictures or ending not in (".webp", ".gif", ".png"):
        raise ValueError(
            f"path, frames: '{path}', {len(pictures)}; expected .webp, .gif or .png and at least "
            "one frame."
        )
    with places.written(places.place(path)) as new:
        pictures[0].save(
            new, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0
        )
