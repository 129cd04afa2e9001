"""Image files: folders (sub-folders are classes) and EDM's zip archives."""

import concurrent.futures
import os
import re
import struct
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np

from ogdm_jax.data import identity, labels, listing
from ogdm_jax.data.base import Stored
from ogdm_jax.data.labels import SourceError
from ogdm_jax.data.pictures import HEAD, LARGE, PictureError, check_size, decode, what_is
from ogdm_jax.places import files_below, is_local, local, place

# What reading a file or a zip member raises.
UNREADABLE = (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile)
UNREADABLE += (NotImplementedError, RuntimeError, struct.error, MemoryError, OverflowError)
# The header of a zip member ends with the lengths of its name and of its extra field.
_HEADER = struct.Struct("<26xHH")
_UNUSUAL = 0x61  # flags of a zip member: encrypted, patched, strongly encrypted
_TABLE = "dataset.json"
_AT_ONCE = 32  # requests to a bucket, each of which takes tens of milliseconds


class FolderReader:
    """Files below a folder, in the order of `names` (paths relative to it).

    captions: the ending of the text files beside the images; "": none are read.
    """

    def __init__(self, source: str, root: str, names: list[str], captions: str = "") -> None:
        self.source, self.root, self.names, self.captions = source, root, names, captions
        self.frames: set[str] = set()  # pictures of several frames, as they are met

    def __len__(self) -> int:
        return len(self.names)

    def where(self, i: int) -> str:
        """The name of image i, for messages."""
        return self.names[i]

    def contents(self) -> str:
        """A hash of the names, and of the sizes of some files: each has to be asked for."""
        some = self.names[:: max(1, len(self) // 256)]
        if self.captions:
            some += [self.beside(name) for name in some]
        root = place(self.root)
        try:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:  # a bucket answers slowly
                sizes = list(pool.map(lambda name: (root / name).stat().length, some))
        except OSError:  # unknown, which equals anything; reading it will name the file
            return ""
        return identity.of_names(self.names, sizes)

    def content(self, i: int) -> bytes:
        """The bytes of file i."""
        if not is_local(self.root):
            return (place(self.root) / self.names[i]).read_bytes()
        with open(os.path.join(self.root, self.names[i]), "rb", buffering=0) as file:
            head = file.read(HEAD)
            size = os.fstat(file.fileno()).st_size
            if size <= len(head):
                return head
            check_size(head, size)
            return head + file.read()

    def beside(self, name: str) -> str:
        """The file of the same stem that holds a picture's caption."""
        return beside(name, self.captions)

    def text(self, i: int) -> bytes | str:
        """The bytes of the caption's file."""
        return (place(self.root) / self.beside(self.names[i])).read_bytes()

    def caption(self, i: int) -> str | None:
        """The caption of image i; None where none are read.

        Raises:
          SourceError: it cannot be read, is no UTF-8, or is empty.
        """
        if not self.captions:
            return None
        try:
            return plain_caption(self.text(i))
        except UNREADABLE as error:
            why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
            name = self.beside(self.names[i])
            raise SourceError(
                f"{self.source}: {self.names[i]} has a caption, {name}, that {why}; replace it, or "
                f"remove both (ogdm data check {self.source} lists every such file)"
            ) from None

    def read(self, i: int) -> tuple[np.ndarray, str | None]:
        """(uint8 [h,w,1 or 3], caption or None): labels are known ahead."""
        facts: dict[str, Any] = {}
        image = self.look(i, facts)
        if facts["frames"]:
            self.frames.add(self.names[i])
        return image, self.caption(i)

    def read_many(self, rows: Sequence[int]) -> Iterator[tuple[np.ndarray, str | None]]:
        """What `read` returns for each of rows; of a bucket many are read at once."""
        if is_local(self.root):
            yield from map(self.read, rows)
        else:
            with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
                yield from pool.map(self.read, rows)

    def remarks(self) -> tuple[str, ...]:
        """What is to be said of the images that were read."""
        if not self.frames:
            return ()
        first = min(self.frames)
        return (f"takes the first of several frames of {len(self.frames)} images ({first} first)",)

    def look(self, i: int, facts: dict[str, Any]) -> np.ndarray:
        """As `read`, without the label; facts takes what `decode` finds."""
        try:
            return decode(self.content(i), facts)
        except (PictureError, *UNREADABLE) as error:
            raise SourceError(
                f"{self.source}: {self.names[i]} {reason(error)}; replace or remove it (ogdm data "
                f"check {self.source} lists every such file)"
            ) from None


class ZipReader(FolderReader):
    """Members of a zip archive at `places`, an index that threads and processes share.

    Args:
      source, root: as of a folder; root is the archive.
      names: of the members, as messages and labels have them.
      stored: their names in the archive.
      places: int64 [N, 5]: where a member's header begins, its stored and its true number of bytes,
        its checksum and its method (-1: one that only zipfile reads: compressed by bzip2 or lzma).
    """

    def __init__(
        self, source: str, root: str, names: list[str], stored: list[str], places: np.ndarray
    ) -> None:
        super().__init__(source, root, names)
        self.stored, self.places, self._lock = stored, places, threading.Lock()
        self._file: Any = None  # a descriptor; of a bucket a file of fsspec
        self._archive: zipfile.ZipFile | None = None

    def __reduce__(self) -> tuple:
        return ZipReader, (self.source, self.root, self.names, self.stored, self.places)

    def contents(self) -> str:
        """A hash of the members' names, sizes and checksums."""
        return identity.of_names(self.names, self.places[:, 2:4])

    def content(self, i: int) -> bytes:
        """A member's bytes. Reading at a place moves no file position, so threads need no turns."""
        start, stored, size, checksum, method = self.places[i].tolist()
        if method < 0 or not (is_local(self.root) or hasattr(self._opened(), "fs")):
            return self._slowly(self.stored[i], size)
        # 512: the name and what else stands between the header and the data.
        length = _HEADER.size + min(stored, HEAD) + 512
        block = self._span(start, length) if start >= 0 else b""
        if block[:4] != b"PK\x03\x04" or len(block) < _HEADER.size:
            raise zipfile.BadZipFile("no member begins where the archive's directory says")
        begin = _HEADER.size + sum(_HEADER.unpack_from(block))
        data = block[begin : begin + stored]
        if len(data) < stored:
            data = self._span(start + begin, stored)
        if method == zipfile.ZIP_DEFLATED:
            if size > LARGE:
                check_size(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, HEAD), size)
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max(size, 1))
        if len(data) != size or zlib.crc32(data) != checksum:
            raise zipfile.BadZipFile("it is cut short or its checksum is wrong")
        return data

    def _span(self, start: int, length: int) -> bytes:
        """So many bytes of the archive from one on, or those that are left of it."""
        file = self._opened()
        if isinstance(file, int):
            left = os.fstat(file).st_size - start
            return os.pread(file, min(length, max(left, 0)), start)
        end = min(start + length, file.size)
        return file.fs.cat_file(file.path, start, end) if start < end else b""

    def _opened(self) -> Any:
        with self._lock:
            if self._file is None and is_local(self.root):
                self._file = os.open(self.root, os.O_RDONLY)
                weakref.finalize(self, os.close, self._file)
            elif self._file is None:
                self._file = place(self.root).open("rb")
                weakref.finalize(self, self._file.close)
            return self._file

    def _slowly(self, name: str, size: int) -> bytes:
        with self._lock:
            if self._archive is None:
                if is_local(self.root):
                    self._archive = zipfile.ZipFile(self.root)
                else:
                    file = place(self.root).open("rb")
                    weakref.finalize(self, file.close)  # zipfile closes only what it opened itself
                    self._archive = zipfile.ZipFile(file)
            with self._archive.open(name) as member:
                head = member.read(HEAD)
                check_size(head, size)
                return head + member.read()


