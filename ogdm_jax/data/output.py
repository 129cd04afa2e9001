"""Samples on disk: a grid, a folder of PNG files as EDM names them, or an npz."""

from typing import Any

import numpy as np
from etils import epath

from ogdm_jax import places
from ogdm_jax.data.pictures import save_png, sheet


def check_output(out: str) -> epath.Path:
    """The path, if write() can serve it: FILE.png, FILE.npz, or a folder.

    Raises:
      ValueError: another file type, or a place that cannot be written.
    """
    path = places.place(out, "--out")
    if not out or path.suffix not in ("", ".png", ".npz"):
        raise ValueError(
            f"--out: {out!r} given; expected FILE.png (a grid), FILE.npz, or a folder for PNG files"
        )
    if path.suffix and path.is_dir() or not path.suffix and path.is_file():
        raise ValueError(
            f"--out: {out!r} is there already and is no such file or folder; expected another name"
        )
    return places.writable(path, "--out", file=bool(path.suffix))


def write(
    path: epath.Path, images: np.ndarray, seeds: np.ndarray, labels: np.ndarray | None
) -> None:
    """Writes uint8 images [n,h,w,c] of seeds [n] to a path that `check_output` returned.

    FILE.npz holds "images", "seeds" and, for a class-conditional model, "labels" (OpenAI's
    evaluator wants the images as its first array: np.savez(OTHER, np.load(FILE)["images"])); a
    folder gets img{seed:08d}.png, and FILE.png a grid.
    """
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {"images": images, "seeds": seeds}
        if labels is not None:
            arrays["labels"] = labels
        with places.written(path) as new:
            np.savez_compressed(new, **arrays)
    elif path.suffix == ".png":
        save_png(path, sheet(images))
    else:
        path.mkdir(parents=True, exist_ok=True)
        for seed, image in zip(seeds, images, strict=True):
            save_png(path / f"img{seed:08d}.png", image)
