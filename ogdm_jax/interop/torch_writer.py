"""Writes a state dict as torch.save does, without torch: torch.load(weights_only=True) takes it."""

import os
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np

_STORAGES = {"float64": "Double", "float32": "Float", "float16": "Half", "int64": "Long"}
_STORAGES |= {"int32": "Int", "uint8": "Byte", "bool": "Bool"}


def write(path: str | os.PathLike, state: Mapping[str, np.ndarray]) -> None:
    """A zip archive with the pickle of a dictionary of tensors, and one member a storage.

    Raises:
      ValueError: an array of a type that is not in the table.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        items = [(name, np.asarray(value, order="C")) for name, value in state.items()]
        body = b"".join(
            _text(name) + _tensor(str(i), value) for i, (name, value) in enumerate(items)
        )
        archive.writestr("archive/data.pkl", b"\x80\x02}(" + body + b"u.")
        archive.writestr("archive/byteorder", "little")
        for i, (_, value) in enumerate(items):
            little = value.astype(value.dtype.newbyteorder("<"), copy=False)
            with archive.open(f"archive/data/{i}", "w", force_zip64=True) as member:
                member.write(little.reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def _tuple(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _tensor(key: str, value: np.ndarray) -> bytes:
    """The instructions of a pickle that make a tensor of a storage."""
    if value.dtype.name not in _STORAGES:
        raise ValueError(f"state: {value.dtype} given; expected one of {', '.join(_STORAGES)}")
    kind = f"ctorch\n{_STORAGES[value.dtype.name]}Storage\n".encode()
    storage = [_text("storage"), kind, _text(key), _text("cpu"), _integer(value.size)]
    strides = [_integer(stride // value.itemsize) for stride in value.strides]
    parts = [_tuple(storage) + b"Q", _integer(0), _tuple(map(_integer, value.shape))]
    parts += [_tuple(strides), b"\x89", b"ccollections\nOrderedDict\n)R"]
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(parts) + b"R"
