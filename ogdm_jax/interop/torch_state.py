"""Reads PyTorch checkpoints without PyTorch and without running anything that a file contains.

Five layouts, told apart by their first bytes: torch.save's zip archive (torch >= 1.6; of a TorchScript archive the
weights, never the program) and its older stream of pickles, plain pickles (EDM's network-snapshot-*.pkl, whose official
reader executes Python source found inside), and safetensors. All go through restricted_pickle, so the worst that a
hostile file can do is to be refused. Bytes are mapped, not loaded; every declared size is compared with the real one
before an array is made, and all arrays together may take at most 4 times the file's size + 16 MiB.
"""

import json
import mmap
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ogdm_jax.interop.restricted_pickle import UnsafeFileError, load, quote
from ogdm_jax.interop.torch_records import DTYPES, Module, NumpyArray, Storage, Tensor, admit_with

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
MAX_ENTRIES = 50_000
MAX_DEPTH = 64
MAX_HEADER = 64 << 20
# Where a checkpoint of several parts keeps the weights to use: averaged ones first.
PREFERRED = ("ema", "ema_model", "params_ema", "state_dict", "model_state_dict", "model", "net", "network")
_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
Leaf = Tensor | NumpyArray


@dataclass(frozen=True)
class TorchFile:
    """What a file holds, as inert records (Tensor, Module, dict, list, numbers, texts)."""

    path: Path
    layout: str  # "zip", "legacy", "pickle" or "safetensors"
    size: int
    root: Any


def read_torch(path: str | os.PathLike, entry: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their PyTorch names; types as stored (bfloat16 through ml_dtypes), memory order C.

    Reads `.pt`/`.pth` state dicts of any torch version since 0.4, `.safetensors`, EDM's `network-snapshot-*.pkl` (its
    `ema`) and `training-state-*.pt` (its `net`, without the optimiser). entry names the part to read where a file has
    several; without it averaged weights come first (see PREFERRED). Tensors that share one storage and layout come
    back as one array. Nothing from the file is executed; a file that would need it, or whose sizes contradict each
    other, raises UnsafeFileError (a ValueError) with one sentence naming the file and the reason. Needs no torch.
    """
    file = open_torch(path)
    try:
        return _materialise(dict(leaves(select(file.root, entry))), file.size)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{file.path}: cannot be read: {error}.") from error.__cause__


def open_torch(path: str | os.PathLike) -> TorchFile:
    """Parses a checkpoint into inert records without making any array. Errors as in read_torch."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    try:
        size = path.stat().st_size
        if size == 0:
            raise UnsafeFileError("it is empty")
        with path.open("rb") as handle:
            data = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
            layout, root = _parse(data, handle)
        return TorchFile(path, layout, size, root)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: cannot be read: {error}.") from error.__cause__


def _parse(data: memoryview, handle: Any) -> tuple[str, Any]:
    if data[:4] == b"PK\x03\x04":
        return "zip", _read_zip(data, handle)
    if data[0] == 0x80:
        return _read_pickles(data)
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        return "safetensors", _read_safetensors(data)
    known = {
        b"\x1f\x8b": "gzip-compressed",
        b"BZ": "bzip2-compressed",
        b"\x93N": "a numpy file",
        b"PK": "an empty zip archive",
    }
    what = known.get(bytes(data[:2]), "of an unknown kind")
    raise UnsafeFileError(f"it is {what}, not a PyTorch zip or pickle file nor safetensors")


# zip archives


