"""What stands for the globals that a checkpoint names: inert records.

Tensors become (storage, offset, shape, strides); every other object (modules, paths, settings,
NVIDIA's self-describing "persistent" classes, whose source text is dropped unread) becomes a class
name and what the file says of it. Nothing here imports what it names, and what could act on a
machine is refused by name although it would not be called.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ogdm_jax.interop.inert import Global, Module, Odd, UnsafeFileError, quote, scalar
from ogdm_jax.interop.restricted_pickle import Admit
from ogdm_jax.interop.torch_records import (
    ALIASES,
    DTYPES,
    STORAGES,
    NumpyArray,
    NumpyType,
    ScriptModule,
    Storage,
    Tensor,
    dims,
    need,
    numpy_array,
    shape_of,
)

# What stands for each admitted call. Extra arguments (requires_grad, hooks, layout) carry no
# numbers.


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: Any = None
) -> Tensor:
    storage = need(storage, Storage, "the storage of a tensor")
    shape, strides, (offset,) = shape_of(shape), dims(strides, "strides"), dims(offset, "offset")
    if len(shape) != len(strides):
        raise UnsafeFileError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    return Tensor(storage, offset, shape, strides, storage.dtype if dtype is None else dtype)


def _tensor_v3(*arguments: Any) -> Tensor | Odd:
    """As _tensor, with the type of the numbers behind requires_grad and hooks."""
    dtype = arguments[6]
    if isinstance(dtype, Global):
        return Odd(f"of the type {quote(dtype.name)}, which is not read; save it as float32")
    return _tensor(*arguments, dtype=need(dtype, np.dtype, "the type of a tensor"))


def _parameter(data: Any, *_: Any) -> Tensor | Odd:
    return need(data, Tensor | Odd | NumpyArray, "the data of a parameter")


# torch's function that rebuilds a tensor of another kind -> what it is, and what to do
_ODD = {
    "sparse_tensor": "sparse; save its to_dense()",
    "sparse_csr_tensor": "sparse; save its to_dense()",
    "nested_tensor": "a nested tensor; save its parts",
    "qtensor": "quantised; save its dequantize(), or the model from before it was quantised",
    "meta_tensor_no_storage": "on the meta device, without numbers; save it once it is loaded",
}


PARTIAL = "a part of one process ({}); save the full tensors"


def _odd(what: str) -> Callable[..., Odd]:
    return lambda *_: Odd(what)


def _from_type(function: Any, cls: Any, arguments: Any, *_: Any) -> Tensor | Odd:
    """A tensor of a subclass (of a parameter, say): the subclass is dropped."""
    name = getattr(function, "name", "")
    if not re.fullmatch(r"torch\._utils\._rebuild_[a-z_0-9]+", name) or "from_type" in name:
        raise UnsafeFileError(f"it names {quote(name)} as what rebuilds a tensor")
    if not isinstance(arguments, tuple):
        raise UnsafeFileError("the arguments that rebuild a tensor are no tuple")
    if name.endswith("_wrapper_subclass"):
        return Odd(PARTIAL.format(quote(getattr(cls, "name", cls).rpartition(".")[2])))
    return function.call(*arguments)


def _from_numpy(*arguments: Any) -> NumpyArray:
    """A tensor of a device that torch saves through numpy (XLA's)."""
    if not arguments or not isinstance(arguments[0], NumpyArray):
        raise UnsafeFileError(
            "it names torch._utils._rebuild_device_tensor_from_numpy, but gives no array"
        )
    return arguments[0]


def _reconstruct(cls: Any, _base: Any, state: Any = None) -> Any:
    """An object as protocols 0 and 1 write it."""
    if not isinstance(cls, Global) or not cls.is_class or cls.call is None:
        raise UnsafeFileError(f"it makes an object of {quote(getattr(cls, 'name', cls))}")
    made = cls.call()
    if isinstance(made, Module) and isinstance(state, dict | list | tuple):
        made.build(state if isinstance(state, dict) else (state,))
    return made if isinstance(made, Module) or not isinstance(state, dict) else state


def _attribute(owner: Any, name: Any) -> Global:
    """A method that stands in a file as its owner and its name."""
    if not isinstance(owner, Module | Global) or not isinstance(name, str):
        raise UnsafeFileError("it names builtins.getattr, which could reach anything")
    return _unknown(f"{owner.name[:80]}.{name[:80]}")


def _ordered_dict(pairs: Any = ()) -> dict:
    result = {}
    for pair in need(pairs, list | tuple, "the content of an ordered dictionary"):
        if not (
            isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str | int)
        ):
            raise UnsafeFileError(
                "an ordered dictionary holds something else than pairs of name and value"
            )
        result[scalar(pair[0])] = pair[1]
    return result


def _set_of(items: Any = ()) -> set:
    items = need(items, list | tuple, "the content of a set")
    return {scalar(item) for item in items}


def _persistent_object(meta: Any) -> Module:
    """NVIDIA's persistence record.

    Its `module_src`, Python source that NVIDIA's own reader executes, is dropped unread.
    """
    meta = need(meta, dict, "a persistence record")
    if meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise UnsafeFileError("a persistence record does not describe a class")
    module = Module(meta["class_name"], {})
    if meta.get("state") is not None:
        module.build(meta["state"])
    return module


def _numpy_dtype(code: Any, *_: Any) -> NumpyType:
    if isinstance(code, str) and re.fullmatch(r"[<>|=]?([USVOMm]\d*)(\[\w+\])?", code):
        return NumpyType(None)
    if not isinstance(code, str) or not re.fullmatch(
        r"[<>|=]?([iu][1248]|f[248]|c8|c16|b1|\?)", code
    ):
        raise UnsafeFileError(f"the numpy type {quote(code)} is not a plain number")
    return NumpyType(np.dtype(code))


