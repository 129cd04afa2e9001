"""Random edits of healthy image sets, opened in a process of their own.

`python -m tests.support.mutants KIND COUNT SEED` prints one JSON object: how many were read and
refused, the longest time and the most memory over the start, and what failed otherwise.
"""

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ogdm_jax.data import SourceError, open_source
from ogdm_jax.data.prepare import prepare
from tests.support import apart as processes
from tests.support.sets import archive, encoded, folder, pixels

PICTURES = "PNG JPEG GIF WEBP BMP TIFF PPM TGA ICO JPEG2000 PCX SGI DDS AVIF".split()


def _folder(root: Path) -> tuple[str, list[Path]]:
    images = {kind: pixels(16, 16, 3) for kind in PICTURES}
    files = {f"{kind}.png": encoded(image, kind) for kind, image in images.items() if kind != "DDS"}
    files["DDS.png"] = encoded(Image.fromarray(images["DDS"]).convert("RGBA"), "DDS")
    frames = [Image.fromarray(pixels()) for _ in range(2)]
    files["frames.gif"] = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    files["16.png"] = encoded(Image.fromarray(np.arange(64, dtype="u2").reshape(8, 8)))
    name = folder(root / "set", files)
    return name, sorted((root / "set").iterdir())


def _zip(root: Path) -> tuple[str, list[Path]]:
    files = {f"{c}/{k}.png": encoded() for c in "ab" for k in range(2)}
    name = archive(root / "a.zip", files, [[name, k] for k, name in enumerate(files)])
    return name, [root / "a.zip"]


def _npz(root: Path) -> tuple[str, list[Path]]:
    np.savez(root / "a.npz", image=pixels(6, 4, 4, 3), label=np.arange(6) % 3)
    return f"npz:{root}/a.npz", [root / "a.npz"]


def _compressed(root: Path) -> tuple[str, list[Path]]:
    np.savez_compressed(root / "a.npz", image=np.zeros((6, 4, 4, 3), np.uint8), label=np.arange(6))
    return f"npz:{root}/a.npz", [root / "a.npz"]


def _json(root: Path) -> tuple[str, list[Path]]:
    labels = [["a.png", 0], ["b.png", [0.5, 1.0]], ["c.png", 2]]
    files = {name: encoded() for name, _ in labels}
    table = json.dumps({"labels": [[name, k] for k, name in enumerate(files)]}).encode()
    return folder(root / "set", files | {"dataset.json": table}), [root / "set" / "dataset.json"]


def _records(root: Path) -> tuple[str, list[Path]]:
    np.savez(root / "a.npz", image=pixels(6, 4, 4, 3), label=np.arange(6) % 3)
    name = prepare(open_source(f"npz:{root}/a.npz"), root, "a")
    return name, sorted(path for path in (root / "a").rglob("*") if path.is_file())


KINDS: dict[str, Callable[[Path], tuple[str, list[Path]]]] = {
    "folder": _folder,
    "zip": _zip,
    "npz": _npz,
    "compressed": _compressed,
    "json": _json,
    "records": _records,
}


def edited(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three random edits: a bit, a byte, a number of four bytes, bytes left out or put in."""
    new = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(max(len(new), 1))), rng.integers(6)
        if kind == 0 and new:
            new[at] ^= 1 << int(rng.integers(8))
        elif kind == 1 and new:
            new[at] = int(rng.integers(256))
        elif kind == 2:
            new[at : at + 4] = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 65536])).to_bytes(4)
        elif kind == 3:
            del new[at : at + int(rng.integers(1, 9))]
        elif kind == 4:
            new[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            del new[at:]
    return bytes(new)


def _open(name: str, root: Path) -> str:
    """ "" where the set is read, else the sentence that refuses it."""
    try:
        for limit in (0, 1 << 20):
            source = open_source(name, data_dir=root, resolution=8, channels=3, memory_limit=limit)
            source.take(np.arange(min(len(source), 50)))
    except SourceError as error:
        return str(error)
    return ""


def run(kind: str, count: int, seed: int) -> dict[str, Any]:
    """Opens `count` mutants of a kind of set, one after the other."""
    rng, failed = np.random.default_rng(seed), []
    done: dict[str, Any] = {"read": 0, "refused": 0, "seconds": 0.0, "megabytes": 0.0}
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder_of_all:
        root = Path(folder_of_all)
        name, files = KINDS[kind](root)
        healthy = {path: path.read_bytes() for path in files}
        assert _open(name, root) == "", "the set itself is healthy"
        for k in range(count):
            path = files[int(rng.integers(len(files)))]
            if kind == "folder":  # one picture at a time, or the others hide it
                for other in files:
                    other.unlink(missing_ok=True)
            path.write_bytes(edited(healthy[path], rng))
            with processes.measured(done, f"{kind} {seed} {k} {path.name}"):
                try:
                    said = _open(name, root)
                    done["refused" if said else "read"] += 1
                    if "\n" in said or name not in said and said:
                        failed.append(f"{k} {path.name}: {said}")
                except Exception as error:  # what nobody intended
                    failed.append(f"{k} {path.name}: {type(error).__name__}: {error}")
            path.write_bytes(healthy[path])
    return done | {"failed": failed}


def apart(kind: str, count: int, seed: int) -> dict[str, Any]:
    """`run` in a process of its own; a process that ends otherwise names its last mutant."""
    return processes.run("tests.support.mutants", kind, count, seed, 1800)


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        result = run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(result))