def _members(data: memoryview, handle: Any) -> dict[str, memoryview]:
    """Member name -> its bytes. Only uncompressed members are admitted: nothing inflates.

    torch writes no others but the program of a TorchScript archive, code/, which is left out.
    """
    try:
        infos = zipfile.ZipFile(handle).infolist()
    except Exception as error:  # the directory parser raises many kinds; all mean the same here
        raise UnsafeFileError(f"its zip directory is damaged or truncated ({quote(str(error))})") from error
    found: dict[str, memoryview] = {}
    for info in infos:
        name = info.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or ":" in name.split("/")[0]:
            raise UnsafeFileError(f"its member {quote(name)} points outside the archive")
        if name in found:
            raise UnsafeFileError(f"its member {quote(name)} occurs twice")
        if re.match(r"[^/]+/code/", name):
            continue
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise UnsafeFileError(f"its member {quote(name)} is compressed, which torch.save never does")
        if info.flag_bits & 0x1:
            raise UnsafeFileError(f"its member {quote(name)} is encrypted")
        start = info.header_offset
        header = data[start : start + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise UnsafeFileError(f"its member {quote(name)} has no header where the directory says")
        start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if info.file_size > len(data) - start:
            raise UnsafeFileError(f"its member {quote(name)} is declared longer than the file")
        found[name] = data[start : start + info.file_size]
        if zlib.crc32(found[name]) != info.CRC:
            raise UnsafeFileError(f"its member {quote(name)} does not match its checksum")
    return found


def _read_zip(data: memoryview, handle: Any) -> Any:
    members = _members(data, handle)
    pickles = [name for name in members if re.fullmatch(r"[^/]*/data\.pkl|data\.pkl", name)]
    if len(pickles) != 1:
        raise UnsafeFileError(f"it is a zip archive with {len(pickles)} data.pkl members, where torch.save writes one")
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
        if key not in storages:
            storages[key] = Storage(kind.dtype, count, content, ">" if order == b"big" else "<")
        if (storages[key].dtype, storages[key].count) != (kind.dtype, count):
            raise UnsafeFileError(f"its storage {quote(key)} is declared twice with different sizes")
        return storages[key]

    root = _load_all(members[pickles[0]], persistent, scripted)
    if scripted and not isinstance(root, Module):
        raise UnsafeFileError("it is a TorchScript archive, but its data.pkl holds no module")
    return root


def _load_all(data: memoryview, persistent: Any = None, scripted: bool = False) -> Any:
    root, end = load(data, 0, admit_with(_read_nested, scripted), persistent)
    _expect_end(data, end)
    return root


def _expect_end(data: memoryview, end: int) -> None:
    if end != len(data):
        raise UnsafeFileError(f"{len(data) - end} bytes follow the end of its pickle")


def _reference(reference: Any) -> tuple[Storage, str, int]:
    good = isinstance(reference, tuple) and len(reference) >= 5 and reference[0] == "storage"
    if not good or not isinstance(reference[1], Storage) or not isinstance(reference[2], str):
        raise UnsafeFileError("its pickle refers to something else than a storage")
    count = reference[4]
    if type(count) is not int or not 0 <= count < 2**48:
        raise UnsafeFileError(f"its storage {quote(reference[2])} has no sensible size")
    return reference[1], reference[2], count


# pickles: plain, and the stream of pickles and raw storages that torch wrote before 1.6


def _read_pickles(data: memoryview) -> tuple[str, Any]:
    first = bytes(data[:14])
    if LEGACY_MAGIC.to_bytes(10, "little") in first:
        return "legacy", _read_legacy(data)
    return "pickle", _load_all(data)


def _read_nested(data: Any) -> Storage:
    """The torch file inside a pickled tensor: a legacy stream that holds one storage and nothing nested further."""
    if not isinstance(data, memoryview | bytes):
        raise UnsafeFileError("a nested storage is not a byte string")

    def no_deeper(_: Any) -> Storage:
        raise UnsafeFileError("a nested storage holds another nested storage")

    storage = _read_legacy(memoryview(data), no_deeper)
    if not isinstance(storage, Storage):
        raise UnsafeFileError("a nested storage holds something else than a storage")
    return storage


def _read_legacy(data: memoryview, nested: Any = _read_nested) -> Any:
    """Five pickles (magic, version, system, object, list of storage keys); then per key its count and numbers."""
    admit = admit_with(nested)
    magic, at = load(data, 0, admit)
    version, at = load(data, at, admit)
    system, at = load(data, at, admit)
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION or not isinstance(system, dict):
        raise UnsafeFileError("it is not torch.save's stream of pickles")
    order = "<" if system.get("little_endian", True) else ">"
    roots: dict[str, Storage] = {}
    views: list[tuple[Storage, str, int]] = []

    def persistent(reference: Any) -> Any:
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
            return reference[
                1
            ]  # (a class, its file, its source): the class was admitted by name, the source is dropped
        kind, key, count = _reference(reference)
        root = roots.setdefault(key, Storage(kind.dtype, count, None, order))
        if (root.dtype, root.count) != (kind.dtype, count):
            raise UnsafeFileError(f"its storage {quote(key)} is declared twice with different sizes")
        view = reference[5] if len(reference) > 5 else None
        if view is None:
            return root
        if not (isinstance(view, tuple) and len(view) == 3 and all(type(n) is int and n >= 0 for n in view[1:])):
            raise UnsafeFileError(f"its storage {quote(key)} is viewed in an unknown way")
        views.append((Storage(kind.dtype, view[2], None, order), key, view[1]))
        return views[-1][0]

    content, at = load(data, at, admit, persistent)
    keys, at = load(data, at, admit)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(roots):
        raise UnsafeFileError("its list of storages does not match the storages in use")
    for key in keys:
        root = roots[key]
        if len(data) - at < 8 or int.from_bytes(data[at : at + 8], "little") != root.count:
            raise UnsafeFileError(f"its storage {quote(key)} is missing or has another size than declared")
        root.data = data[at + 8 : at + 8 + root.count * root.dtype.itemsize]
        at += 8 + root.count * root.dtype.itemsize
        if at > len(data):
            raise UnsafeFileError(f"its storage {quote(key)} is truncated")
    for view, key, offset in views:
        width = view.dtype.itemsize
        view.data = roots[key].data[
            offset * width : (offset + view.count) * width
        ]  # a short view is refused by Storage.array
    _expect_end(data, at)
    return content


# safetensors: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the numbers


def _read_safetensors(data: memoryview) -> dict[str, Tensor]:
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise UnsafeFileError(f"its header of {length} bytes is too long")

    def unique(pairs: list) -> dict:
        if len({name for name, _ in pairs}) != len(pairs):
            raise UnsafeFileError("its header names something twice")
        return dict(pairs)

    try:
        header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=unique)
    except UnsafeFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnsafeFileError("its header is not valid JSON") from error
    header.pop("__metadata__", None)
    body, result, spans = data[8 + length :], {}, []
    for name, item in header.items():
        try:
            dtype, shape, (begin, end) = DTYPES[_SAFETENSORS[item["dtype"]]], tuple(item["shape"]), item["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise UnsafeFileError(f"the header of {quote(name)} lacks a known dtype, shape or data_offsets") from error
        if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end)):
            raise UnsafeFileError(f"the header of {quote(name)} holds impossible sizes")
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=object)) for i in range(len(shape)))
        count = int(np.prod(shape, dtype=object))
        if not begin <= end <= len(body) or end - begin != count * dtype.itemsize:
            raise UnsafeFileError(f"{quote(name)} of shape {shape} does not fit its data_offsets ({begin}, {end})")
        result[name] = Tensor(Storage(dtype, count, body[begin:end]), 0, shape, strides, dtype)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise UnsafeFileError("its tensors overlap or leave a gap")
        position = end
    if position != len(body):
        raise UnsafeFileError(f"{len(body) - position} bytes follow its last tensor")
    return result


