"""Writes PyTorch's file layouts byte by byte, without torch: for the tests of the reader, friendly
and hostile.
"""

import io
import json
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclass
class Name:
    """A global."""

    module: str
    name: str


@dataclass
class Call:
    """function(*args) by REDUCE, or a new object of a class by NEWOBJ; state follows by BUILD."""

    function: Any
    args: Any = ()
    state: Any = None
    new: bool = False


@dataclass
class Reference:
    """torch's persistent id."""

    value: Any


@dataclass
class Raw:
    """Instructions as they are."""

    code: bytes


def emit(value: Any) -> bytes:
    """The instructions (protocol 2 to 4) that leave value on the stack."""
    if isinstance(value, Raw):
        return value.code
    if value is None or value is True or value is False:
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(emit, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(emit, value)) + b"e"
    if isinstance(value, set):
        return b"\x8f(" + b"".join(map(emit, sorted(value))) + b"\x90"
    if isinstance(value, dict):
        return b"}(" + b"".join(emit(key) + emit(item) for key, item in value.items()) + b"u"
    if isinstance(value, Name):
        return b"c" + value.module.encode() + b"\n" + value.name.encode() + b"\n"
    if isinstance(value, Reference):
        return emit(value.value) + b"Q"
    assert isinstance(value, Call), value
    made = emit(value.function) + emit(value.args) + (b"\x81" if value.new else b"R")
    return made if value.state is None else made + emit(value.state) + b"b"


def pickled(value: Any) -> bytes:
    return b"\x80\x04" + emit(value) + b"."


STORAGES = {
    "f4": "FloatStorage",
    "f8": "DoubleStorage",
    "f2": "HalfStorage",
    "i8": "LongStorage",
    "u1": "ByteStorage",
}


class Book:
    """Hands out tensors as pickle values and collects their storages: key -> (count, bytes)."""

    def __init__(self, order: str = "<"):
        self.order, self.storages = order, {}

    def storage(self, flat: np.ndarray) -> Reference:
        key, kind = str(len(self.storages)), f"{flat.dtype.kind}{flat.dtype.itemsize}"
        self.storages[key] = (flat.size, flat.astype(flat.dtype.newbyteorder(self.order)).tobytes())
        return Reference(("storage", Name("torch", STORAGES[kind]), key, "cpu", flat.size))

    def tensor(self, array: np.ndarray) -> Call:
        strides = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
        return view(self.storage(array.reshape(-1)), 0, array.shape, tuple(strides))


def view(storage: Any, offset: Any, shape: Any, strides: Any) -> Call:
    """A tensor over a storage."""
    args = (storage, offset, shape, strides, False, Call(Name("collections", "OrderedDict")))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), args)


def parameter(tensor: Call) -> Call:
    return Call(
        Name("torch._utils", "_rebuild_parameter"),
        (tensor, True, Call(Name("collections", "OrderedDict"))),
    )


def zip_file(
    root: Any, book: Book, extra: dict[str, bytes] | None = None, compress: bool = False
) -> bytes:
    """torch.save's archive. extra: further members, by full name."""
    out = io.BytesIO()
    with zipfile.ZipFile(
        out, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    ) as archive:
        members = {
            "archive/data.pkl": pickled(root),
            "archive/byteorder": b"little" if book.order == "<" else b"big",
        }
        members |= {f"archive/data/{key}": data for key, (_, data) in book.storages.items()}
        for name, data in (members | {"archive/version": b"3\n"} | (extra or {})).items():
            archive.writestr(
                zipfile.ZipInfo(name),
                data,
                zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED,
            )
    return out.getvalue()


def legacy_file(root: Any, book: Book) -> bytes:
    """torch.save before 1.6 (and of storages inside plain pickles). References get the sixth field
    of that layout.
    """
    system = {
        "protocol_version": VERSION,
        "little_endian": book.order == "<",
        "type_sizes": {"long": 4},
    }
    parts = [
        pickled(MAGIC),
        pickled(VERSION),
        pickled(system),
        pickled(root),
        pickled(list(book.storages)),
    ]
    return b"".join(parts) + b"".join(
        struct.pack("<q", n) + data for n, data in book.storages.values()
    )


def legacy_storage(flat: np.ndarray) -> Call:
    """A storage inside a plain pickle: a byte string that holds a whole legacy file."""
    book = Book()
    return Call(Name("torch.storage", "_load_from_bytes"), (legacy_file(book.storage(flat), book),))


def pickled_tensor(array: np.ndarray) -> Call:
    strides = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
    return view(legacy_storage(array.reshape(-1)), 0, array.shape, tuple(strides))


def persistent(
    name: str, state: dict, source: str = "raise SystemExit('the source was executed')"
) -> Call:
    """An object of NVIDIA's persistence decorator, with the Python source that the original
    executes at load.
    """
    easy = Call(Name("dnnlib.util", "EasyDict"), (), new=True)
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}
    record = Raw(emit(easy) + b"(" + b"".join(emit(k) + emit(v) for k, v in meta.items()) + b"u")
    return Call(Name("torch_utils.persistence", "_reconstruct_persistent_obj"), (record,))


def module_state(parameters: dict, buffers: dict, modules: dict, **attributes: Any) -> dict:
    """An nn.Module's __dict__."""
    return {
        "training": False,
        "_parameters": parameters,
        "_buffers": buffers,
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": Call(Name("collections", "OrderedDict")),
        "_modules": modules,
        **attributes,
    }


def network(
    state: dict[str, np.ndarray], tensor: Any, name: str = "EDMPrecond", **attributes: Any
) -> Call:
    """A tree of persistent modules with the names of a state dict; tensor makes the pickle value of
    an array.
    """
    own = {key: parameter(tensor(value)) for key, value in state.items() if "." not in key}
    children: dict[str, dict] = {}
    for key, value in state.items():
        if "." in key:
            head, _, rest = key.partition(".")
            children.setdefault(head, {})[rest] = value
    modules = {key: network(value, tensor, "Part") for key, value in children.items()}
    return persistent(name, module_state(own, {}, modules, **attributes))


def safetensors_file(header: dict | bytes, body: bytes = b"\0" * 8) -> bytes:
    """Of a header as a dictionary or as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
