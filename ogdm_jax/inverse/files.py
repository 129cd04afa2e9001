"""Images to measure, read from wherever they are, and results, written for people and programs."""

import json

import numpy as np
from etils import epath

from ogdm_jax import places
from ogdm_jax.data import Source, open_pictures, pictures
from ogdm_jax.inverse.measured import Restoration
from ogdm_jax.pixels import to_uint8


def open_input(where: str, shape: tuple[int, int, int]) -> Source:
    """Images to measure: a picture, a folder or archive of pictures, or a data source by name.

    They are cropped and resized to the model's shape (H, W, C).

    Raises:
      ValueError: nothing there, unreadable, or colour for a grey model.
    """
    if not where:
        raise ValueError(
            "--input: not given; expected the picture or the folder of pictures to measure"
        )
    try:
        return open_pictures(where, resolution=shape[0], channels=shape[2])
    except ValueError as error:
        raise ValueError(f"--input: {error}") from None


def side_by_side(restoration: Restoration, restored: np.ndarray) -> np.ndarray:
    """[n,3,H,W,C] uint8: input, measurement and result [n,H,W,C] in [-1, 1] of each image."""
    images, shown = restoration.images, restoration.images
    if restoration.task.restores:
        shown = _as_pictures(restoration.y, images.shape)
    return np.stack([to_uint8(np.clip(v, -1, 1)) for v in (images, shown, restored)], axis=1)


def write(path: epath.Path, restoration: Restoration, restored: np.ndarray) -> None:
    """Input, measurement and result side by side.

    Args:
      path: FILE.png for one grid; FILE.npz for the float arrays input, measurement, result and the
        seeds; else a folder for one picture an image. Figures per image go beside it as JSON.
      restoration: what was measured.
      restored: [n,H,W,C] in [-1, 1].
    """
    n, _, h, w, c = (triples := side_by_side(restoration, restored)).shape
    scale = max(1, 64 // h)
    if path.suffix == ".npz":
        with places.written(path) as new:
            np.savez_compressed(
                new,
                input=restoration.images,
                measurement=restoration.y,
                result=restored,
                seeds=restoration.seeds,
            )
    elif path.suffix == ".png":
        columns = 3 * min(n, 4)
        together = pictures.grid(triples.reshape(3 * n, h, w, c), columns, padding=2, scale=scale)
        pictures.save_png(path, together)
    else:
        for seed, triple in zip(restoration.seeds, triples, strict=True):
            one = pictures.grid(triple, 3, padding=2, scale=scale)
            pictures.save_png(path / f"img{int(seed):08d}.png", one)
    figures = {
        name: [round(float(v), 5) for v in values]
        for name, values in restoration.judge(restored).items()
    }
    text = json.dumps({"seeds": restoration.seeds.tolist(), **figures}) + "\n"
    (path.with_suffix(".json") if path.suffix else path / "figures.json").write_text(text)


def _as_pictures(y: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Measurements [n,h,w,c] as images of the input's size: nearest pixels; amplitudes by their
    logarithm.
    """
    _, height, width, _ = shape
    if y.shape == shape:
        return y
    if y.shape[1] > height:
        y = np.log(np.maximum(y, 1e-3))
        low, high = (f(y, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
        y = 2 * (y - low) / np.maximum(high - low, 1e-9) - 1
    rows, columns = (
        np.arange(a) * b // a for a, b in zip((height, width), y.shape[1:3], strict=True)
    )
    return y[:, rows][:, :, columns]