# from the parsed object to named arrays


def select(root: Any, entry: str | None = None) -> Module | dict:
    """The part of a parsed file that holds the weights: a module, or a dictionary with tensors in it."""
    if entry is not None:
        if not isinstance(root, dict) or not _holds_tensors(root.get(entry)):
            raise UnsafeFileError(f"it has no part {quote(entry)} with tensors (there is: {_listing(root)})")
        return root[entry]
    if _holds_tensors(root):
        return root
    parts = {key: value for key, value in root.items() if _holds_tensors(value)} if isinstance(root, dict) else {}
    for key in PREFERRED:
        if key in parts:
            return parts[key]
    if len(parts) == 1:
        return next(iter(parts.values()))
    reason = "several parts with tensors, choose one with entry=..." if parts else "no dictionary of tensors"
    raise UnsafeFileError(f"it holds {reason} (there is: {_listing(parts or root)})")


def _listing(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(quote(str(key)) for key in list(value)[:12]) or "an empty dictionary"
    return f"one {quote(value)}"


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Module):
        return True
    return isinstance(value, dict) and any(isinstance(item, Leaf) for item in value.values())


def leaves(part: Module | dict) -> Iterator[tuple[str, Leaf]]:
    """(name, tensor) in PyTorch's state_dict order: a module's parameters, buffers that persist, then its children."""
    if isinstance(part, dict):
        for name, value in part.items():
            if isinstance(value, Leaf):
                if not isinstance(name, str):
                    raise UnsafeFileError(f"a tensor is named by a {quote(name)} instead of a text")
                yield name, value
        return
    visited = 0
    pending: list[tuple[str, Any, int]] = [("", part, 0)]
    while pending:
        prefix, module, depth = pending.pop()
        visited += 1
        if visited > MAX_ENTRIES or depth > MAX_DEPTH:
            raise UnsafeFileError("its modules are nested too deeply or in a circle")
        skipped = module.state.get("_non_persistent_buffers_set")
        for group in ("_parameters", "_buffers"):
            for name, value in _named(module, group):
                if isinstance(value, Leaf) and not (
                    group == "_buffers" and isinstance(skipped, set) and name in skipped
                ):
                    yield f"{prefix}{name}", value
        children = [
            (f"{prefix}{name}.", c, depth + 1) for name, c in _named(module, "_modules") if isinstance(c, Module)
        ]
        pending.extend(reversed(children))


def _named(module: Module, group: str) -> list[tuple[str, Any]]:
    items = module.state.get(group, {})
    if not isinstance(items, dict) or not all(isinstance(name, str) for name in items):
        raise UnsafeFileError(f"the {group} of {quote(module.name)} are not a dictionary by name")
    return list(items.items())


def _materialise(named: dict[str, Leaf], file_size: int) -> dict[str, np.ndarray]:
    budget = 4 * file_size + (16 << 20)
    made: dict[tuple, np.ndarray] = {}
    result: dict[str, np.ndarray] = {}
    if len(named) > MAX_ENTRIES:
        raise UnsafeFileError(f"it has more than {MAX_ENTRIES} tensors")
    for name, leaf in named.items():
        key = (id(leaf),)
        if isinstance(leaf, Tensor):
            key = (id(leaf.storage), leaf.offset, leaf.shape, leaf.strides, leaf.dtype)
        if key not in made:
            budget -= leaf.nbytes
            if budget < 0:
                raise UnsafeFileError(f"its tensors unfold to more than 4 times the file's size (at {quote(name)})")
            made[key] = np.array(leaf.array(), order="C")
        result[name] = made[key]
    return result
