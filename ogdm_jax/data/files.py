"""Image files: folders (sub-folders are classes) and EDM's zip archives."""

import json
import os
import struct
import threading
import weakref
import zipfile
import zlib
from pathlib import PurePath

import numpy as np

from ogdm_jax.data import identity
from ogdm_jax.data.base import SourceError, Stored
from ogdm_jax.data.pictures import PictureError, decode
from ogdm_jax.places import files_below, is_local, local, place

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
# What reading a file or a zip member raises.
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile)
_UNREADABLE += (NotImplementedError, RuntimeError)
# The header of a zip member ends with the lengths of its name and of its extra field.
_HEADER = struct.Struct("<26xHH")
_UNUSUAL = 0x61  # flags of a zip member: encrypted, patched, strongly encrypted


class FolderReader:
    """Files below a folder, in the order of `names` (paths relative to it)."""

    def __init__(self, source: str, root: str, names: list[str]) -> None:
        self.source, self.root, self.names = source, root, names

    def __len__(self) -> int:
        return len(self.names)

    def where(self, i: int) -> str:
        """The name of image i, for messages."""
        return self.names[i]

    def contents(self) -> str:
        """A hash of the names, and of the sizes of some files: each has to be asked for."""
        some = range(0, len(self), max(1, len(self) // 256))
        root = place(self.root)
        try:
            sizes = [(root / self.names[i]).stat().length for i in some]
        except OSError:  # reading it will name the file
            sizes = []
        return identity.of_names(self.names, sizes)

    def content(self, i: int) -> bytes:
        """The bytes of file i."""
        if not is_local(self.root):
            return (place(self.root) / self.names[i]).read_bytes()
        with open(os.path.join(self.root, self.names[i]), "rb", buffering=0) as file:
            return file.read()

    def read(self, i: int) -> tuple[np.ndarray, None]:
        """(uint8 [h,w,1 or 3], None): labels are known ahead."""
        try:
            return decode(self.content(i)), None
        except PictureError as error:
            reason = str(error)
        except _UNREADABLE as error:
            reason = f"is no readable image ({type(error).__name__})"
        raise SourceError(f"{self.source}: {self.names[i]} {reason}; replace or remove it")


class ZipReader(FolderReader):
    """Members of a zip archive at `places`, an index that threads and processes share.

    Args:
      source, root, names: as of a folder; root is the archive.
      places: int64 [N, 5]: where a member's header begins, its stored and its true number of bytes,
        its checksum and its method (-1: one that only zipfile reads: encrypted, or compressed by
        bzip2 or lzma).
    """

    def __init__(self, source: str, root: str, names: list[str], places: np.ndarray) -> None:
        super().__init__(source, root, names)
        self.places, self._lock = places, threading.Lock()
        self._file: int | None = None
        self._archive: zipfile.ZipFile | None = None

    def __reduce__(self) -> tuple:
        return ZipReader, (self.source, self.root, self.names, self.places)

    def contents(self) -> str:
        """A hash of the members' names, sizes and checksums."""
        return identity.of_names(self.names, self.places[:, 2:4])

    def content(self, i: int) -> bytes:
        """A member's bytes. Reading at a place moves no file position, so threads need no turns."""
        start, stored, size, checksum, method = self.places[i].tolist()
        if method < 0 or not is_local(self.root):
            return self._slowly(self.names[i])
        file = self._opened()
        # 512: the name and what else stands between the header and the data.
        block = os.pread(file, _HEADER.size + stored + 512, start)
        if block[:4] != b"PK\x03\x04" or len(block) < _HEADER.size:
            raise zipfile.BadZipFile("no member begins where the archive's directory says")
        begin = _HEADER.size + sum(_HEADER.unpack_from(block))
        data = block[begin : begin + stored]
        if len(data) < stored:
            data = os.pread(file, stored, start + begin)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max(size, 1))
        if len(data) != size or zlib.crc32(data) != checksum:
            raise zipfile.BadZipFile("a member is cut short or its checksum is wrong")
        return data

    def _opened(self) -> int:
        with self._lock:
            if self._file is None:
                self._file = os.open(self.root, os.O_RDONLY)
                weakref.finalize(self, os.close, self._file)
            return self._file

    def _slowly(self, name: str) -> bytes:
        with self._lock:
            if self._archive is None:
                if is_local(self.root):
                    self._archive = zipfile.ZipFile(self.root)
                else:
                    file = place(self.root).open("rb")
                    weakref.finalize(self, file.close)  # zipfile closes only what it opened itself
                    self._archive = zipfile.ZipFile(file)
            return self._archive.read(name)


def open_file(path: str) -> Stored:
    """A single picture, whatever its name ends in, as the folder that holds only this file."""
    file = place(path)
    return Stored(FolderReader(path, str(file.parent), [file.name]))


def open_folder(source: str, path: str) -> Stored:
    """A folder of images, sorted by path.

    Classes are those of a dataset.json as in EDM's zip where there is one, else the sub-folders.

    Raises:
      SourceError: no folder, no images, a bad dataset.json, or images both at the top and in
        sub-folders: the former would have no class.
    """
    root, path = place(path), _plain(path)
    if not root.is_dir():
        raise SourceError(
            f"{source}: there is no folder {path}; expected a folder of images, one sub-folder a "
            "class"
        )
    names = sorted(name for name in files_below(root) if PurePath(name).suffix.lower() in SUFFIXES)
    if not names:
        raise SourceError(
            f"{source}: has no images; expected files such as CLASS/NAME.png or NAME.png in it"
        )
    if (root / "dataset.json").is_file():
        labels = _json_labels(source, (root / "dataset.json").read_bytes(), names)
        return Stored(FolderReader(source, path, names), labels)
    classes = sorted({n.split("/")[0] for n in names if "/" in n})
    if classes and any("/" not in n for n in names):
        raise SourceError(
            f"{source}: has images both at its top and in sub-folders; put every image in a "
            "class's sub-folder"
        )
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([number[n.split("/")[0]] for n in names], np.int32) if classes else None
    return Stored(FolderReader(source, path, names), labels, tuple(classes))


def open_zip(source: str, path: str) -> Stored:
    """EDM's archive: images sorted by name, and dataset.json.

    That is {"labels": [[name, integer or float vector], ...]}, or null for the list.

    Raises:
      SourceError: no file, no zip archive, no images, or a bad dataset.json.
    """
    if not place(path).is_file():
        raise SourceError(
            f"{source}: there is no file {path}; make one by ogdm data prepare "
            f"folder:DIR --out {path}"
        )
    try:
        with place(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            table = archive.read("dataset.json") if "dataset.json" in members else None
    except _UNREADABLE as error:
        raise SourceError(
            f"{source}: {path} is no readable zip archive ({type(error).__name__})"
        ) from None
    names = sorted(
        n
        for n in members
        if PurePath(n).suffix.lower() in SUFFIXES and not n.startswith("__MACOSX")
    )
    if not names:
        raise SourceError(
            f"{source}: has no images; expected files such as 00000/img00000000.png in it"
        )
    labels = None if table is None else _json_labels(source, table, names)
    places = np.array([_place(members[n]) for n in names], np.int64)
    return Stored(ZipReader(source, _plain(path), names, places), labels)


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


def _json_labels(source: str, content: bytes, names: list[str]) -> np.ndarray | None:
    try:
        pairs = json.loads(content)["labels"]
        table = (
            None
            if pairs is None
            else {str(name).replace("\\", "/"): label for name, label in pairs}
        )
    except (ValueError, KeyError, TypeError):
        raise SourceError(
            f"{source}: dataset.json is malformed; "
            'expected {"labels": [[name, label], ...]} or null'
        ) from None
    if table is None:
        return None
    missing = next((n for n in names if n not in table), None)
    if missing is not None:
        raise SourceError(
            f"{source}: dataset.json has no label for {missing}; expected one for every image, or "
            "null"
        )
    labels = [table[n] for n in names]
    try:
        return np.array(labels)
    except ValueError:
        raise SourceError(
            f"{source}: dataset.json mixes kinds of labels; expected all integers or all vectors "
            "of one length"
        ) from None
