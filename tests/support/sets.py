"""Image sets as people have them, made of tiny pictures."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return _RNG.integers(0, 256, shape or (8, 8, 3), np.uint8)


def encoded(image: np.ndarray | Image.Image | None = None, kind: str = "PNG", **options) -> bytes:
    """A picture's file; a random one without an image."""
    image = pixels() if image is None else image
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def folder(root: Path, files: Mapping[str, bytes] | list[str]) -> str:
    """Writes files (of random pictures where only their names are given); the name of the set."""
    for name, content in _of(files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return f"folder:{root}"


def archive(path: Path, files: Mapping[str, bytes] | list[str], labels: Any = ()) -> str:
    """Writes a zip; labels is what dataset.json has under "labels"."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in _of(files).items():
            file.writestr(name, content)
        if labels != ():
            file.writestr("dataset.json", json.dumps({"labels": labels}))
    return f"zip:{path}"


def _of(files: Mapping[str, bytes] | list[str]) -> Mapping[str, bytes]:
    return files if isinstance(files, Mapping) else {name: encoded() for name in files}