def beside(name: str, ending: str) -> str:
    """The file of the same stem with another ending."""
    return f"{name.rpartition('.')[0]}.{ending}"


def plain_caption(content: bytes | str) -> str:
    """A caption without white space around it. Raises ValueError, "is ...", for what is none."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError:
        raise ValueError("is no UTF-8") from None
    if not text.strip():
        raise ValueError("is empty")
    return text.strip()


def reason(error: Exception) -> str:
    """What follows a file's name where it cannot be read."""
    if isinstance(error, PictureError):
        return str(error)
    words = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
    return f"is no readable image ({words or type(error).__name__})"


def open_file(path: str) -> Stored:
    """A single picture, whatever its name ends in, as the folder that holds only this file."""
    file = place(path)
    return Stored(FolderReader(path, str(file.parent), [file.name]))


def open_folder(source: str, path: str) -> Stored:
    """A folder of images, sorted by path.

    Classes are those of a dataset.json as in EDM's zip where there is one, else the sub-folders.
    With "?caption=txt" behind the path each image has a text in a .txt file of the same stem
    instead; sub-folders are no classes then.

    Raises:
      SourceError: no folder, no images, images without captions that should have some, a bad
        dataset.json, or folders that are no classes.
    """
    path, ending = split_caption(path)
    root, path = place(path), _plain(path)
    if not root.is_dir():
        what = "is a file" if root.exists() else "is not there"
        raise SourceError(
            f"{source}: there is no folder {path} (it {what}); expected a folder of images, one "
            "sub-folder a class"
        )
    if is_local(path):
        files = listing.walk(source, path)
    else:
        files = listing.Files(files_below(root), [], [])

    def head(name: str) -> bytes:
        with suppress(*UNREADABLE), (root / name).open("rb") as file:
            return file.read(64)
        return b""

    texts = {name for name in files.names if ending and name.endswith(f".{ending}")}
    names, notes = listing.pictures([n for n in files.names if n not in texts], head)
    if not names:
        nothing(source, "CLASS/NAME.png or NAME.png", (*files.notes, *notes))
    if ending:
        notes += check_beside(source, names, texts, [beside(name, ending) for name in names])
        return Stored(FolderReader(source, path, names, ending), notes=(*files.notes, *notes))
    tables = [name for name in files.names if name.split("/")[-1] == _TABLE]
    found = _classes(source, names, files.folders, tables, lambda name: (root / name).read_bytes())
    return Stored(
        FolderReader(source, path, names),
        found.labels,
        found.names,
        (*files.notes, *notes, *found.notes),
    )


