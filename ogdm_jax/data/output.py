"""Samples on disk: a grid, a folder of PNG files as EDM names them, or an npz; and results, as
JSON.
"""

import json
from typing import Any

import numpy as np
from etils import epath

from ogdm_jax import places
from ogdm_jax.data import pictures as report
from ogdm_jax.data.sources import KINDS


def source_name(word: str) -> str:
    """A path -> the source name that reads it; source names pass, also beside a folder of that name
    (./digits).
    """
    if word in KINDS:
        return word
    uri = places.is_uri(word)
    if "://" in word and not uri:
        return word
    path = places.place(word.partition("?")[0])
    if path.is_dir():
        return f"folder:{word}"
    kind = {".npz": "npz", ".zip": "zip"}.get(path.suffix.lower())
    return f"{kind}:{word}" if kind and (uri or ":" not in word) else word


def check_output(out: str) -> epath.Path:
    """The path, if write() can serve it: FILE.png, FILE.npz, or a folder.

    Raises:
      ValueError: another file type, or a place that cannot be written.
    """
    path = places.place(out, "--out")
    if path.suffix not in ("", ".png", ".npz"):
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
    """Writes uint8 images [n,h,w,c].

    FILE.npz holds "images", "seeds" and, for a class-conditional model, "labels" (OpenAI's
    evaluator wants the images
    as its first array: np.savez(OTHER, np.load(FILE)["images"])); a folder gets img{seed:08d}.png.
    """
    if path.suffix == ".npz":
        more = {} if labels is None else {"labels": labels}
        with places.written(path) as new:
            np.savez_compressed(new, images=images, seeds=seeds, **more)
    elif path.suffix == ".png":
        report.save_png(path, report.sheet(images))
    else:
        path.mkdir(parents=True, exist_ok=True)
        for seed, image in zip(seeds, images, strict=True):
            report.save_png(path / f"img{seed:08d}.png", image)


def print_json(result: dict[str, Any], out: str | None) -> None:
    """Prints a result and, where a file is named, writes it there, too."""
    text = json.dumps(result, indent=1)
    if out:
        with places.written(places.place(out, "--out")) as new:
            new.write_text(text + "\n")
    print(text)
