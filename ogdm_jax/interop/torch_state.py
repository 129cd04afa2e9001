"""Reads PyTorch checkpoints without PyTorch and without running anything that a file contains.

Five layouts, told apart by their first bytes: torch.save's zip archive (torch >= 1.6; of a
TorchScript archive the weights, never the program) and its older stream of pickles, plain pickles
(EDM's network-snapshot-*.pkl, whose official reader executes Python source found inside), and
safetensors. All go through restricted_pickle, so the worst that a hostile file can do is to be
refused. Bytes are mapped, not loaded; every declared size is compared with the real one before an
array is made. What parsing copies and all arrays together may take at most 4 times the file's size
+ 16 MiB, beside about 200 bytes an instruction of a pickle, of which a file may have a million
(restricted_pickle.Budget).
"""

import contextlib
import functools
import json
import math
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

from ogdm_jax import places
from ogdm_jax.interop.restricted_pickle import Budget, UnsafeFileError, load, quote
from ogdm_jax.interop.torch_records import (
    DTYPES,
    MAX_COUNT,
    Module,
    NumpyArray,
    Storage,
    Tensor,
    admit_with,
    shape_of,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
MAX_ENTRIES = 50_000
MAX_DEPTH = 64
MAX_NAME = 512  # characters of a tensor's, module's or archive member's name
MAX_HEADER = 8 << 20
_PER_MEMBER, _PER_VALUE = (
    16,
    128,
)  # memory, at most: of a zip directory per byte of it, of parsed JSON per value
# Where a checkpoint of several parts keeps the weights to use: averaged ones first.
PREFERRED = (
    "ema",
    "ema_model",
    "params_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
)
_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
}
Leaf = Tensor | NumpyArray


@dataclass(frozen=True)
class TorchFile:
    """What a file holds, as inert records (Tensor, Module, dict, list, numbers, texts)."""

    path: Path
    layout: str  # "zip", "legacy", "pickle" or "safetensors"
    left: int  # bytes that its arrays may take
    root: Any


