"""The layouts of checkpoint files, parsed into inert records.

Told apart by their first bytes: torch.save's zip archive (torch >= 1.6; of a TorchScript archive
the weights, never the program), its older stream of pickles, plain pickles (EDM's
network-snapshot-*.pkl, whose official reader executes Python source found inside), safetensors, and
numpy's .npz and .npy.
"""

import functools
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import numpy as np

from ogdm_jax.interop import strangers
from ogdm_jax.interop.inert import Budget, Module, UnsafeFileError, quote
from ogdm_jax.interop.parts import MAX_NAME
from ogdm_jax.interop.restricted_pickle import Persistent, load
from ogdm_jax.interop.torch_globals import admit_with
from ogdm_jax.interop.torch_records import (
    DTYPES,
    NumpyType,
    Storage,
    Tensor,
    is_count,
    numpy_array,
    shape_of,
    strides_of,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
MAX_HEADER = 8 << 20  # bytes of a safetensors header
_MAX_NPY_HEADER = 1 << 16  # bytes
_PER_MEMBER = 16  # bytes that a zip directory takes in memory, at most, per byte of it
_PER_VALUE = 128  # bytes that parsed JSON takes in memory, at most, per value
# safetensors' name of a type -> torch's: F16 and float16, U8 and uint8
_SAFETENSORS = {
    kind + bits: word + bits
    for kind, word, widths in (
        ("F", "float", "64 32 16"),
        ("BF", "bfloat", "16"),
        ("I", "int", "64 32 16 8"),
        ("U", "uint", "64 32 16 8"),
    )
    for bits in widths.split()
} | {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def parse(data: memoryview, handle: BinaryIO, budget: Budget, name: str = "") -> tuple[str, Any]:
    """(layout, object) of a file; torch_state.TorchFile has the names of layouts.

    Args:
      data: the file, mapped; not empty.
      handle: the same file, for the standard library's reader of zip directories.
      budget: charged with what parsing copies.
      name: of the file.

    Raises:
      UnsafeFileError: another kind of file, or one that is refused; the text has no subject yet.
    """
    if data[:4] == b"PK\x03\x04":
        return _read_zip(data, handle, budget)
    # Before pickles, whose first byte 0x80 may be that of a header's length. No pickle passes: its
    # bytes 5 to 7 are not all 0 in front of a brace unless a length in it exceeds the file.
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        return "safetensors", _read_safetensors(data, budget)
    if data[:6] == b"\x93NUMPY":
        return "npy", _read_npy(data, budget)
    # Protocols 0 and 1 have no first byte of their own: "(" or "}" or "]", or a name.
    if data[0] == 0x80 or re.match(rb"[(\]})]|c\w+(\.\w+)*\n\w+\n", data[:256]):
        return _read_pickles(data, budget)
    raise UnsafeFileError(f"it is {strangers.file_kind(data, name)}")


# numpy's files


def _read_npy(data: memoryview, budget: Budget) -> Any:
    """An array, or the objects in it, which numpy pickles behind the header."""
    handle = io.BytesIO(bytes(data[:_MAX_NPY_HEADER]))
    try:
        version = np.lib.format.read_magic(handle)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(handle)
    except Exception as error:  # numpy reads it as Python's text: errors of many kinds
        raise UnsafeFileError("its header of a numpy array is damaged") from error
    content = data[handle.tell() :]
    if dtype.hasobject:
        return _load_all(content, budget)
    if dtype.kind not in "biufc":
        return Module(f"an array of the type {dtype}")
    return numpy_array(content, NumpyType(dtype), shape, fortran)


# zip archives


class _Charged:
    """A file whose reads are charged.

    zipfile reads the directory at once and makes an object of every entry.
    """

    def __init__(self, handle: BinaryIO, budget: Budget) -> None:
        self.seek, self.tell, self._handle, self._budget = handle.seek, handle.tell, handle, budget

    def read(self, size: int = -1) -> bytes:
        self._budget.charge(max(size, 0) * _PER_MEMBER)
        return self._handle.read(size)


def _members(data: memoryview, handle: BinaryIO, budget: Budget) -> dict[str, memoryview]:
    """Member name -> its bytes.

    Only uncompressed members are admitted: nothing inflates but numpy's, within the budget. torch
    writes no others but the program of a TorchScript archive, code/, which is left out.

    Raises:
      UnsafeFileError: it is no archive of torch or numpy, or a damaged one.
    """
    try:
        infos = zipfile.ZipFile(cast(BinaryIO, _Charged(handle, budget))).infolist()
    except UnsafeFileError:
        raise
    except Exception as error:  # the directory parser raises many kinds; all mean the same here
        raise UnsafeFileError(
            f"its zip directory is damaged or truncated ({quote(str(error))})"
        ) from error
    if sum(info.compress_size for info in infos) > len(data):  # before any is read
        raise UnsafeFileError("its members overlap: together they are longer than the file")
    names = [info.filename for info in infos]
    if not any(name.endswith(("data.pkl", ".npy")) for name in names):
        raise UnsafeFileError(
            f"it is {strangers.archive_kind(names)}, with 0 data.pkl members, where torch.save "
            "writes one"
        )
    found: dict[str, memoryview] = {}
    for info in infos:
        name = info.filename
        if len(name) > MAX_NAME:
            raise UnsafeFileError(
                f"its member {quote(name)} has a name of more than {MAX_NAME} characters"
            )
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or ".." in parts or ":" in parts[0]:
            raise UnsafeFileError(f"its member {quote(name)} points outside the archive")
        if name in found:
            raise UnsafeFileError(f"its member {quote(name)} occurs twice")
        if re.match(r"[^/]+/code/", name):
            continue
        found[name] = _content(data, info, budget)
    return found


def _content(data: memoryview, info: zipfile.ZipInfo, budget: Budget) -> memoryview:
    """The bytes of one member of an archive."""
    member = f"its member {quote(info.filename)}"
    packed = info.compress_type == zipfile.ZIP_DEFLATED and info.filename.endswith(".npy")
    stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    if not packed and not stored:
        raise UnsafeFileError(f"{member} is compressed, which torch.save never does")
    if info.flag_bits & 0x1:
        raise UnsafeFileError(f"{member} is encrypted")
    start = info.header_offset
    header = data[start : start + 30]
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise UnsafeFileError(f"{member} has no header where the directory says")
    lengths = header[26:28], header[28:30]  # of the name, and of further fields
    start += 30 + sum(int.from_bytes(length, "little") for length in lengths)
    if info.compress_size > len(data) - start:
        raise UnsafeFileError(f"{member} is declared longer than the file")
    content = data[start : start + info.compress_size]
    if packed:
        budget.charge(info.file_size, "contents unfold", info.filename)
        try:
            content = memoryview(zlib.decompressobj(-15).decompress(content, info.file_size))
        except zlib.error as error:
            raise UnsafeFileError(f"{member} is damaged") from error
    if zlib.crc32(content) != info.CRC:
        raise UnsafeFileError(f"{member} does not match its checksum")
    return content


def _read_zip(data: memoryview, handle: BinaryIO, budget: Budget) -> tuple[str, Any]:
    members = _members(data, handle, budget)
    if all(name.endswith(".npy") for name in members):
        found = {name[:-4]: _read_npy(content, budget) for name, content in members.items()}
        return "npz", found
    pickles = [name for name in members if re.fullmatch(r"[^/]*/data\.pkl|data\.pkl", name)]
    if len(pickles) != 1:
        raise UnsafeFileError(
            f"it is a zip archive with {len(pickles)} data.pkl members, where torch.save writes one"
        )
    prefix = pickles[0].removesuffix("data.pkl")
    scripted = f"{prefix}constants.pkl" in members
    order = bytes(members.get(f"{prefix}byteorder", b"little"))
    if order not in (b"little", b"big"):
        raise UnsafeFileError("its byteorder member says neither little nor big")
    storages: dict[str, Storage] = {}

    def persistent(reference: Any) -> Any:
        kind, key, count = _reference(reference)
        content = members.get(f"{prefix}data/{key}")
        if content is None:
            raise UnsafeFileError(f"its storage {quote(key)} is missing from the archive")
        new = Storage(kind.dtype, count, content, ">" if order == b"big" else "<")
        return _same(storages.setdefault(key, new), new, key)

    root = _load_all(members[pickles[0]], budget, persistent, scripted)
    if scripted and not isinstance(root, Module):
        raise UnsafeFileError("it is a TorchScript archive, but its data.pkl holds no module")
    return "TorchScript" if scripted else "zip", root


def _same(known: Storage, new: Storage, key: str) -> Storage:
    if (known.dtype, known.count) != (new.dtype, new.count):
        raise UnsafeFileError(f"its storage {quote(key)} is declared twice with different sizes")
    return known


def _load_all(
    data: memoryview, budget: Budget, persistent: Persistent | None = None, scripted: bool = False
) -> Any:
    admit = admit_with(functools.partial(_read_nested, budget), scripted)
    root, end = load(data, 0, admit, budget, persistent)
    _expect_end(data, end)
    return root


def _expect_end(data: memoryview, end: int) -> None:
    if end != len(data):
        raise UnsafeFileError(f"{len(data) - end} bytes follow the end of its pickle")


def _reference(reference: Any) -> tuple[Storage, str, int]:
    """What ("storage", kind, key, place, count, ...) refers to: (kind, key, count)."""
    parts: list[Any] = list(reference[:5]) if isinstance(reference, tuple) else []
    if len(parts) < 5 or parts[0] != "storage":
        raise UnsafeFileError("its pickle refers to something else than a storage")
    _, kind, key, _, count = parts
    if not isinstance(kind, Storage) or not isinstance(key, str):
        raise UnsafeFileError("its pickle refers to something else than a storage")
    if len(key) > MAX_NAME:
        raise UnsafeFileError(
            f"its storage {quote(key)} has a key of more than {MAX_NAME} characters"
        )
    if not is_count(count):
        raise UnsafeFileError(f"its storage {quote(key)} has no sensible size")
    return kind, key, count


# pickles: plain, and the stream of pickles and raw storages that torch wrote before 1.6


def _read_pickles(data: memoryview, budget: Budget) -> tuple[str, Any]:
    first = bytes(data[:32])  # protocols 4 and 5 begin with a frame
    if LEGACY_MAGIC.to_bytes(10, "little") in first:
        return "legacy", _read_legacy(data, budget, functools.partial(_read_nested, budget))
    return "pickle", _load_all(data, budget)


def _read_nested(budget: Budget, data: Any) -> Storage:
    """The torch file inside a pickled tensor: a legacy stream of one storage, nothing nested."""
    if not isinstance(data, memoryview | bytes):
        raise UnsafeFileError("a nested storage is not a byte string")

    def no_deeper(_: Any) -> Storage:
        raise UnsafeFileError("a nested storage holds another nested storage")

    storage = _read_legacy(memoryview(data), budget, no_deeper)
    if not isinstance(storage, Storage):
        raise UnsafeFileError("a nested storage holds something else than a storage")
    return storage


def _read_legacy(data: memoryview, budget: Budget, nested: Callable[[Any], Storage]) -> Any:
    """torch.save's older stream.

    Five pickles (magic, version, system, object, list of storage keys), then for each key the count
    of its numbers and the numbers.
    """
    admit = admit_with(nested)
    magic, at = load(data, 0, admit, budget)
    version, at = load(data, at, admit, budget)
    system, at = load(data, at, admit, budget)
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION or not isinstance(system, dict):
        raise UnsafeFileError("it is not torch.save's stream of pickles")
    order = "<" if system.get("little_endian", True) else ">"
    roots: dict[str, Storage] = {}
    views: list[tuple[Storage, str, int]] = []

    def persistent(reference: Any) -> Any:
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
            # (a class, its file, its source): the class was admitted by name, the source is dropped
            return reference[1]
        kind, key, count = _reference(reference)
        new = Storage(kind.dtype, count, None, order)
        root = _same(roots.setdefault(key, new), new, key)
        view = reference[5] if len(reference) > 5 else None
        if view is None:
            return root
        if not (isinstance(view, tuple) and len(view) == 3 and all(map(is_count, view[1:]))):
            raise UnsafeFileError(f"its storage {quote(key)} is viewed in an unknown way")
        views.append((Storage(kind.dtype, view[2], None, order), key, view[1]))
        return views[-1][0]

    content, at = load(data, at, admit, budget, persistent)
    keys, at = load(data, at, admit, budget)
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or sorted(keys) != sorted(roots):
        raise UnsafeFileError("its list of storages does not match the storages in use")
    numbers: dict[str, memoryview] = {}
    for key in keys:
        numbers[key], at = _stored(data, at, roots[key], key)
        roots[key].data = numbers[key]
    for view, key, offset in views:  # a short view is refused by Storage.array
        width = view.dtype.itemsize
        view.data = numbers[key][offset * width : (offset + view.count) * width]
    _expect_end(data, at)
    return content


def _stored(data: memoryview, at: int, storage: Storage, key: str) -> tuple[memoryview, int]:
    """The bytes of a storage whose count stands at data[at], and the position behind them."""
    if len(data) - at < 8 or int.from_bytes(data[at : at + 8], "little") != storage.count:
        raise UnsafeFileError(
            f"its storage {quote(key)} is missing or has another size than declared"
        )
    end = at + 8 + storage.count * storage.dtype.itemsize
    if end > len(data):
        raise UnsafeFileError(f"its storage {quote(key)} is truncated")
    return data[at + 8 : end], end


# safetensors: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the
# numbers


def _read_safetensors(data: memoryview, budget: Budget) -> dict[str, Tensor]:
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise UnsafeFileError(f"its header of {length} bytes is too long")

    def unique(pairs: list) -> dict:
        if len({name for name, _ in pairs}) != len(pairs):
            raise UnsafeFileError("its header names something twice")
        return dict(pairs)

    text = bytes(data[8 : 8 + length])
    budget.charge(length + _PER_VALUE * sum(map(text.count, (b",", b"[", b"{"))))
    try:
        header = json.loads(text, object_pairs_hook=unique)
    except UnsafeFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnsafeFileError("its header is not valid JSON") from error
    header.pop("__metadata__", None)
    body, spans = data[8 + length :], []
    result = {name: _stored_tensor(name, item, body, spans) for name, item in header.items()}
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise UnsafeFileError("its tensors overlap or leave a gap")
        position = end
    if position != len(body):
        raise UnsafeFileError(f"{len(body) - position} bytes follow its last tensor")
    return result


def _stored_tensor(name: str, item: Any, body: memoryview, spans: list[tuple[int, int]]) -> Tensor:
    """The tensor that an item of a safetensors header describes; notes which bytes it takes."""
    try:
        dtype, shape = DTYPES[_SAFETENSORS[item["dtype"]]], item["shape"]
        begin, end = item["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise UnsafeFileError(
            f"the header of {quote(name)} lacks a known dtype, shape or data_offsets"
        ) from error
    if not isinstance(shape, list) or not all(map(is_count, (*shape, begin, end))):
        raise UnsafeFileError(f"the header of {quote(name)} holds impossible sizes")
    shape = shape_of(shape)
    count = math.prod(shape)
    if not begin <= end <= len(body) or end - begin != count * dtype.itemsize:
        raise UnsafeFileError(
            f"{quote(name)} of shape {shape} does not fit its data_offsets ({begin}, {end})"
        )
    spans.append((begin, end))
    return Tensor(Storage(dtype, count, body[begin:end]), 0, shape, strides_of(shape), dtype)
