"""Which images a set holds, in a few hashes: what a checkpoint keeps to know its data set again.

The folder that a set lies in, and whether it is held in memory, change nothing.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from ogdm_jax.data.labels import one_form

_BYTES = 32 << 20  # of an array: what is looked at, in images that are spread evenly


def of_names(names: Sequence[str], sizes: Sequence[int] | np.ndarray) -> str:
    """A hash of the names of files, whatever form of Unicode they are in, and of their sizes."""
    whole = hashlib.sha256()
    for name in names:
        whole.update(unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape") + b"\0")
    whole.update(np.asarray(sizes, "<i8").tobytes())
    return whole.hexdigest()[:16]


def of_array(array: np.ndarray) -> str:
    """A hash of the shape of an array [N,...] and of its rows, or of some of them where it is big.

    An array without rows has one too.
    """
    count = max(1, min(len(array), _BYTES * len(array) // max(1, array.nbytes)))
    rows = np.unique(np.linspace(0, max(len(array) - 1, 0), count).astype(np.int64))[: len(array)]
    whole = hashlib.sha256(repr((array.shape, array.dtype.str)).encode())
    whole.update(np.ascontiguousarray(array[rows]).tobytes())
    return whole.hexdigest()[:16]


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two fingerprints, in words for a sentence; "" where nothing does.

    What one of them does not know (that of an older run, or of another kind of set) is the same.
    """
    parts = []
    if "images" in before and before["images"] != now["images"]:
        parts.append(f"{before['images']} images, now {now['images']}")
    then, names = (one_form(about.get("class_names") or ()) for about in (before, now))
    if then and names and then != names:
        changed = [(k, a, b) for k, (a, b) in enumerate(zip(then, names)) if a != b]
        which = [f"class {k} was {a!r} and is {b!r}" for k, a, b in changed[:2]]
        parts += which or [f"{len(then)} classes, now {len(names)}"]
    words = {"contents": "other files or pixels", "labels": "other labels"}
    for key, text in words.items():
        if before.get(key) and now[key] and before[key] != now[key]:
            parts.append(text)
    return ", ".join(parts)
