"""The inert records of tensors, storages and numpy's arrays."""

import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

import ml_dtypes
import numpy as np

from ogdm_jax.interop.inert import Inert, Module, UnsafeFileError, quote

_PLAIN = "float64 float32 float16 complex64 complex128 int64 int32 int16 int8 bool"
_PLAIN += " uint8 uint16 uint32 uint64 bfloat16 float8_e4m3fn float8_e5m2"
_PLAIN += " float8_e4m3fnuz float8_e5m2fnuz"
# torch's name of a type -> numpy's type
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in _PLAIN.split()}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
}
# torch's other names of types, those of C
ALIASES = {
    name: STORAGES[f"{name.capitalize()}Storage"]
    for name in ("double", "float", "half", "long", "int", "short")
}
MAX_DIMENSIONS = 32  # of an array
# numbers of an array; also where a dimension of 0 leaves none, because numpy multiplies the others
MAX_COUNT = 2**48


@dataclass
class Storage(Inert):
    """A flat run of numbers.

    Attributes:
      dtype: of the numbers.
      count: how many they are.
      data: their bytes; None until the container (archive member, trailing bytes) is known.
      byteorder: of the file: "<" little-endian, ">" big-endian.
    """

    dtype: np.dtype
    count: int
    data: memoryview | None = None
    byteorder: str = "<"

    def array(self, dtype: np.dtype) -> np.ndarray:
        """A view of the file's bytes as numbers of a type, still in the file's byte order.

        Raises:
          UnsafeFileError: the bytes are not as many as declared, or no whole numbers of this type.
        """
        if self.data is None or len(self.data) != self.count * self.dtype.itemsize:
            have = "no" if self.data is None else len(self.data)
            raise UnsafeFileError(
                f"a storage of {self.count} {self.dtype} numbers has {have} bytes"
            )
        if len(self.data) % dtype.itemsize:
            raise UnsafeFileError(
                f"a storage of {len(self.data)} bytes does not hold whole {dtype} numbers"
            )
        return np.frombuffer(self.data, dtype)


@dataclass
class Tensor(Inert):
    """A tensor: element (i, j, ...) is storage[offset + i strides[0] + j strides[1] + ...]."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    def build(self, state: Any) -> None:
        """Attributes set on a tensor carry no numbers: dropped."""

    @property
    def nbytes(self) -> int:
        """The size of the array that `array` gives."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """A view of the storage, or of a big-endian file a copy in native byte order.

        Raises:
          UnsafeFileError: the tensor reaches beyond its storage.
        """
        flat = self.storage.array(self.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        if last >= len(flat):
            raise UnsafeFileError(
                f"a tensor of shape {self.shape} reaches element {last} of a storage of {len(flat)}"
            )
        steps = [
            s * self.dtype.itemsize if n > 1 else 0
            for n, s in zip(self.shape, self.strides, strict=True)
        ]
        view = np.lib.stride_tricks.as_strided(
            flat[self.offset :], self.shape, steps, writeable=False
        )
        return view.byteswap() if self.storage.byteorder == ">" else view


@dataclass
class ScriptModule(Module):
    """A module of a TorchScript archive, whose attributes lie side by side in one dictionary."""

    def build(self, state: Any) -> None:
        """Sorts the attributes into the groups that other modules have."""
        super().build(state)
        groups = {"_parameters": Tensor, "_modules": Module}
        self.state = {
            group: {name: value for name, value in self.state.items() if isinstance(value, kind)}
            for group, kind in groups.items()
        }


@dataclass
class NumpyType(Inert):
    """A numpy dtype in the two steps of its pickle; None: texts, dates or objects, no numbers."""

    dtype: np.dtype | None

    def build(self, state: Any) -> None:
        """Sets the byte order."""
        order = state[1] if isinstance(state, tuple) and len(state) > 2 else None
        if order not in ("<", ">", "|", "="):
            raise UnsafeFileError("a numpy dtype has an unknown byte order")
        if self.dtype is not None:
            self.dtype = self.dtype.newbyteorder("<" if order == "=" else order)


@dataclass
class NumpyArray(Inert):
    """A numpy array in the two steps of its pickle.

    Attributes:
      value: the numbers; None where it holds none.
      items: the objects that it holds instead.
    """

    value: Tensor | None = None
    items: list = field(default_factory=list)

    def build(self, state: Any) -> None:
        """Sets the numbers."""
        if not (isinstance(state, tuple) and len(state) == 5):
            raise UnsafeFileError("a numpy array has an unknown state")
        _, shape, dtype, fortran, data = state
        if isinstance(dtype, NumpyType) and dtype.dtype is None:
            self.items = data if isinstance(data, list) else []
        else:
            self.value = numpy_array(data, dtype, shape, bool(fortran))


def numpy_array(data: Any, kind: Any, shape: Any, fortran: bool) -> Tensor:
    """The tensor that a numpy array is; fortran: its first dimension changes fastest."""
    dtype = kind.dtype if isinstance(kind, NumpyType) else None
    if dtype is None or not isinstance(data, memoryview | bytes):
        raise UnsafeFileError("a numpy array is not stored as plain numbers")
    shape = shape_of(shape)
    count = math.prod(shape)
    if count * dtype.itemsize != len(data):
        raise UnsafeFileError(
            f"a numpy array of shape {shape} and type {dtype} has {len(data)} bytes"
        )
    order = ">" if dtype.byteorder == ">" else "<"
    storage = Storage(dtype.newbyteorder("="), count, memoryview(data), order)
    strides = strides_of(shape[::-1])[::-1] if fortran else strides_of(shape)
    return Tensor(storage, 0, shape, strides, storage.dtype)


def is_count(value: Any) -> bool:
    """Whether a value can be a number of numbers."""
    return type(value) is int and 0 <= value < MAX_COUNT


def dims(value: Any, what: str) -> tuple[int, ...]:
    """Declared sizes, if they are few and whole; what: their name in the message."""
    sizes = value if isinstance(value, tuple | list) else (value,)
    if len(sizes) > MAX_DIMENSIONS or not all(map(is_count, sizes)):
        raise UnsafeFileError(
            f"an array has {what} other than at most {MAX_DIMENSIONS} whole numbers from 0 up"
        )
    return tuple(sizes)


def shape_of(value: Any) -> tuple[int, ...]:
    """A declared shape, if numpy can hold it at all."""
    shape = dims(value, "shape")
    if math.prod(n for n in shape if n) >= MAX_COUNT:
        raise UnsafeFileError(f"an array has the impossible shape {quote(str(shape))}")
    return shape


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of numbers that lie one after the other, the last dimension's first."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def need(value: Any, kind: type | UnionType, what: str) -> Any:
    """The value, if it is of this kind; what: its name in the message."""
    if not isinstance(value, kind):
        raise UnsafeFileError(f"{what} has the type {type(value).__name__}")
    return value
