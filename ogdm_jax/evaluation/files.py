"""Samples on disk: a grid, a folder of PNG files as EDM names them, or an npz that other evaluators read."""

from pathlib import Path

import numpy as np

from ogdm_jax.evaluation import report


def source_name(word: str) -> str:
    """A path -> the source name that reads it; source names pass."""
    path = Path(word.partition("?")[0])
    if path.is_dir():
        return f"folder:{word}"
    kind = {".npz": "npz", ".zip": "zip"}.get(path.suffix.lower())
    return f"{kind}:{word}" if kind and ":" not in word else word


def check_output(out: str) -> Path:
    """The path, if write() can serve it: FILE.png, FILE.npz, or a folder. Raises ValueError for another file type."""
    path = Path(out)
    if path.suffix not in ("", ".png", ".npz"):
        raise ValueError(f"--out: {out!r} given; expected FILE.png (a grid), FILE.npz, or a folder for PNG files")
    if path.suffix and path.is_dir() or not path.suffix and path.is_file():
        raise ValueError(f"--out: {out!r} is there already and is no such file or folder; expected another name")
    return path


def write(path: Path, images: np.ndarray, seeds: np.ndarray, labels: np.ndarray | None) -> None:
    """Writes uint8 images [n,h,w,c].

    FILE.npz holds "images", "seeds" and, for a class-conditional model, "labels"; a folder gets img{seed:08d}.png.
    """
    if path.suffix == ".npz":
        path.parent.mkdir(parents=True, exist_ok=True)
        more = {} if labels is None else {"labels": labels}
        np.savez_compressed(path, images=images, seeds=seeds, **more)
    elif path.suffix == ".png":
        report.save_png(path, report.sheet(images))
    else:
        path.mkdir(parents=True, exist_ok=True)
        for seed, image in zip(seeds, images, strict=True):
            report.save_png(path / f"img{seed:08d}.png", image)
