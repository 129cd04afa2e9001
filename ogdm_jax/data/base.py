"""What an image set is: `Source`, made of arrays in memory or of a reader of stored images."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from tqdm import tqdm

from ogdm_jax.brief import brief
from ogdm_jax.data import identity
from ogdm_jax.data.labels import SourceError, normal
from ogdm_jax.data.pictures import PictureError, fit, with_channels
from ogdm_jax.latents import Latents
from ogdm_jax.pixels import crop_all

# a class, a float vector [k], a caption, or no label
Label: TypeAlias = int | np.ndarray | str | None


@runtime_checkable
class Reader(Protocol):
    """Random access to stored images: what a kind of source implements.

    A reader that is faster at many items than one by one also has `read_many(rows)`, an iterator
    over what `read` returns for each of them; one that knows which files it reads, `contents()`, a
    hash of them; one that has something to say of those it has read, `remarks()`, sentences.
    """

    def __len__(self) -> int:
        """The number of images."""
        ...

    def read(self, i: int) -> tuple[np.ndarray, Label]:
        """Image i, uint8 [h,w,1 or 3], and its label; SourceError where it cannot be read."""
        ...

    def where(self, i: int) -> str:
        """Words that name item i in a message."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A reader of some rows of another one, in the order of `rows`."""

    reader: Reader
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> tuple[np.ndarray, Label]:
        """Image and label of the i-th of these rows."""
        return self.reader.read(int(self.rows[i]))

    def read_many(self, rows: Sequence[int]) -> Iterator[tuple[np.ndarray, Label]]:
        """What `read` returns for each of rows."""
        return read_many(self.reader, self.rows[np.asarray(rows)].tolist())

    def where(self, i: int) -> str:
        """Words that name item i in a message."""
        return self.reader.where(int(self.rows[i]))


class Stored(NamedTuple):
    """An opened set of stored images.

    Attributes:
      reader: reads them.
      labels: integers [N] or vectors [N,k] where they are known before any image is read.
      class_names: one per class, or none.
      notes: what was left out or chosen, a sentence each.
      latents: what its numbers are, where they are no pixels.
      captions: one of each image where they are known before any is read.
    """

    reader: Reader
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    latents: Latents | None = None
    captions: Sequence[str] = ()


def read_many(reader: Reader, rows: Sequence[int]) -> Iterator[tuple[np.ndarray, Label]]:
    """What `reader.read` returns for each of rows, by its own `read_many` where it has one."""
    many = getattr(reader, "read_many", None)
    return map(reader.read, rows) if many is None else many(rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A set of equally sized images, or of the latents of such (`latents`): those are read as they
    are stored, [views,h,w,2C], and become what a network sees in the step (moments.py).

    Attributes:
      name: as given to open_source.
      shape: (H, W, C) of every image; of latents that of what the network sees.
      num_classes: number of classes, 0 without labels; for float label vectors their length.
      class_names: one name per class where known, else empty.
      images: uint8 [N,H,W,C] in memory, or None where images are read one by one.
      labels: int32 [N] (-1 = no class) or float32 [N, num_classes] where known ahead, else None.
      label_size: 0 for integer labels, else the length of float label vectors.
      reader: reads the images that are not in memory.
      resolution: what images that are read are cropped and resized to; None: as stored.
      hashes: of the contents and of the labels that are known ahead, for `fingerprint`.
      notes: what was left out or chosen when it was opened, a sentence each, for people to read.
      latents: what the numbers are, where they are no pixels.
      captions: one of each image, where they are known ahead.
      empty: int32 [M], the tokens of the empty caption: where labels are tokens [N,M] of captions
        (`training.texts.tokenised`).
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
    hashes: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    latents: Latents | None = None
    captions: Sequence[str] = dataclasses.field(default=(), repr=False)
    empty: np.ndarray | None = None
    __repr__ = brief

    def __len__(self) -> int:
        return len(self._stored if self.images is None else self.images)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Of one item as it is stored: that of an image, or of latents."""
        return self.shape if self.latents is None else self.latents.item_shape

    @property
    def dtype(self) -> np.dtype:
        """Of the items as they are stored."""
        return np.dtype(np.uint8 if self.latents is None else self.latents.dtype)

    @property
    def captioned(self) -> bool:
        """Whether each image has a caption."""
        return bool(self.captions) or bool(getattr(self.reader, "captions", ""))

    @property
    def in_memory(self) -> bool:
        """Whether the images are an array of this process."""
        return self.images is not None

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [H,W,C], "label": int32 (-1 = no class) or float32 [num_classes]}."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: image {i} of {len(self)}")
        rows = self.take(np.array([i]))
        return {name: rows[name][0] for name in ("image", "label")}

    def take(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The images and labels of rows [n].

        Returns:
          {"image": uint8 [n,H,W,C] or latents as stored, "label": int32 [n] or float32 [n,k]}, and
          "caption", n of them, of pixels that have some.
        """
        label = np.full(len(rows), -1, np.int32) if self.labels is None else self.labels[rows]
        if self.images is not None:
            return {"image": self.images[rows], "label": label}
        images, wanted = np.empty((len(rows), *self.item_shape), self.dtype), list(map(int, rows))
        read, captions = read_many(self._stored, wanted), []
        for place, (row, (image, own)) in enumerate(zip(wanted, read)):
            images[place] = self._checked(image, row)
            if isinstance(own, str):
                captions.append(own)
            elif self.labels is None and own is not None:
                label[place] = own
        found = {"image": images, "label": label}
        return found | ({"caption": np.array(captions, object)} if captions else {})

    @property
    def _stored(self) -> Reader:
        assert self.reader is not None, "a source has images or a reader"
        return self.reader

    def _checked(self, image: np.ndarray, i: int) -> np.ndarray:
        """Image i in the size and the channels of this set, or SourceError."""
        if (
            self.latents is not None
            or image.shape == self.shape
            and self.resolution in (None, image.shape[0])
        ):
            return image
        where = f"{self.name} ({self._stored.where(i)})"
        image = _with_channels(fit(image, self.resolution), self.shape[-1], where)
        if image.shape != self.shape:
            size, expected = (f"{s[1]}x{s[0]}" for s in (image.shape, self.shape))
            raise SourceError(
                f"{where}: is {size} where {self._stored.where(0)} is {expected}; "
                f"{crop_all(min(self.shape[:2]))}"
            )
        return image


def spread(count: int, most: int) -> np.ndarray:
    """The rows of a set of `count` images; where it has more than `most`, so many of them, spread
    evenly: sets are often stored in the order of their classes.
    """
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int32)


