"""Sets of latents: a folder of an autoencoder's moments or samples, and latents.json, which says
what the numbers are.

`ogdm data encode` (encode.py) writes array_record files of float16 (mean, std). Latents that other
programs wrote are read, too, from .npz or .npy files, where a person states in latents.json what no
file shows; nothing of it is guessed.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ogdm_jax import records
from ogdm_jax.data import identity
from ogdm_jax.data.arrays import DAMAGED
from ogdm_jax.data.labels import SourceError
from ogdm_jax.latents import Latents, from_json

SIDECAR = "latents.json"
STORED = ("samples", "mean, std", "mean, logvar")
_STATED = {  # what other people's files need: {field: the values it may have, in words}
    "layout": "chw or hwc",
    "stored": "samples, or 'mean, std', or 'mean, logvar'",
    "scaled": "true where the numbers are multiplied by scale already, else false",
    "scale": "the autoencoder's factor, such as 0.18215",
}
_MORE = (  # what they may say beside it
    ("shift", (int, float), "a number"),
    ("vae", dict, '{"path": FILE} of the autoencoder'),
    ("pixels", dict, '{"name": SOURCE} of the images'),
)
_LOG_VARIANCE = (-30.0, 20.0)  # as networks.vae.posterior


class LatentReader:
    """What the readers of latents share."""

    def __init__(self, source: str, latents: Latents, mark: str) -> None:
        self.source, self.latents, self._mark = source, latents, mark

    def where(self, i: int) -> str:
        """Words that name item i in a message."""
        return f"latent {i}"

    def contents(self) -> str:
        """A hash of what latents.json says, and of the names and sizes of the files."""
        return self._mark

    def _checked(self, item: np.ndarray, i: int) -> np.ndarray:
        if item.shape != self.latents.item_shape:
            raise SourceError(
                f"{self.source}: {self.where(i)} has shape {item.shape}; expected "
                f"{self.latents.item_shape} (views, height, width, channels)"
            )
        if not np.isfinite(item).all():
            raise SourceError(
                f"{self.source}: {self.where(i)} holds NaN or infinity; encode the set again"
            )
        return item


class RecordReader(LatentReader):
    """What `ogdm data encode` wrote: a record is the bytes of an item."""

    def __init__(self, source: str, latents: Latents, mark: str, files: Sequence[Path]) -> None:
        # only here: images in files or in memory need none of it
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        super().__init__(source, latents, mark)
        self._items = ArrayRecordDataSource([str(file) for file in files])

    def __len__(self) -> int:
        return len(self._items)

    def read(self, i: int) -> tuple[np.ndarray, None]:
        """(item [views,h,w,2C], None): labels are known ahead."""
        return next(self.read_many([i]))

    def read_many(self, rows: Sequence[int]) -> Iterator[tuple[np.ndarray, None]]:
        """What `read` returns for each of rows."""
        shape, dtype = self.latents.item_shape, self.latents.dtype
        try:
            read = [
                np.frombuffer(one, dtype).reshape(shape) for one in self._items.__getitems__(rows)
            ]
        except Exception as error:  # a damaged file ends in many types of errors
            raise SourceError(
                f"{self.source}: latents {rows[0]} to {rows[-1]} cannot be read "
                f"({type(error).__name__}); encode the set again"
            ) from error
        for row, item in zip(rows, read, strict=True):
            yield self._checked(item, row), None


class FileReader(LatentReader):
    """Latents of other programs: one .npz or .npy of all, or one file for each image."""

    def __init__(
        self,
        source: str,
        latents: Latents,
        mark: str,
        files: Sequence[Path],
        about: dict[str, Any],
        whole: np.ndarray | None,
    ) -> None:
        """whole: the latents of the one file; None where each has a file of its own."""
        super().__init__(source, latents, mark)
        self._files, self._about, self._all = list(files), about, whole

    def __getstate__(self) -> dict[str, Any]:
        """What a reading process gets: not the numbers, which it reads from the file itself."""
        return self.__dict__ | {"_all": None, "_is_whole": self._all is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        whole = state.pop("_is_whole")
        self.__dict__.update(state)
        if whole:
            self._all = load(self.source, self._files[0], self._about)[0]

    def __len__(self) -> int:
        return len(self._files) if self._all is None else len(self._all)

    def where(self, i: int) -> str:
        """The number in the one file, or the file."""
        return f"latent {i}" if self._all is not None else str(self._files[i].name)

    def read(self, i: int) -> tuple[np.ndarray, int | None]:
        """(item [views,h,w,C or 2C], its label where its own file has one)."""
        label = None
        if self._all is not None:
            item = self._all[i]
        else:
            found, label = load(self.source, self._files[i], self._about)
            if found.ndim not in (3, 4) or found.size != np.prod(found.shape[-3:]):
                raise SourceError(
                    f"{self.source}: {self.where(i)} holds {found.shape}; expected one latent of "
                    "three sides, as there are several files"
                )
            item = found.reshape(found.shape[-3:])
        return self._checked(_as_item(item, self._about), i), None if label is None else int(label)


def load(source: str, file: Path, about: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """(array, labels or None) of a .npz or .npy file."""
    name = about.get("array", "samples")
    try:
        found = np.load(file, mmap_mode="r" if file.suffix == ".npy" else None)
        if isinstance(found, np.ndarray):
            return found, None
        with found as archive:
            arrays = {key: archive[key] for key in archive.files if key in (name, "label")}
            listed = ", ".join(archive.files)
    except DAMAGED as error:
        raise _unreadable(source, file, error) from None
    if name not in arrays:
        raise SourceError(
            f"{source}: {file.name} has {listed}, no {name!r}; expected its name as "
            f'"array" in {SIDECAR}'
        )
    labels = arrays.get("label")
    return arrays[name], None if labels is None else np.asarray(labels).squeeze()[()]


def _labels(source: str, file: Path) -> np.ndarray:
    try:
        return np.load(file)
    except DAMAGED as error:
        raise _unreadable(source, file, error) from None


def _unreadable(source: str, file: Path, error: Exception) -> SourceError:
    what = f"{file.name} cannot be read ({type(error).__name__})"
    return SourceError(f"{source}: {what}; replace or remove it")


def _as_item(item: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """[1,h,w,C or 2C] float32 of one image, with a standard deviation for a logarithm."""
    item = np.asarray(item, np.float32)
    item = np.moveaxis(item, 0, -1) if about["layout"] == "chw" else item
    if about["stored"] == "mean, logvar":
        mean, log = np.split(item, 2, axis=-1)
        item = np.concatenate([mean, np.exp(np.clip(log, *_LOG_VARIANCE) / 2)], axis=-1)
    return item[None]


def read_folder(
    source: str, folder: Path
) -> tuple[RecordReader | FileReader, np.ndarray | None, dict[str, Any]]:
    """(reader, labels or None, what latents.json says) of a folder.

    Raises:
      SourceError: no such folder or statement, or one that the files contradict.
    """
    about = _about(source, folder)
    records_ = sorted(folder.glob("*.array_record"))
    files = records_ or sorted(
        (file for kind in ("*.npz", "*.npy") for file in folder.rglob(kind)), key=_natural
    )
    files = [file for file in files if records_ or not file.name.startswith("labels")]
    if not files:
        raise SourceError(f"{source}: holds no .array_record, .npz or .npy files")
    sizes = [file.stat().st_size for file in files]
    mark = identity.of_names([records.dumps(about), *(file.name for file in files)], [0, *sizes])
    if records_:
        parts = [_labels(source, file) for file in sorted(folder.glob("labels-*.npy"))]
        known = any(part.dtype.kind != "i" or part.max() >= 0 for part in parts)
        reader = RecordReader(source, from_json(about), mark, files)
        return reader, np.concatenate(parts) if known else None, about
    first, labels = load(source, files[0], about)
    if len(files) == 1 and first.ndim != 4 or first.ndim not in (3, 4):
        raise SourceError(
            f"{source}: {files[0].name} holds {first.shape}; expected latents [n, ...] of three "
            "sides each, or one in each of several files"
        )
    sides = _as_item(first.reshape(-1, *first.shape[-3:])[0], about).shape[1:]
    moments = about["stored"] != "samples"
    if moments and sides[-1] % 2:
        raise SourceError(f"{source}: {sides[-1]} channels; expected an even number of {STORED[1]}")
    told = {"shape": (*sides[:2], sides[2] // (1 + moments)), "views": 1, "dtype": "float32"}
    latents = from_json(about | told | {"moments": moments})
    whole = first if len(files) == 1 else None
    reader = FileReader(source, latents, mark, files, about, whole)
    if (alone := folder / "labels.npy").is_file():
        return reader, _labels(source, alone), about
    return reader, labels if len(files) == 1 else None, about


def read_captions(source: str, folder: Path) -> list[str]:
    """The texts of captions*.json, each a list, in the order of their names; [] without any.

    Raises:
      SourceError: they are no lists of texts, or some is empty.
    """
    found: list[str] = []
    for file in sorted(folder.glob("captions*.json")):
        part = records.read(file, list, source)
        bad = next((i for i, one in enumerate(part) if not (isinstance(one, str) and one)), None)
        if bad is not None:
            raise SourceError(
                f"{source}: {file.name} has {part[bad]!r} at {bad}; expected a text for each latent"
            )
        found += part
    return found


def _about(source: str, folder: Path) -> dict[str, Any]:
    """What latents.json says, checked."""
    if not folder.is_dir():
        raise SourceError(f"{source}: is no folder; expected what ogdm data encode --out wrote")
    if not (folder / SIDECAR).is_file():
        example = records.dumps(
            {"layout": "chw", "stored": "samples", "scaled": True, "scale": 0.18215}
        )
        raise SourceError(
            f"{source}: holds no {SIDECAR}, which says what its numbers are; where ogdm data "
            f"encode did not write them, state it in a file such as {example} (stored: one of "
            f"{STORED})"
        )
    about = records.read(folder / SIDECAR, dict, source)
    for name, words in _STATED.items():
        value, good = about.get(name), True
        if name == "scale":
            good = isinstance(value, int | float) and value > 0 and value == value
        elif name == "scaled":
            good = isinstance(value, bool)
        else:
            good = value in (STORED if name == "stored" else ("chw", "hwc"))
        if not good or isinstance(value, bool) != (name == "scaled"):
            raise SourceError(f"{source}: {SIDECAR} has {name} {value!r}; expected {words}")
    for name, kind, words in _MORE:
        if name in about and not isinstance(about[name], kind):
            raise SourceError(f"{source}: {SIDECAR} has {name} {about[name]!r}; expected {words}")
    return about


def _natural(file: Path) -> list[tuple[int, Any]]:
    """Files in the order of the numbers in their names."""
    parts = re.split(r"(\d+)", str(file))
    return [(1, int(part)) if part.isdigit() else (0, part) for part in parts]
