"""The one reader of labels: classes or vectors, of arrays and of dataset.json."""

import json
import posixpath
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_CLASSES = 100_000  # more than images are a mistake: numbers that are no classes


class SourceError(ValueError):
    """An image set cannot be used: one sentence that says which one, why, and how to prepare it."""


class Labels(NamedTuple):
    """Labels of a set.

    Attributes:
      values: int32 [N] (-1 = no class) or float32 [N,k].
      classes: their number; for vectors their length.
      notes: what a person should know of them, a sentence each.
    """

    values: np.ndarray
    classes: int
    notes: tuple[str, ...] = ()


class Classes(NamedTuple):
    """What dataset.json or folders say: labels [N] or [N,k] or None, names of classes, notes."""

    labels: np.ndarray | None = None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def class_words(labels: np.ndarray | None, names: Sequence[str] = ()) -> list[str]:
    """What people call the classes of images [n]: names where they are known, else numbers; []
    without classes, as with labels that are vectors [n,k].
    """
    called = {k: name for k, name in enumerate(names)} | {-1: "no class"}
    if labels is None or labels.ndim > 1:
        return []
    return [called.get(int(k), str(int(k))) for k in labels]


def normal(name: str, labels: np.ndarray, count: int, names: Sequence[str] = ()) -> Labels:
    """Labels as classes from 0 or as vectors.

    Columns [N,1] and whole floating-point numbers are classes, and so are one-hot vectors.

    Args:
      name: of the source, for messages.
      labels: one for each image.
      count: of images.
      names: of the classes, where they are known.

    Raises:
      SourceError: another number or type, NaN, fractions, classes below -1 or absurdly many.
    """
    labels, notes = np.asarray(labels), []
    if labels.ndim == 0 or len(labels) != count:
        raise SourceError(
            f"{name}: has {labels.size if labels.ndim < 2 else len(labels)} labels for {count} "
            "images; expected one label per image"
        )
    expected = "expected integers [N] or vectors [N,k]"
    if labels.dtype.kind in "US":
        expected += (
            "; names, numbers = np.unique(labels, return_inverse=True) makes them of texts, and "
            "the names can be kept beside them as class_names"
        )
    if labels.dtype.kind not in "biuf" or labels.ndim > 2 or 0 in labels.shape:
        raise SourceError(
            f"{name}: labels have type {labels.dtype} and shape {labels.shape}, the first is "
            f"{_word(labels)}; {expected}"
        )
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        row = int(np.argwhere(~np.isfinite(labels))[0][0])
        raise SourceError(f"{name}: the label of image {row} is {labels[row]}; {expected}")
    whole = labels.dtype.kind != "f" or bool((labels == np.rint(labels)).all())
    if labels.ndim == 2 and labels.shape[1] == 1 and whole:
        labels = labels[:, 0]
    least = len(names)
    if labels.ndim == 2:
        if not _one_hot(labels):
            return Labels(_vectors(name, labels), labels.shape[1])
        least = max(least, labels.shape[1])
        labels, whole = labels.argmax(axis=1), True
        notes.append(f"its labels are one-hot vectors of {least}: read as classes")
    if not whole:
        raise SourceError(
            f"{name}: labels have type {labels.dtype} and shape {labels.shape}, and are no whole "
            f"numbers ({labels[labels != np.rint(labels)][0]}); {expected}"
        )
    low, high = labels.min(), labels.max()
    if low < -1 or high >= max(MOST_CLASSES, count):
        raise SourceError(
            f"{name}: labels go from {low} to {high} in {count} images; expected -1 (no class) or "
            "classes from 0"
        )
    if names and high >= len(names):
        raise SourceError(
            f"{name}: labels go up to {high}, but there are names for {len(names)} classes; "
            "expected a name for every class"
        )
    classes = max(least, int(high) + 1)
    values = labels.astype(np.int32)
    if low < 0:
        notes.append(f"{int((values < 0).sum())} of {count} images have no class (-1)")
    return Labels(values, classes, (*notes, *_gaps(values, classes)))


