"""Webdataset's shards: plain tar archives whose members KEY.jpg, KEY.txt, KEY.cls, KEY.json are an
image, its text, its class, and what else is known of it. They are read where they lie.
"""

import glob
import itertools
import json
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
from ogdm_jax.places import PlaceError, local

_TEXT = 1 << 20  # bytes of a text, a class or a JSON: longer ones are mistakes
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
_Place = list[int]  # of a member: the number of its shard, its first byte, its number of bytes


class TarReader(files.FolderReader):
    """Members of shards, by the bytes at which they lie.

    Args:
      source, root, captions: as of a folder.
      shards: the archives, below root; the names of images begin with them.
      images, texts: {name: its place} of members.
    """

    def __init__(
        self,
        source: str,
        root: str,
        captions: str,
        shards: list[str],
        images: dict[str, _Place],
        texts: dict[str, _Place],
    ) -> None:
        super().__init__(source, root, list(images), captions)
        self.shards, self.images = shards, np.array(list(images.values()), np.int64)
        self.texts = np.array(list(texts.values()), np.int64).reshape(-1, 3)

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
        found, fields = self.member(self.texts[i], _TEXT), self.captions.split("/")[1:]
        if not fields and self.captions != "json":
            return found
        try:
            whole = json.loads(found)
            for field in fields:
                whole = whole[field]
        except (ValueError, LookupError, TypeError):
            whole = None
        if not isinstance(whole, str):
            raise ValueError("is no text")
        return whole

    def member(self, at: np.ndarray | _Place, most: int = 0) -> bytes:
        """The bytes at a place. ValueError, "is ...", where they are more than most or less."""
        shard, start, size = map(int, at)
        if most and size > most:
            raise ValueError(f"is of {size} bytes")
        with open(os.path.join(self.root, self.shards[shard]), "rb", buffering=0) as file:
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
    """The images of shards: one .tar, those of train-{0000..0127}.tar or train-*.tar, or all of a
    folder, sorted by their names.

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
    below, members = [os.path.relpath(shard, root) for shard in shards], {}
    for k, shard in enumerate(shards):
        for name, start, size in _members(source, shard):
            if members.setdefault(f"{below[k]}/{name}", found := [k, start, size]) is not found:
                raise SourceError(f"{source}: {shard} has two members {name}; expected one")
    look = TarReader(source, root, ending, below, {}, {})

    def head(name: str) -> bytes:
        with suppress(OSError, ValueError):
            shard, start, size = members[name]
            return look.member([shard, start, min(64, size)])
        return b""

    first = ending.partition("/")[0] or "cls"
    texts = {name for name in members if name.endswith(f".{first}")}
    names, notes = listing.pictures([name for name in members if name not in texts], head)
    if not names:
        files.nothing(source, "KEY.jpg, and KEY.txt or KEY.cls beside it,", notes)
    _check_keys(source, names)
    wanted = [of_key(name, first) for name in names] if texts or ending else []
    notes += files.check_beside(source, names, texts, wanted, "caption" if ending else "label")
    places = [{name: members[name] for name in some} for some in (names, wanted)]
    reader = TarReader(source, root, ending, below, *places)
    if ending:
        return Stored(reader, notes=tuple(notes))
    deep = [name for name in names if name.count("/") > 1 + below[members[name][0]].count("/")]
    notes += ["its folders are no classes: those are numbers in KEY.cls"] if deep else []
    return Stored(reader, _classes(reader, wanted) if wanted else None, notes=tuple(notes))


def _shards(source: str, path: str) -> list[str]:
    """The archives that a pattern names. SourceError where a name of it is none."""
    try:
        path = str(local(path, source))
    except PlaceError as error:
        raise SourceError(str(error)) from None
    parts, found = _RANGE.split(path), []
    ranges = [
        [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
        for low, high in zip(parts[1::3], parts[2::3])
    ]
    for chosen in itertools.product(*ranges):
        name = parts[0] + "".join(map("".join, zip(chosen, parts[3::3])))
        name = os.path.join(name, "*.tar") if os.path.isdir(name) else name
        some = sorted(glob.glob(name)) if "*" in name else [name] * os.path.isfile(name)
        if not some:
            raise SourceError(
                f"{source}: there is no file {name}; expected shards, as FILE.tar, "
                "train-{0000..0127}.tar, train-*.tar or a folder of them"
            )
        found += some
    if not found:
        raise SourceError(f"{source}: its range is empty; expected one such as {{0000..0127}}")
    return found


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


def _check_keys(source: str, names: list[str]) -> None:
    """SourceError for two pictures of one key."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(of_key(name, ""), name)) is not name:
            raise SourceError(
                f"{source}: {other} and {name} are two pictures of one key; expected one"
            )


def _classes(reader: TarReader, names: list[str]) -> np.ndarray:
    """The numbers in the members of `reader.texts`. SourceError for what is none."""
    numbers = []
    for name, at in zip(names, reader.texts):
        try:
            numbers.append(int(reader.member(at, 32)))
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{reader.source}: {name} holds no class ({error}); expected a number, such as 7"
            ) from None
    return np.array(numbers)
