"""The only globals a checkpoint may name, and the inert records that stand for them.

Tensors become (storage, offset, shape, strides); modules (torch.nn containers and NVIDIA's
self-describing "persistent" classes, whose source text is dropped unread) become a class name and a
dictionary of attributes. Nothing here imports what it names.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal

import ml_dtypes
import numpy as np

from ogdm_jax.interop.restricted_pickle import Admit, Global, Inert, UnsafeFileError, quote, scalar

_PLAIN = "float64 float32 float16 complex64 complex128 int64 int32 int16 int8 bool"
_PLAIN += " uint8 uint16 uint32 uint64 bfloat16 float8_e4m3fn float8_e5m2"
# torch's name of a type -> numpy's type
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in _PLAIN.split()}
_STORAGES = {
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
}
# torch's other names of types, those of C
_ALIASES = {
    name: _STORAGES[f"{name.capitalize()}Storage"]
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
class Module(Inert):
    """An nn.Module, loss or other object, kept as data.

    Attributes:
      name: the class that the file names.
      state: the attributes.
    """

    name: str
    state: dict[str, Any]

    def build(self, state: Any) -> None:
        """Sets the attributes."""
        if not isinstance(state, dict):
            raise UnsafeFileError(f"the state of {quote(self.name)} is not a dictionary")
        self.state = state


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
    """A numpy dtype in the two steps of its pickle."""

    dtype: np.dtype

    def build(self, state: Any) -> None:
        """Sets the byte order."""
        order = state[1] if isinstance(state, tuple) and len(state) > 2 else None
        if order not in ("<", ">", "|", "="):
            raise UnsafeFileError("a numpy dtype has an unknown byte order")
        self.dtype = self.dtype.newbyteorder("<" if order == "=" else order)


@dataclass
class NumpyArray(Inert):
    """A numpy array in the two steps of its pickle; also a 0-d one for scalars."""

    value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Sets the numbers."""
        if not (isinstance(state, tuple) and len(state) == 5):
            raise UnsafeFileError("a numpy array has an unknown state")
        _, shape, dtype, fortran, data = state
        self.value = _numpy_array(data, dtype, shape, "F" if fortran else "C")

    @property
    def nbytes(self) -> int:
        """The size of the array that `array` gives."""
        return 0 if self.value is None else self.value.nbytes

    def array(self) -> np.ndarray:
        """The numbers. Raises UnsafeFileError where the file gave none."""
        if self.value is None:
            raise UnsafeFileError("a numpy array has no content")
        return self.value


def _numpy_array(data: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> np.ndarray:
    if not (isinstance(dtype, NumpyType) and isinstance(data, memoryview | bytes)):
        raise UnsafeFileError("a numpy array is not stored as plain numbers")
    shape = shape_of(shape)
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise UnsafeFileError(
            f"a numpy array of shape {shape} and type {dtype.dtype} has {len(data)} bytes"
        )
    numbers = np.frombuffer(data, dtype.dtype).astype(dtype.dtype.newbyteorder("="))
    return numbers.reshape(shape, order=order)


def is_count(value: Any) -> bool:
    """Whether a value can be a number of numbers."""
    return type(value) is int and 0 <= value < MAX_COUNT


def _dims(value: Any, what: str) -> tuple[int, ...]:
    sizes = value if isinstance(value, tuple | list) else (value,)
    if len(sizes) > MAX_DIMENSIONS or not all(map(is_count, sizes)):
        raise UnsafeFileError(
            f"an array has {what} other than at most {MAX_DIMENSIONS} whole numbers from 0 up"
        )
    return tuple(sizes)


def shape_of(value: Any) -> tuple[int, ...]:
    """A declared shape, if numpy can hold it at all."""
    shape = _dims(value, "shape")
    if math.prod(n for n in shape if n) >= MAX_COUNT:
        raise UnsafeFileError(f"an array has the impossible shape {quote(str(shape))}")
    return shape


def _need(value: Any, kind: type | UnionType, what: str) -> Any:
    if not isinstance(value, kind):
        raise UnsafeFileError(f"{what} has the type {type(value).__name__}")
    return value


# What stands for each admitted call. Extra arguments (requires_grad, hooks, layout) carry no
# numbers.


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: Any = None
) -> Tensor:
    storage = _need(storage, Storage, "the storage of a tensor")
    shape, strides, (offset,) = shape_of(shape), _dims(strides, "strides"), _dims(offset, "offset")
    if len(shape) != len(strides):
        raise UnsafeFileError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    return Tensor(storage, offset, shape, strides, storage.dtype if dtype is None else dtype)


def _tensor_v3(*arguments: Any) -> Tensor:
    """As _tensor, with the type of the numbers behind requires_grad and hooks."""
    dtype = _need(arguments[6], np.dtype, "the type of a tensor")
    return _tensor(*arguments, dtype=dtype)


def _parameter(data: Any, *_: Any) -> Tensor:
    return _need(data, Tensor, "the data of a parameter")