def split_caption(path: str) -> tuple[str, str]:
    """(path, what stands behind "?caption=" at its end, or "")."""
    found = re.fullmatch(r"(.+)\?caption=([^?]+)", path)
    return (found[1], found[2].removeprefix(".")) if found else (path, "")


def check_beside(
    source: str, names: list[str], texts: set[str], wanted: list[str], what: str = "caption"
) -> list[str]:
    """A note on texts without an image. SourceError for images without the one that is wanted."""
    lost = [pair for pair in zip(names, wanted) if pair[1] not in texts]
    alone = texts - {*wanted}
    if lost:
        raise SourceError(
            f"{source}: {len(lost)} of {len(names)} images have no {what} ({lost[0][0]} first: "
            f"expected {lost[0][1]}); write these files, or take the images away"
        )
    return [f"left out {len(alone)} {what}s without image ({min(alone)} first)"] if alone else []


def open_zip(source: str, path: str) -> Stored:
    """EDM's archive, or that of a folder as `open_folder` reads it.

    Raises:
      SourceError: no file, no zip archive, no images, a bad dataset.json, encrypted or
        contradicting members.
    """
    if not place(path).is_file():
        what = "a folder: open it as folder:" if place(path).is_dir() else "not there"
        raise SourceError(
            f"{source}: there is no file {path} (it is {what}); make one by ogdm data prepare "
            f"folder:DIR --out {path}"
        )
    try:
        with place(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            return _members(source, path, archive)
    except SourceError:
        raise
    except UNREADABLE as error:
        with place(path).open("rb") as file:
            kind = what_is(file.read(64))
        if kind in ("", "a zip archive"):
            kind = f"cut short or damaged: {error or type(error).__name__}"
        raise SourceError(f"{source}: {path} is no readable zip archive ({kind})") from None


def _members(source: str, path: str, archive: zipfile.ZipFile) -> Stored:
    """The pictures of an open archive."""
    members, folders, links, twice = {}, [], 0, 0
    for member in archive.infolist():
        name, folder = labels.plain(member.filename), member.filename.endswith("/")
        if member.external_attr >> 28 == 0o12:
            links += 1
        elif folder and name:
            folders.append(name)
        elif name:
            other = members.setdefault(name, member)
            twice += other is not member
            if (other.CRC, other.file_size) != (member.CRC, member.file_size):
                raise SourceError(
                    f"{source}: {path} has two different members {name}; expected one: pack it "
                    "again"
                )
    locked = next((name for name, member in members.items() if member.flag_bits & 1), None)
    if locked is not None:
        raise SourceError(
            f"{source}: {path} is encrypted ({locked} asks for a password); expected a plain "
            "archive: unpack it and pack it without one"
        )

    def head(name: str) -> bytes:
        with suppress(*UNREADABLE), archive.open(members[name]) as file:
            return file.read(64)
        return b""

    def table(name: str) -> bytes:
        if members[name].file_size > (1 << 20) + (len(names) << 16):
            raise SourceError(
                f"{source}: {name} has {members[name].file_size} bytes for {len(names)} images; "
                "expected a table of labels"
            )
        return archive.read(members[name])

    names, notes = listing.pictures(members, head)
    notes += [f"left out {links} links in the archive"] if links else []
    notes += [f"{twice} members lie twice in the archive: read once"] if twice else []
    if not names:
        nothing(source, "CLASS/NAME.png or 00000/img00000000.png", notes)
    tables = [name for name in members if name.split("/")[-1] == _TABLE]
    found = _classes(source, names, folders, tables, table)
    stored = [members[name].filename for name in names]
    places = np.array([_place(members[name]) for name in names], np.int64)
    reader = ZipReader(source, _plain(path), names, names if stored == names else stored, places)
    return Stored(reader, found.labels, found.names, (*notes, *found.notes))


def nothing(source: str, expected: str, notes: tuple[str, ...] | list[str]) -> NoReturn:
    """Raises the SourceError of a set without images."""
    left = f" ({'; '.join(notes)})" if notes else ""
    raise SourceError(f"{source}: has no images{left}; expected files such as {expected} in it")


def _classes(
    source: str,
    names: list[str],
    folders: list[str],
    tables: list[str],
    read: Callable[[str], bytes],
) -> labels.Classes:
    """What a dataset.json says, at the top or in the one folder that all images lie in; else what
    the folders do.
    """
    tops = [table.removesuffix(_TABLE) for table in sorted(tables, key=len)]
    at = next((top for top in tops if all(name.startswith(top) for name in names)), None)
    ignored = [f"ignores {table}: images lie beside its folder" for table in tables]
    if at is None:
        found = listing.classes(source, names, folders)
        return found._replace(notes=(*found.notes, *ignored))
    try:
        content = read(at + _TABLE)
    except UNREADABLE as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{source}: {at}{_TABLE} cannot be read ({error})") from None
    return labels.of_json(source, content, [name[len(at) :] for name in names])


def _plain(path: str) -> str:
    """A local path without file://, which open() does not know; a URI as it is."""
    return str(local(path)) if is_local(path) else path


def _place(member: zipfile.ZipInfo) -> tuple[int, int, int, int, int]:
    plain = (
        member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        and not member.flag_bits & _UNUSUAL
    )
    method = member.compress_type if plain else -1
    return member.header_offset, member.compress_size, member.file_size, member.CRC, method