def from_arrays(
    name: str,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    resolution: int | None = None,
    channels: int | None = None,
    notes: Sequence[str] = (),
    latents: Latents | None = None,
) -> Source:
    """A source in memory.

    Args:
      name: for messages.
      images: uint8 [N,H,W,C] or [N,H,W].
      labels: integers [N] or float vectors [N,k].
      class_names: one per class, or none.
      resolution: centre-crop and resize to this side.
      channels: 1 or 3; None: as given.
      notes: what was left out or chosen, a sentence each.
      latents: what the images are, where they are no pixels but items as it says.

    Raises:
      SourceError: other types or shapes, no images, or colour where channels is 1.
    """
    if latents is None:
        alone = images.ndim == 3 and images.shape[-1] not in (1, 3)
        images = images[..., None] if alone else images
        _check_array(name, images)
        if resolution is not None and images.shape[1:3] != (resolution, resolution):
            images = np.stack([fit(image, resolution) for image in images])
        if channels not in (None, images.shape[-1]):
            images = np.stack([_with_channels(image, channels, name) for image in images])
    height, width, depth = images.shape[1:] if latents is None else latents.shape
    source = Source(
        name,
        (height, width, depth),
        class_names=tuple(class_names),
        images=images,
        hashes={"contents": identity.of_array(images)},
        notes=tuple(notes),
        latents=latents,
    )
    return _with_labels(source, labels)


