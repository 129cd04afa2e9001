"""Samples on their way to disk: what was drawn is there whatever happens next.

A folder gets img{seed:08d}.png of each batch at once; FILE.npz and FILE.png are joined of the parts
in FILE.parts, one for each batch, when all are drawn. Beside the output, OUT.json says what was
asked for and which seeds gave no finite image: the same request goes on, another one is refused,
and nothing that was there before is replaced. No more than one batch is in memory, but for a grid.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath

from ogdm_jax import places, records, startup
from ogdm_jax.data import npz, pictures
from ogdm_jax.data.arrays import DAMAGED
from ogdm_jax.pixels import to_uint8

MOST_IN_GRID = 4096


class OutputError(ValueError):
    """Images cannot be written; the message is one sentence that names the place."""


def check_output(out: str, num: int) -> epath.Path:
    """The path, if `num` images could go there: FILE.png (a grid), FILE.npz, or a folder.

    Raises:
      ValueError: another file type, too many images for a grid, or a place that cannot be written.
    """
    path = places.place(out, "--out")
    if not out or path.suffix not in ("", ".png", ".npz"):
        raise OutputError(
            f"--out: {out!r} given; expected FILE.png (a grid), FILE.npz, or a folder for PNG files"
        )
    if path.suffix and path.is_dir() or not path.suffix and path.is_file():
        raise OutputError(
            f"--out: {out!r} is there already and is no such file or folder; expected another name"
        )
    if path.suffix == ".png" and num > MOST_IN_GRID:
        raise OutputError(
            f"--out: {out!r} given for {num:,} images; expected FILE.npz or a folder, a grid holds "
            f"at most {MOST_IN_GRID:,}"
        )
    return places.writable(path, "--out", file=bool(path.suffix))


class Output:
    """Images of one request, on disk as soon as they are drawn.

    Attributes:
      path: of the output.
      seeds: [n] of the request.
      done: [n] whether an image is on disk, or known to be not finite.
      bad: all seeds, of a folder also others', whose images are not finite: they are listed and
        never written.
    """

    def __init__(
        self,
        path: epath.Path,
        settings: Mapping[str, Any],
        seeds: np.ndarray,
        floats: bool = False,
        field: str = "--out",
        overwrite: bool = False,
        remedy: str = "another name, or --overwrite",
        readable: bool = True,
    ) -> None:
        """Reads and writes nothing yet; see `opened`.

        Args:
          path: FILE.npz, FILE.png or a folder.
          settings: of what the images are: {name for messages: value}.
          seeds: [n] of the images.
          floats: keep floats in parts; the caller writes the output, whatever its kind.
          field: the setting that named the path, for messages.
          overwrite: remove images that were drawn with other settings.
          remedy: what else than the same settings would do.
          readable: whether FILE.npz will be that of `columns`: finished, its images are read again.
        """
        self.path, self.seeds, self.done = path, np.asarray(seeds), np.zeros(len(seeds), bool)
        self.bad: set[int] = set()
        self._floats, self._field, self._overwrite = floats, field, overwrite
        self._remedy, self._finished, self._readable = remedy, False, readable
        self._pngs = not path.suffix and not floats
        self._record = path.with_name(f"{path.name}.json")
        self._parts = path.with_name(f"{path.name}.parts")
        self.folder = path if self._pngs else self._parts
        settings = dict(settings) | ({} if self._pngs else {"--seeds": spell(self.seeds)})
        self._settings = json.loads(records.dumps(settings))  # as a record gives them back

    @contextmanager
    def opened(self) -> Iterator["Output"]:
        """This output, which no other process writes meanwhile.

        Raises:
          OutputError: something else is there, images of another request, or another process.
        """
        self.look()
        made = places.make(self.folder)
        try:
            with places.held(self.folder) as alone:
                if not alone:
                    raise OutputError(
                        f"{self._field}: another process is writing to '{self.folder}'; expected "
                        "another name, or to wait until it has ended"
                    )
                self.resume()
                try:
                    yield self
                finally:
                    self.clear()
        finally:
            places.unmake(made)

    def look(self) -> dict[str, Any]:
        """The record of what is there, {} if nothing is.

        Raises:
          OutputError: something else is, or images of another request that are to stay.
        """
        record: dict[str, Any] = {}
        if self._record.exists():
            record = records.read(self._record, dict, self._field)
            if not isinstance(record.get("drawn_with"), dict):
                raise OutputError(
                    f"{self._field}: '{self._record}' is there already, which would say how "
                    f"'{self.path}' was drawn; expected another name"
                )
        there = [path for path in (self.path, self._parts) if _holds_something(path)]
        if there and not record:
            raise OutputError(
                f"{self._field}: '{there[0]}' is there already, and no '{self._record.name}' "
                "beside it says how it was drawn; expected another name, or an empty folder"
            )
        if not there:
            return {}
        differs = difference(record["drawn_with"], self._settings)
        if differs and not self._overwrite:
            raise OutputError(
                f"{self._field}: '{self.path}' was drawn with {differs}; expected the same, or "
                f"{self._remedy}"
            )
        return record

    def resume(self) -> None:
        """Finds out what is done, and writes down what is asked for before any image is.

        Images of another request are removed if they may be; a file stays until the new one is
        there. Raises OutputError as `look`, or where other seeds' images would be removed.
        """
        record = self.look()
        if record and record["drawn_with"] != self._settings:
            if others := set(self._pictures().values()) - set(map(int, self.seeds)):
                raise OutputError(
                    f"{self._field}: '{self.path}' holds {len(others):,} images of other seeds, "
                    "which --overwrite would remove; expected another folder"
                )
            for *_, file in self._part_files():
                file.unlink()
            for name in self._pictures():
                (self.path / name).unlink()
            record = {}
        if not record:
            self._note()
        self.bad = {int(seed) for seed in record.get("not_finite", [])}
        self._finished = record.get("finished") is True and self.path.exists()
        self.done = self._found()

    def add(self, start: int, images: np.ndarray) -> None:
        """Writes float images [b,h,w,c] of the seeds from number `start` on.

        Raises:
          OutputError: they cannot be written; says how many others are safe.
        """
        stop = start + len(images)
        finite = np.asarray(np.isfinite(images).reshape(len(images), -1).all(axis=1))
        seeds = self.seeds[start:stop]
        try:
            self._still_there()
            if not finite.all():
                self.bad |= {int(seed) for seed in seeds[~finite]}
                self._note()
            kept = images
            if not self._floats:
                kept = to_uint8(np.where(finite[:, None, None, None], images, 0))
            if self._pngs:
                for seed, image in zip(seeds[finite], kept[finite], strict=True):
                    with places.written(self._picture(seed)) as new:
                        new.write_bytes(pictures.encode(image))
            else:
                with places.written(self._parts / f"{start:010d}-{stop:010d}.npy") as new:
                    np.save(new, kept)
        except OSError as error:
            raise OutputError(
                f"{self._field}: {startup.sentence_of(error)}; {self.safe()}"
            ) from None
        self.done[start:stop] = True

    @property
    def where(self) -> epath.Path:
        """Where the images are that are done."""
        return self.path if self._whole else self.folder

    def safe(self) -> str:
        """How many images are on disk, and what to do."""
        return (
            f"{self.done.sum():,} of {len(self.done):,} images are safe in '{self.where}', and "
            "the same command goes on with the rest"
        )

    def images(self) -> Iterator[np.ndarray]:
        """The finite images in the order of the seeds, some at a time, as they were kept."""
        good = self.good
        if self._pngs:
            seeds = self.seeds[good]
            for start in range(0, len(seeds), 256):
                part = seeds[start : start + 256]
                yield np.stack([pictures.read(self._picture(seed)) for seed in part])
            return
        if self._whole:
            yield from npz.read(self.path, "images")
            return
        at = 0
        for start, stop, file in self._part_files():
            if stop <= at:  # drawn again with another --batch
                continue
            with file.open("rb") as opened:
                part = np.load(opened)
            rows = np.arange(max(start, at), stop)
            at = stop
            yield part[rows - start][good[rows]]

    def finish(self, write: Callable[[epath.Path], None]) -> None:
        """Lets `write` make the output of `images`, unless it is there.

        Raises:
          OutputError: images vanished meanwhile, none is finite, or the output cannot be written.
        """
        self.done = self._found()
        if not self.done.all():
            raise OutputError(
                f"{self._field}: {(~self.done).sum():,} images vanished from '{self.folder}' while "
                f"others were drawn; {self.safe()}"
            )
        if not self.good.any():
            raise OutputError(
                f"{self._field}: none of {len(self.seeds):,} images is finite, so nothing is "
                "written; expected other settings of the sampler or another --step"
            )
        try:
            if not self._finished:
                write(self.path)
            self._finished = True
            self._note()
        except OSError as error:
            raise OutputError(
                f"{self._field}: {startup.sentence_of(error)}; {self.safe()}"
            ) from None

    def clear(self, record: bool = False) -> None:
        """Removes the parts of a finished output (and its record), and the record of no image."""
        nothing = not self.done.any() and not _holds_something(self.path)
        if self._finished and self._parts.exists():
            self._parts.rmtree()
        if nothing or self._finished and record:
            self._record.unlink(missing_ok=True)

    def columns(self) -> dict[str, npz.Column]:
        """The npz of these images: "images", "seeds", and "not_finite" if there are any."""
        good = self.good
        first = next(iter(self.images()))
        pieces = {"images": ((int(good.sum()), *first.shape[1:]), first.dtype, self.images())}
        arrays = {"seeds": self.seeds[good]}
        if not good.all():
            arrays["not_finite"] = self.not_finite
        return pieces | {name: npz.column(array) for name, array in arrays.items()}

    @property
    def _whole(self) -> bool:
        """Whether a finished npz is there, from which images can be read again."""
        return self._finished and self.path.suffix == ".npz" and self._readable

    @property
    def good(self) -> np.ndarray:
        """[n] whether an image is finite."""
        return ~np.isin(self.seeds, list(self.bad))

    @property
    def not_finite(self) -> np.ndarray:
        """Those of the seeds whose images are not finite."""
        return self.seeds[~self.good]

    def uint8(self) -> Iterator[np.ndarray]:
        """`images` as pictures hold them."""
        return map(to_uint8, self.images())

    def missing(self) -> str:
        """Which images are not finite."""
        seeds = self.not_finite
        first = spell(seeds[:20]) + (", ..." if len(seeds) > 20 else "")
        return (
            f"{self._field}: {len(seeds):,} of {len(self.seeds):,} images are not finite and were "
            f"left out of '{self.path}'; their seeds are {first} (all of them are in "
            f"'{self._record}'); expected another --step, or settings that do not diverge"
        )

    def _pictures(self) -> dict[str, int]:
        """{name: seed} of the pictures that are in a folder."""
        names = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
        found = {name: re.fullmatch(r"img(\d{8,})\.png", name) for name in names}
        return {name: int(match[1]) for name, match in found.items() if match}

    def _picture(self, seed: int) -> epath.Path:
        return self.path / f"img{seed:08d}.png"

    def _note(self) -> None:
        record = {
            "drawn_with": self._settings,
            "not_finite": sorted(self.bad),
            "finished": self._finished,
        }
        records.write(self._record, record, indent=1)

    def _still_there(self) -> None:
        gone = not self._record.exists() or (
            places.is_local(self.folder) and not self.folder.is_dir()
        )
        if gone:
            self.done[:] = False
            raise OutputError(
                f"{self._field}: '{self.folder}' vanished while images were drawn; expected it to "
                "stay: the same command begins again"
            )

    def _part_files(self) -> list[tuple[int, int, epath.Path]]:
        """(start, stop, file) of the parts, in order."""
        if not self._parts.exists():
            return []
        found = [(re.fullmatch(r"(\d+)-(\d+)\.npy", p.name), p) for p in self._parts.iterdir()]
        return sorted((int(m[1]), int(m[2]), path) for m, path in found if m)

    def _found(self) -> np.ndarray:
        """[n] whether an image is on disk; parts that cannot be read are removed."""
        if self._whole:
            return np.ones(len(self.seeds), bool)
        done = np.zeros(len(self.seeds), bool)
        if self._pngs:
            drawn = list(self._pictures().values())
            return np.isin(self.seeds, np.array([*drawn, *self.bad], np.int64))
        for start, stop, file in self._part_files():
            try:
                with file.open("rb") as opened:
                    shape, dtype = npz.header(opened)
                    size = opened.tell() + int(np.prod(shape)) * dtype.itemsize
                whole = shape[:1] == (stop - start,) and file.stat().length == size
            except OSError:
                raise
            except DAMAGED:
                whole = False
            if whole:
                done[start:stop] = True
            else:  # a power cut, a flipped bit
                file.unlink()
        return done


def _holds_something(path: epath.Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting of two records that differs, with both values; "" where none does."""
    for name in {**before, **now}:
        was, given = before.get(name), now.get(name)
        if was != given:
            return f"{name} {short(was)}, now it is {short(given)}"
    return ""


def short(value: Any) -> str:
    """A value for a message; of a digest the first digits."""
    return value[:12] if isinstance(value, str) and len(value) > 40 else repr(value)


def spell(seeds: np.ndarray) -> str:
    """[0, 1, 2, 7] -> "0-2,7"."""
    seeds = np.asarray(seeds, np.int64)
    runs = np.split(seeds, np.flatnonzero(np.diff(seeds) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