def _numpy_scalar(dtype: Any, data: Any) -> float | int | str | Module:
    if isinstance(dtype, NumpyType) and dtype.dtype is None:
        return Module("a text, date or object of numpy")
    value = numpy_array(data, dtype, (), False).array().item()
    return value if isinstance(value, int | float) else str(value)


def _numpy_frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    return NumpyArray(numpy_array(data, dtype, shape, order == "F"))


def _latin1(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1":
        raise UnsafeFileError(f"it encodes a text as {quote(encoding)}")
    return need(text, str, "a text to encode").encode("latin1")


def _device(*parts: Any) -> str:
    if len(parts) > 2 or not all(isinstance(part, str | int) for part in parts):
        raise UnsafeFileError("a torch.device is something else than a name and a number")
    return ":".join(str(part)[:16] for part in parts)


def _functions(load_nested: Callable[[Any], Storage]) -> dict[str, Callable[..., Any] | None]:
    """Full name of a function -> what stands for its call."""
    found: dict[str, Callable[..., Any] | None] = {
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._utils._rebuild_device_tensor_from_numpy": _from_numpy,
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "torch.storage._load_from_bytes": load_nested,
        "torch.serialization._get_layout": lambda *_: None,
        "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
        "_codecs.encode": _latin1,
        "builtins.getattr": _attribute,
        "copyreg._reconstructor": _reconstruct,
        "numpy.ndarray": None,
    } | {f"torch._utils._rebuild_{name}": _odd(what) for name, what in _ODD.items()}
    for home in ("numpy.core", "numpy._core"):
        found[f"{home}.multiarray.scalar"] = _numpy_scalar
        found[f"{home}.multiarray._reconstruct"] = lambda *_: NumpyArray()
        found[f"{home}.numeric._frombuffer"] = _numpy_frombuffer
    return found


_CLASSES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": lambda items=None: need(items or {}, dict, "the counts"),
    "collections.defaultdict": lambda *_: {},
    "builtins.set": _set_of,
    "builtins.frozenset": _set_of,
    "builtins.dict": lambda: {},
    "dnnlib.util.EasyDict": _ordered_dict,
    "numpy.dtype": _numpy_dtype,
    "torch.Size": lambda sizes=(): dims(sizes, "torch.Size"),
    "torch.device": _device,
    "torch.ScriptObject": lambda *_: Module("ScriptObject"),
}
_LIST = re.compile(r"torch\.jit\._pickle\.(build_(int|double|bool|tensor)list|restore_type_tag)")
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# What acts on a machine or makes code; files of people name none of it.
_ACTING = re.compile(
    r"(os|posix|nt|pty|sys|subprocess|importlib|imp|runpy|pickle|_pickle|io|_io|socket|shutil|ctypes"
    r"|_ctypes|code|codeop|marshal|types|webbrowser|multiprocessing|_posixsubprocess|_thread|signal"
    r"|tempfile|pip|pkgutil|zipimport|inspect|gc|ast|pdb|bdb)(\..*)?"
)
_HARMLESS = re.compile(
    r"types\.SimpleNamespace|builtins\.(bool|bytearray|bytes|complex|float|int|list|object|range|str"
    r"|reversed|slice|xrange|tuple|type|Ellipsis|NotImplemented|[A-Z]\w+(Error|Exception|Warning))"
)
# packages whose functions make what is meant to be read: unknown ones are refused once called
_TORCH = re.compile(r"(torch|numpy|torch_utils|dnnlib)\b(?!\.(random|distributed)\.).*")


def _unknown(full: str, kind: type[Module] = Module) -> Global:
    """What stands for a name that is none of ours: a class makes a record, a function nothing."""
    leaf = full.rpartition(".")[2]

    def call(*arguments: Any) -> Module:
        if _TORCH.fullmatch(full) and leaf == leaf.lower():
            raise _refusal(full)
        return kind(leaf, {}, list(arguments))

    return Global(full, call, True)


def _refusal(full: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"it names {quote(full)}, which is not among the constructors of tensors"
    )


def admit_with(load_nested: Callable[[Any], Storage], scripted: bool = False) -> Admit:
    """The `admit` of restricted_pickle.load.

    Args:
      load_nested: reads the torch file that a call of `_load_from_bytes` holds.
      scripted: the file is a TorchScript archive, whose modules keep their attributes otherwise.
    """
    functions = _functions(load_nested)

    def admit(module: str, name: str) -> Global | np.dtype | Storage:
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full in functions:
            return Global(full, functions[full])
        if full in _CLASSES:
            return Global(full, _CLASSES[full], is_class=True)
        home, _, leaf = full.rpartition(".")
        if home in ("torch", "torch.cuda", "torch.storage") and leaf in STORAGES:
            return Storage(DTYPES[STORAGES[leaf]], 0)
        if home == "torch" and ALIASES.get(leaf, leaf) in DTYPES:
            return DTYPES[ALIASES.get(leaf, leaf)]
        if full.startswith("__torch__.") and not scripted:
            raise _refusal(full)
        if scripted and _LIST.fullmatch(full):
            return Global(full, lambda values, *_: values)
        acting = _ACTING.fullmatch(home) or home == "builtins"
        if acting and not _HARMLESS.fullmatch(full):
            raise _refusal(full)
        return _unknown(full, ScriptModule if full.startswith("__torch__.") else Module)

    return admit