def _ordered_dict(pairs: Any = ()) -> dict:
    result = {}
    for pair in _need(pairs, list | tuple, "the content of an ordered dictionary"):
        if not (
            isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str | int)
        ):
            raise UnsafeFileError(
                "an ordered dictionary holds something else than pairs of name and value"
            )
        result[scalar(pair[0])] = pair[1]
    return result


def _set_of(items: Any = ()) -> set:
    items = _need(items, list | tuple, "the content of a set")
    return {scalar(item) for item in items}


def _persistent_object(meta: Any) -> Module:
    """NVIDIA's persistence record.

    Its `module_src`, Python source that NVIDIA's own reader executes, is dropped unread.
    """
    meta = _need(meta, dict, "a persistence record")
    if meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise UnsafeFileError("a persistence record does not describe a class")
    module = Module(meta["class_name"], {})
    if meta.get("state") is not None:
        module.build(meta["state"])
    return module


def _numpy_dtype(code: Any, *_: Any) -> NumpyType:
    if not isinstance(code, str) or not re.fullmatch(
        r"[<>|=]?([iu][1248]|f[248]|c8|c16|b1|\?)", code
    ):
        raise UnsafeFileError(f"the numpy type {quote(code)} is not a plain number")
    return NumpyType(np.dtype(code))


def _numpy_scalar(dtype: Any, data: Any) -> float | int | str:
    value = _numpy_array(data, dtype, (), "C").item()
    return value if isinstance(value, int | float) else str(value)


def _numpy_reconstruct(*_: Any) -> NumpyArray:
    return NumpyArray()


def _numpy_frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    return NumpyArray(_numpy_array(data, dtype, shape, "F" if order == "F" else "C"))


def _latin1(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1":
        raise UnsafeFileError(f"it encodes a text as {quote(encoding)}")
    return _need(text, str, "a text to encode").encode("latin1")


def _device(*parts: Any) -> str:
    if len(parts) > 2 or not all(isinstance(part, str | int) for part in parts):
        raise UnsafeFileError("a torch.device is something else than a name and a number")
    return ":".join(str(part)[:16] for part in parts)


def _calls(
    load_nested: Callable[[Any], Storage],
) -> dict[str, tuple[Callable[..., Any] | None, bool]]:
    """Full name -> (what stands for the call, whether the name is a class)."""
    plain: dict[str, Callable[..., Any] | None] = {
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch.storage._load_from_bytes": load_nested,
        "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
        "_codecs.encode": _latin1,
        "numpy.ndarray": None,
    }
    for home in ("numpy.core", "numpy._core"):
        plain[f"{home}.multiarray.scalar"] = _numpy_scalar
        plain[f"{home}.multiarray._reconstruct"] = _numpy_reconstruct
        plain[f"{home}.numeric._frombuffer"] = _numpy_frombuffer
    classes: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": _ordered_dict,
        "builtins.set": _set_of,
        "dnnlib.util.EasyDict": _ordered_dict,
        "numpy.dtype": _numpy_dtype,
        "torch.Size": lambda sizes=(): _dims(sizes, "torch.Size"),
        "torch.device": _device,
    }
    return {name: (call, False) for name, call in plain.items()} | {
        name: (call, True) for name, call in classes.items()
    }


_MODULE = re.compile(r"torch\.nn\.modules\.[a-z_]+\.[A-Za-z0-9_]+")
_SCRIPTED = re.compile(r"__torch__(\.[A-Za-z_][A-Za-z0-9_]*)+")
_LIST = re.compile(r"torch\.jit\._pickle\.(build_(int|double|bool|tensor)list|restore_type_tag)")
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def _list(values: Any, *_: Any) -> Any:
    return values


def admit_with(load_nested: Callable[[Any], Storage], scripted: bool = False) -> Admit:
    """The `admit` of restricted_pickle.load.

    Args:
      load_nested: reads the torch file that a call of `_load_from_bytes` holds.
      scripted: the file is a TorchScript archive: classes of its program are admitted, as names of
        inert records.
    """
    calls = _calls(load_nested)

    def admit(module: str, name: str) -> Global | np.dtype | Storage:
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full in calls:
            call, is_class = calls[full]
            return Global(full, call, is_class)
        home, _, leaf = full.rpartition(".")
        if home in ("torch", "torch.cuda", "torch.storage") and leaf in _STORAGES:
            return Storage(DTYPES[_STORAGES[leaf]], 0)
        if home == "torch" and _ALIASES.get(leaf, leaf) in DTYPES:
            return DTYPES[_ALIASES.get(leaf, leaf)]
        if _MODULE.fullmatch(full):
            return Global(full, lambda *_: Module(leaf, {}), True)
        if scripted and _SCRIPTED.fullmatch(full):
            return Global(full, lambda *_: ScriptModule(leaf, {}), True)
        if scripted and _LIST.fullmatch(full):
            return Global(full, _list, False)
        raise UnsafeFileError(
            f"it names {quote(full)}, which is not among the constructors of tensors"
        )

    return admit
