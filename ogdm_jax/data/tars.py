"""Webdataset's shards: plain tar archives whose members KEY.jpg, KEY.txt, KEY.cls, KEY.json are an
image, its text, its class, and what else is known of it. They are read where they lie.
"""

import functools
import glob
import json
import operator
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from ogdm_jax.data import files, identity, listing
from ogdm_jax.data.base import Stored
from ogdm_jax.data.labels import SourceError, plain
from ogdm_jax.data.pictures import HEAD, check_size, what_is

_TEXT = 1 << 20  # bytes of a text, a class or a JSON: longer ones are mistakes
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
# {name: (number of its shard, first byte, number of bytes)} of members
_Places = dict[str, tuple[int, int, int]]


class TarReader(files.FolderReader):
    """Members of shards, by the bytes at which they lie.

    Args:
      source, root, captions: as of a folder.
      shards: the archives, below root; the names of images begin with them.
      *members: the images and their texts.
    """

    def __init__(
        self, source: str, root: str, captions: str, shards: list[str], *members: _Places
    ) -> None:
        super().__init__(source, root, list(members[0]), captions)
        places = [np.array(list(one.values()), np.int64).reshape(-1, 3) for one in members]
        self.shards, (self.images, self.texts) = shards, places

    def beside(self, name: str) -> str:
        """The member that holds an image's caption."""
        return of_key(name, self.captions)

    def contents(self) -> str:
        """A hash of the members' names and sizes."""
        return identity.of_names(self.names, np.append(self.images[:, 2], self.texts[:, 2]))

    def content(self, i: int) -> bytes:
        """The bytes of image i."""
        return self.member(self.images[i])

    def text(self, i: int) -> bytes | str:
        """What the caption's member holds: all of it, or a field of its JSON."""
        found, (first, *fields) = self.member(self.texts[i], _TEXT), self.captions.split("/")
        if first != "json":
            return found
        with suppress(ValueError, LookupError, TypeError):
            value = functools.reduce(operator.getitem, fields, json.loads(found))
            if isinstance(value, str):
                return value
        raise ValueError("is no text")

    def member(self, at: np.ndarray, most: int = 0) -> bytes:
        """The bytes at a place, see `_read`."""
        shard, *place = at.tolist()
        return _read(os.path.join(self.root, self.shards[shard]), *place, most=most)


def _read(shard: str, start: int, size: int, most: int = 0) -> bytes:
    """Bytes of an archive. ValueError, "is ...", where they are more than most or not there."""
    if most and size > most:
        raise ValueError(f"is of {size} bytes")
    with open(shard, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), min(size, HEAD), start)
        check_size(data, size)
        data += os.pread(file.fileno(), max(size - HEAD, 0), start + HEAD)
    if len(data) < size:
        raise ValueError("is cut short")
    return data


def of_key(name: str, ending: str) -> str:
    """The member of an image's key, its name up to the first dot, with another ending."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}.{ending}"


def open_tar(source: str, path: str) -> Stored:
    """The images of local shards: one .tar, those of train-{0000..0127}.tar or train-*.tar, or all
    of a folder, sorted by their names.

    The number in KEY.cls is the class of KEY.jpg; folders within an archive are none. With
    "?caption=txt" behind the path each image has the text of KEY.txt instead, with
    "?caption=json/FIELD" that of a field of KEY.json.

    Raises:
      SourceError: no shard or no images, an image without the caption or class that others have or
        two of one key, a member that is no plain file inside, an archive that is not plain or
        damaged.
    """
    path, ending = files.split_caption(path)
    shards = _shards(source, path)
    root = os.path.commonpath([os.path.dirname(shard) for shard in shards])
    below, members = [os.path.relpath(shard, root) for shard in shards], _Places()
    for k, shard in enumerate(shards):
        for name, start, size in _members(source, shard):
            place = k, start, size
            if members.setdefault(f"{below[k]}/{name}", place) is not place:
                raise SourceError(f"{source}: {shard} has two members {name}; expected one")

    def head(name: str) -> bytes:
        shard, start, size = members[name]
        return _read(shards[shard], start, min(size, 64))

    first = ending.partition("/")[0] or "cls"
    texts = {name for name in members if name.endswith(f".{first}")}
    names, notes = listing.pictures([name for name in members if name not in texts], head)
    if not names:
        files.nothing(source, "KEY.jpg, and KEY.txt or KEY.cls beside it,", notes)
    wanted = [of_key(name, first) for name in names]
    last = dict(zip(wanted, names))
    if two := [name for name, key in zip(names, wanted) if last[key] is not name]:
        raise SourceError(f"{source}: {two[0]} is one of two pictures of a key; expected one")
    beside = wanted if texts or ending else []
    notes += files.check_beside(source, names, texts, beside, "caption" if ending else "label")
    notes += [] if beside else ["has no KEY.cls: no classes"]
    places = [{name: members[name] for name in some} for some in (names, beside)]
    reader = TarReader(source, root, ending, below, *places)
    found = _classes(reader, beside) if beside and not ending else None
    return Stored(reader, found, notes=tuple(notes))


def _shards(source: str, path: str) -> list[str]:
    """The archives that a pattern names. SourceError where a name of it is none."""
    if found := _RANGE.search(path):
        low, high = found.groups()
        numbers = [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
        names = [f"{path[: found.start()]}{n}{path[found.end() :]}" for n in numbers]
        shards = [shard for name in names for shard in _shards(source, name)]
    else:
        pattern = os.path.join(glob.escape(path), "*.tar") if os.path.isdir(path) else path
        shards = sorted(glob.glob(pattern)) if "*" in pattern else [path] * os.path.isfile(path)
    if not shards:
        raise SourceError(
            f"{source}: there is no file {path}; expected shards, as FILE.tar, "
            "train-{0000..0127}.tar, train-*.tar or a folder of them"
        )
    return shards


def _members(source: str, shard: str) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, number of bytes) of the files in an archive.

    Raises:
      SourceError: a link, a device, a path out of the archive; compressed, cut short or damaged.
    """
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = plain(member.name)
                inside = name == member.name.removeprefix("./") and member.size >= 0
                if inside and member.isreg() and not member.issparse():
                    yield name, member.offset_data, member.size
                elif not member.isdir():
                    raise SourceError(
                        f"{source}: {shard} holds {member.name!r}, a link, a special file or a "
                        "path out of it; expected plain files"
                    )
            file.seek(archive.offset)  # where tarfile took something for the end
            rest = file.read(_TEXT)
            if len(rest) < tarfile.BLOCKSIZE or any(rest):
                raise ValueError(f"no member and no end at byte {archive.offset}")
    except SourceError:
        raise
    except (*files.UNREADABLE, tarfile.TarError) as error:
        with suppress(OSError), open(shard, "rb") as file:
            error = what_is(file.read(64)) or error
        raise SourceError(
            f"{source}: {shard} is no plain tar archive, or cut short or damaged ({error}); "
            "expected .tar, not compressed"
        ) from None


def _classes(reader: TarReader, names: list[str]) -> np.ndarray:
    """The numbers in the members `names`. SourceError for what is none."""
    numbers = []
    for i, name in enumerate(names):
        try:
            numbers.append(int(reader.member(reader.texts[i], 32)))
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{reader.source}: {name} holds no class ({error}); expected a number, such as 7"
            ) from None
    return np.array(numbers)