def _word(labels: np.ndarray) -> str:
    return repr(labels.ravel()[0])[:40] if labels.size else "missing"


def _one_hot(labels: np.ndarray) -> bool:
    return bool((labels.max(axis=1) == 1).all() and (np.abs(labels).sum(axis=1) == 1).all())


def _vectors(name: str, labels: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        vectors = labels.astype(np.float32)
    if not np.isfinite(vectors).all() or vectors.shape[1] > MOST_CLASSES:
        raise SourceError(
            f"{name}: label vectors have {vectors.shape[1]} numbers up to {labels.max()}; expected "
            f"at most {MOST_CLASSES} that float32 can hold"
        )
    return vectors


def _gaps(labels: np.ndarray, classes: int) -> list[str]:
    """What to say of classes without images."""
    missing = np.flatnonzero(np.bincount(labels[labels >= 0], minlength=classes) == 0)
    if not len(missing) or labels.max() < 0:
        return []
    if missing[0] == 0 and len(missing) == 1:
        return [
            f"its labels go from 1 to {labels.max()}, class 0 has no image: subtract 1 if they "
            f"were counted from 1 ({classes} classes are taken)"
        ]
    return [f"{len(missing)} of its {classes} classes have no image (class {missing[0]} first)"]


def plain(name: str) -> str:
    """A file's name in an archive as a relative path with slashes, without "." and ".."."""
    return posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")


def key(name: str) -> str:
    """A file's name as names are compared: a plain path in one form of Unicode."""
    return unicodedata.normalize("NFC", plain(name))


def one_form(names: Sequence[str]) -> list[str]:
    """Names of classes in one form of Unicode: a Mac's files have another one, which also has
    another order.
    """
    return [unicodedata.normalize("NFC", str(name)) for name in names]


def of_json(source: str, content: bytes, names: Sequence[str]) -> Classes:
    """The labels of files in EDM's dataset.json.

    That is {"labels": [[name, integer or vector], ...]}, or null for the list; {name: label} is
    read, too, and "class_names", which EDM does not have, may lie beside it.

    Raises:
      SourceError: no such table, a file without a label or with two, or labels of several kinds.
    """
    try:
        table = json.loads(content)
        pairs, classes = table["labels"], table.get("class_names") or []
        pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
        rows = None if pairs is None else [(str(name), label) for name, label in pairs]
        malformed = isinstance(pairs, str) or not _are_texts(classes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        malformed, rows, classes = f" ({type(error).__name__}: {error})"[:120], None, []
    if malformed:
        raise SourceError(
            f"{source}: dataset.json is malformed{malformed if malformed is not True else ''}; "
            'expected {"labels": [[name, label], ...]} or null'
        )
    if rows is None:
        return Classes()
    known, wanted = {}, [key(name) for name in names]
    for name, label in rows:
        other = known.setdefault(key(name), label)
        if other is not label and other != label:
            raise SourceError(
                f"{source}: dataset.json gives {name} the labels {other} and {label}; expected one"
            )
    missing = next((n for n, k in zip(names, wanted) if k not in known), None)
    if missing is not None:
        raise SourceError(
            f"{source}: dataset.json has no label for {missing}; expected one for every image, or "
            "null"
        )
    extra, notes = sorted(set(known) - set(wanted)), []
    if extra:
        notes.append(
            f"dataset.json has labels for {len(extra)} files that are no images of the set "
            f"({extra[0]} first)"
        )
    try:
        return Classes(np.array([known[k] for k in wanted]), tuple(classes), tuple(notes))
    except ValueError:
        raise SourceError(
            f"{source}: dataset.json mixes kinds of labels; expected all integers or all vectors "
            "of one length"
        ) from None


def _are_texts(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)