def read_torch(path: str | os.PathLike, entry: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their PyTorch names; types as stored (bfloat16 through
    ml_dtypes), memory order C.

    Reads `.pt`/`.pth` state dicts of any torch version since 0.4, `.safetensors`, EDM's
    `network-snapshot-*.pkl` (its `ema`) and `training-state-*.pt` (its `net`, without the
    optimiser). entry names the part to read where a file has several; without it averaged weights
    come first (see PREFERRED). Tensors that share one storage and layout come back as one array.
    Nothing from the file is executed; a file that would need it, or whose sizes contradict each
    other, raises UnsafeFileError (a ValueError) with one sentence naming the file and the reason.
    Needs no torch.
    """
    return tensors(open_torch(path), entry)


def tensors(file: TorchFile, entry: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a parsed file, as read_torch gives them."""
    with _naming(file.path):
        return _materialise(leaves(select(file.root, entry)), Budget(file.left))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Completes the sentence of a refusal, and refuses where memory runs out."""
    try:
        yield
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: cannot be read: {error}.") from error.__cause__
    except MemoryError as error:
        raise UnsafeFileError(
            f"{path}: cannot be read: it needs more memory than there is."
        ) from error


def open_torch(path: str | os.PathLike) -> TorchFile:
    """Parses a checkpoint into inert records without making any array. Errors as in read_torch."""
    path = places.local(path, "checkpoint")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    with _naming(path):
        if path.stat().st_size == 0:
            raise UnsafeFileError("it is empty")
        with path.open("rb") as handle:
            data = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
            budget = Budget.of(len(data))
            layout, root = _parse(data, handle, budget)
        return TorchFile(path, layout, budget.bytes, root)


def _parse(data: memoryview, handle: Any, budget: Budget) -> tuple[str, Any]:
    if data[:4] == b"PK\x03\x04":
        return "zip", _read_zip(data, handle, budget)
    # Before pickles, whose first byte 0x80 may be that of a header's length. No pickle passes: its
    # bytes 5 to 7 are not all 0 in front of a brace unless a length in it exceeds the file.
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        return "safetensors", _read_safetensors(data, budget)
    if data[0] == 0x80:
        return _read_pickles(data, budget)
    known = {
        b"\x1f\x8b": "gzip-compressed",
        b"BZ": "bzip2-compressed",
        b"\x93N": "a numpy file",
        b"PK": "an empty zip archive",
    }
    what = known.get(bytes(data[:2]), "of an unknown kind")
    raise UnsafeFileError(f"it is {what}, not a PyTorch zip or pickle file nor safetensors")


# zip archives


class _Charged:
    """A file whose reads are charged: zipfile reads the directory at once and makes an object of
    every entry.
    """

    def __init__(self, handle: Any, budget: Budget):
        self.seek, self.tell, self._handle, self._budget = handle.seek, handle.tell, handle, budget

    def read(self, size: int = -1) -> bytes:
        self._budget.charge(max(size, 0) * _PER_MEMBER)
        return self._handle.read(size)


def _members(data: memoryview, handle: Any, budget: Budget) -> dict[str, memoryview]:
    """Member name -> its bytes. Only uncompressed members are admitted: nothing inflates.

    torch writes no others but the program of a TorchScript archive, code/, which is left out.
    """
    try:
        infos = zipfile.ZipFile(_Charged(handle, budget)).infolist()
    except UnsafeFileError:
        raise
    except Exception as error:  # the directory parser raises many kinds; all mean the same here
        raise UnsafeFileError(
            f"its zip directory is damaged or truncated ({quote(str(error))})"
        ) from error
    if sum(info.compress_size for info in infos) > len(data):  # before any is read
        raise UnsafeFileError("its members overlap: together they are longer than the file")
    found: dict[str, memoryview] = {}
    for info in infos:
        name = info.filename
        if len(name) > MAX_NAME:
            raise UnsafeFileError(
                f"its member {quote(name)} has a name of more than {MAX_NAME} characters"
            )
        if (
            name.startswith("/")
            or "\\" in name
            or ".." in name.split("/")
            or ":" in name.split("/")[0]
        ):
            raise UnsafeFileError(f"its member {quote(name)} points outside the archive")
        if name in found:
            raise UnsafeFileError(f"its member {quote(name)} occurs twice")
        if re.match(r"[^/]+/code/", name):
            continue
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise UnsafeFileError(
                f"its member {quote(name)} is compressed, which torch.save never does"
            )
        if info.flag_bits & 0x1:
            raise UnsafeFileError(f"its member {quote(name)} is encrypted")
        start = info.header_offset
        header = data[start : start + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise UnsafeFileError(
                f"its member {quote(name)} has no header where the directory says"
            )
        start += (
            30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        if info.file_size > len(data) - start:
            raise UnsafeFileError(f"its member {quote(name)} is declared longer than the file")
        found[name] = data[start : start + info.file_size]
        if zlib.crc32(found[name]) != info.CRC:
            raise UnsafeFileError(f"its member {quote(name)} does not match its checksum")
    return found


def _read_zip(data: memoryview, handle: Any, budget: Budget) -> Any:
    members = _members(data, handle, budget)
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
        if key not in storages:
            storages[key] = Storage(kind.dtype, count, content, ">" if order == b"big" else "<")
        if (storages[key].dtype, storages[key].count) != (kind.dtype, count):
            raise UnsafeFileError(
                f"its storage {quote(key)} is declared twice with different sizes"
            )
        return storages[key]

    root = _load_all(members[pickles[0]], budget, persistent, scripted)
    if scripted and not isinstance(root, Module):
        raise UnsafeFileError("it is a TorchScript archive, but its data.pkl holds no module")
    return root


def _load_all(
    data: memoryview, budget: Budget, persistent: Any = None, scripted: bool = False
) -> Any:
    admit = admit_with(functools.partial(_read_nested, budget), scripted)
    root, end = load(data, 0, admit, budget, persistent)
    _expect_end(data, end)
    return root


def _expect_end(data: memoryview, end: int) -> None:
    if end != len(data):
        raise UnsafeFileError(f"{len(data) - end} bytes follow the end of its pickle")


def _reference(reference: Any) -> tuple[Storage, str, int]:
    good = isinstance(reference, tuple) and len(reference) >= 5 and reference[0] == "storage"
    if not good or not isinstance(reference[1], Storage) or not isinstance(reference[2], str):
        raise UnsafeFileError("its pickle refers to something else than a storage")
    if len(reference[2]) > MAX_NAME:
        raise UnsafeFileError(
            f"its storage {quote(reference[2])} has a key of more than {MAX_NAME} characters"
        )
    count = reference[4]
    if type(count) is not int or not 0 <= count < 2**48:
        raise UnsafeFileError(f"its storage {quote(reference[2])} has no sensible size")
    return reference[1], reference[2], count


# pickles: plain, and the stream of pickles and raw storages that torch wrote before 1.6


def _read_pickles(data: memoryview, budget: Budget) -> tuple[str, Any]:
    first = bytes(data[:14])
    if LEGACY_MAGIC.to_bytes(10, "little") in first:
        return "legacy", _read_legacy(data, budget, functools.partial(_read_nested, budget))
    return "pickle", _load_all(data, budget)


def _read_nested(budget: Budget, data: Any) -> Storage:
    """The torch file inside a pickled tensor: a legacy stream that holds one storage and nothing
    nested further.
    """
    if not isinstance(data, memoryview | bytes):
        raise UnsafeFileError("a nested storage is not a byte string")

    def no_deeper(_: Any) -> Storage:
        raise UnsafeFileError("a nested storage holds another nested storage")

    storage = _read_legacy(memoryview(data), budget, no_deeper)
    if not isinstance(storage, Storage):
        raise UnsafeFileError("a nested storage holds something else than a storage")
    return storage


def _read_legacy(data: memoryview, budget: Budget, nested: Any) -> Any:
    """Five pickles (magic, version, system, object, list of storage keys); then per key its count
    and numbers.
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
        root = roots.setdefault(key, Storage(kind.dtype, count, None, order))
        if (root.dtype, root.count) != (kind.dtype, count):
            raise UnsafeFileError(
                f"its storage {quote(key)} is declared twice with different sizes"
            )
        view = reference[5] if len(reference) > 5 else None
        if view is None:
            return root
        if not (
            isinstance(view, tuple)
            and len(view) == 3
            and all(type(n) is int and n >= 0 for n in view[1:])
        ):
            raise UnsafeFileError(f"its storage {quote(key)} is viewed in an unknown way")
        views.append((Storage(kind.dtype, view[2], None, order), key, view[1]))
        return views[-1][0]

    content, at = load(data, at, admit, budget, persistent)
    keys, at = load(data, at, admit, budget)
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or sorted(keys) != sorted(roots)
    ):
        raise UnsafeFileError("its list of storages does not match the storages in use")
    for key in keys:
        root = roots[key]
        if len(data) - at < 8 or int.from_bytes(data[at : at + 8], "little") != root.count:
            raise UnsafeFileError(
                f"its storage {quote(key)} is missing or has another size than declared"
            )
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
    body, result, spans = data[8 + length :], {}, []
    for name, item in header.items():
        try:
            dtype, shape, (begin, end) = (
                DTYPES[_SAFETENSORS[item["dtype"]]],
                item["shape"],
                item["data_offsets"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UnsafeFileError(
                f"the header of {quote(name)} lacks a known dtype, shape or data_offsets"
            ) from error
        if not (
            isinstance(shape, list)
            and all(type(n) is int and 0 <= n < MAX_COUNT for n in (*shape, begin, end))
        ):
            raise UnsafeFileError(f"the header of {quote(name)} holds impossible sizes")
        shape = shape_of(shape)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        count = math.prod(shape)
        if not begin <= end <= len(body) or end - begin != count * dtype.itemsize:
            raise UnsafeFileError(
                f"{quote(name)} of shape {shape} does not fit its data_offsets ({begin}, {end})"
            )
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
    """The part of a parsed file that holds the weights: a module, or a dictionary with tensors in
    it.
    """
    if entry is not None:
        if not isinstance(root, dict) or not _holds_tensors(root.get(entry)):
            raise UnsafeFileError(
                f"it has no part {quote(entry)} with tensors (there is: {_listing(root)})"
            )
        return root[entry]
    if _holds_tensors(root):
        return root
    parts = {}
    if isinstance(root, dict):
        distinct = {
            id(value): value for value in root.values()
        }  # a file can name one part many times
        holding = {place for place, value in distinct.items() if _holds_tensors(value)}
        parts = {key: value for key, value in root.items() if id(value) in holding}
    for key in PREFERRED:
        if key in parts:
            return parts[key]
    if len(parts) == 1:
        return next(iter(parts.values()))
    reason = (
        "several parts with tensors, choose one with entry=..."
        if parts
        else "no dictionary of tensors"
    )
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
    """(name, tensor) in PyTorch's state_dict order: a module's parameters, buffers that persist,
    then its children.
    """
    if isinstance(part, dict):
        for name, value in part.items():
            if isinstance(value, Leaf):
                if not isinstance(name, str) or len(name) > MAX_NAME:
                    raise UnsafeFileError(
                        f"a tensor is named by a {quote(name)}, no text of {MAX_NAME} letters"
                    )
                yield name, value
        return
    seen = 0  # modules and what they name: shared ones count each time, as their tensors would
    pending: list[tuple[str, str, Any, int]] = [("", "", part, 0)]
    while pending:
        parent, own, module, depth = pending.pop()
        prefix = f"{parent}{own}." if depth else ""
        groups = {group: _named(module, group) for group in ("_parameters", "_buffers", "_modules")}
        seen += 1 + sum(map(len, groups.values()))
        if seen > MAX_ENTRIES or depth > MAX_DEPTH:
            raise UnsafeFileError(
                f"its modules are nested too deeply or in a circle, or more than {MAX_ENTRIES}"
            )
        for group, items in groups.items():
            if not all(
                isinstance(name, str) and len(prefix) + len(name) <= MAX_NAME for name in items
            ):
                what = f"of at most {MAX_NAME} letters"
                raise UnsafeFileError(
                    f"the {group} of {quote(module.name)} are not a dictionary by name {what}"
                )
        skipped = module.state.get("_non_persistent_buffers_set")
        for group in ("_parameters", "_buffers"):
            for name, value in groups[group].items():
                if isinstance(value, Leaf) and not (
                    group == "_buffers" and isinstance(skipped, set) and name in skipped
                ):
                    yield f"{prefix}{name}", value
        children = [
            (prefix, name, c, depth + 1)
            for name, c in groups["_modules"].items()
            if isinstance(c, Module)
        ]
        pending.extend(reversed(children))


def _named(module: Module, group: str) -> dict[Any, Any]:
    items = module.state.get(group, {})
    if not isinstance(items, dict):
        raise UnsafeFileError(f"the {group} of {quote(module.name)} are not a dictionary by name")
    return items


def _materialise(named: Iterator[tuple[str, Leaf]], budget: Budget) -> dict[str, np.ndarray]:
    made: dict[tuple, np.ndarray] = {}
    result: dict[str, np.ndarray] = {}
    for name, leaf in named:
        if len(result) >= MAX_ENTRIES:
            raise UnsafeFileError(f"it has more than {MAX_ENTRIES} tensors")
        budget.charge(len(name), "names unfold")
        key = (id(leaf),)
        if isinstance(leaf, Tensor):
            key = (id(leaf.storage), leaf.offset, leaf.shape, leaf.strides, leaf.dtype)
        if key not in made:
            budget.charge(leaf.nbytes, "tensors unfold", name)
            made[key] = np.array(leaf.array(), order="C")
        result[name] = made[key]
    return result