def from_reader(
    name: str, stored: Stored, resolution: int | None, channels: int | None, memory_limit: int
) -> Source:
    """A source over a reader, of which the first image sets the size.

    Sets of at most memory_limit bytes are read into memory now, with every image checked; not
    those of pixels with captions, which only `encode` reads, once.
    """
    reader, labels, class_names, notes, latents, captions = stored
    if len(reader) == 0:
        raise SourceError(f"{name}: holds no images; expected at least one")
    first = reader.read(0)[0]
    if latents is None:
        first = _with_channels(fit(first, resolution), channels, name)
    height, width, depth = first.shape if latents is None else latents.shape
    source = Source(
        name,
        (height, width, depth),
        class_names=class_names,
        reader=reader,
        resolution=resolution,
        hashes={"contents": getattr(reader, "contents", lambda: "")()},
        notes=notes,
        latents=latents,
        captions=captions,
    )
    source = _with_labels(source, labels)
    if captions:
        source.hashes["labels"] = identity.of_names(captions, ())
    within = len(reader) * first.nbytes <= memory_limit
    if within and (latents is not None or not source.captioned):
        source = _in_memory(source)
    remarks = getattr(reader, "remarks", lambda: ())()
    return dataclasses.replace(source, notes=source.notes + remarks)


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells a set from others, as plain JSON; `identity.difference` compares two.

    Returns:
      images: their number; class_names; contents: a hash of the names and sizes of files, or of the
      images of an array, "" where neither is known; labels: a hash of the labels where they are
      known before images are read, else ""; of latents also what they are.
    """
    known: dict[str, Any] = {"images": len(source), "class_names": list(source.class_names)}
    if source.latents is not None:
        known["latents"] = dataclasses.asdict(source.latents)
    return known | {"contents": "", "labels": ""} | source.hashes


def _with_labels(source: Source, labels: np.ndarray | None) -> Source:
    """The source with labels that are known ahead, or with none."""
    if labels is None:
        return dataclasses.replace(source, num_classes=len(source.class_names))
    found = normal(source.name, labels, len(source), source.class_names)
    return dataclasses.replace(
        source,
        num_classes=found.classes,
        labels=found.values,
        label_size=found.classes if found.values.ndim == 2 else 0,
        hashes=source.hashes | {"labels": identity.of_array(found.values)},
        notes=source.notes + found.notes,
    )


def by_threads(work: Callable[[int], Any], numbers: range) -> Iterator[Any]:
    """work(i) for each number in order, by eight threads: decoding leaves Python's lock. Parts of
    the numbers keep the queue of pending work short.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for at in range(0, len(numbers), 1024):
            yield from pool.map(work, numbers[at : at + 1024])


def _in_memory(source: Source) -> Source:
    """The same source with all its images read, by eight threads."""
    images = np.empty((len(source), *source.item_shape), source.dtype)
    read_labels = np.full(len(source), -1, np.int32)

    def load(start: int) -> None:
        rows = np.arange(start, min(start + 128, len(source)))
        part = source.take(rows)
        images[rows] = part["image"]
        if source.labels is None:
            read_labels[rows] = part["label"]

    count = -(-len(source) // 128)
    loaded = by_threads(load, range(0, len(source), 128))
    for _ in tqdm(loaded, source.name, count, unit="block", leave=False, disable=None):
        pass
    source = dataclasses.replace(source, images=images, reader=None)
    if source.labels is None and (source.class_names or np.any(read_labels >= 0)):
        known = source.hashes
        source = dataclasses.replace(_with_labels(source, read_labels), hashes=known)
    return source


_RECIPES = (
    ("fractions from 0 to 1", 0, 1, True, "np.rint(x * 255)"),
    ("fractions from -1 to 1", -1.05, 1.05, True, "np.rint((x + 1) * 127.5)"),
    ("numbers from 0 to 255", 0, 255, False, "np.rint(x)"),
    ("numbers from 0 to 65535", 0, 65535, False, "((x.astype(int) + 128) // 257)"),
)


def _check_array(name: str, images: np.ndarray) -> None:
    """SourceError for what is no uint8 [N,H,W,1 or 3], with what makes it one."""
    expected = "expected uint8 with values 0 to 255"
    if images.dtype.kind in "biuf" and images.dtype != np.uint8:
        low, high = (float(f(images)) for f in (np.min, np.max)) if images.size else (0.0, 0.0)
        fractions = images.dtype.kind in "bf"
        what, recipe = f"numbers from {low:g} to {high:g}", ""
        for words, least, most, fraction, how in _RECIPES:
            if least <= low and high <= most and (fractions or not fraction):
                what, recipe = words, f": save {how}.astype(np.uint8)"
                break
        raise SourceError(
            f"{name}: images have type {images.dtype}; {expected} ({what} are in it{recipe})"
        )
    if images.dtype != np.uint8:
        raise SourceError(f"{name}: images have type {images.dtype}; {expected}")
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        hint = ""
        if images.ndim == 4 and images.shape[1] in (1, 3):
            hint = " (channels first: save np.moveaxis(x, 1, -1))"
        elif images.ndim == 4 and images.shape[-1] == 4:
            hint = " (with transparency: lay it on a ground first, or save PNG files)"
        elif images.ndim == 3:
            hint = " (one image: save x[None])"
        raise SourceError(
            f"{name}: images have shape {images.shape}; expected [N,H,W,C] with C = 1 or 3{hint}"
        )
    if 0 in images.shape:
        raise SourceError(f"{name}: holds no images; expected at least one")


def _with_channels(image: np.ndarray, channels: int | None, where: str) -> np.ndarray:
    try:
        return with_channels(image, channels)
    except PictureError as error:
        raise SourceError(f"{where}: {error}") from None
