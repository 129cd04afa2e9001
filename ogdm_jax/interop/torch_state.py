"""Reads PyTorch checkpoints without PyTorch and without running anything that a file contains.

The layouts are those of containers.py, and all go through restricted_pickle, so the worst that a
hostile file can do is to be refused. Bytes are mapped, not loaded; every declared size is compared
with the real one before an array is made. What parsing copies and all arrays together may take at
most 4 times the file's size + 16 MiB, beside about 200 bytes an instruction of a pickle, of which a
file may have a million (restricted_pickle.Budget).
"""

import contextlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ogdm_jax import places
from ogdm_jax.interop import containers
from ogdm_jax.interop.containers import MAX_NAME
from ogdm_jax.interop.restricted_pickle import Budget, UnsafeFileError, quote
from ogdm_jax.interop.torch_records import Module, NumpyArray, Tensor

MAX_ENTRIES = 50_000  # tensors of a file; modules and what they name
MAX_DEPTH = 64  # of modules in modules
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
Leaf = Tensor | NumpyArray


@dataclass(frozen=True)
class TorchFile:
    """What a file holds.

    Attributes:
      path: where it is.
      layout: "zip", "legacy", "pickle" or "safetensors".
      left: bytes that its arrays may take.
      root: the object in it, made of inert records (Tensor, Module, dict, list, numbers, texts).
    """

    path: Path
    layout: str
    left: int
    root: Any


def read_torch(path: str | os.PathLike, entry: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their PyTorch names.

    Types are those of the file (bfloat16 through ml_dtypes), the memory order is C. Tensors that
    share one storage and layout come back as one array. Nothing from the file is executed, and no
    torch is needed.

    Args:
      path: `.pt` or `.pth` of any torch version since 0.4, `.safetensors`, EDM's
        `network-snapshot-*.pkl` (its `ema`) or `training-state-*.pt` (its `net`, without the
        optimiser).
      entry: the part to read of a file that has several; without it averaged weights come first
        (see PREFERRED).

    Raises:
      UnsafeFileError: (a ValueError) the file needs code to be read, or its sizes contradict each
        other; one sentence names the file and the reason.
      FileNotFoundError: there is no such file.
    """
    return tensors(open_torch(path), entry)


def tensors(file: TorchFile, entry: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a parsed file, as read_torch gives them."""
    with _naming(file.path):
        return _materialise(leaves(select(file.root, entry)), Budget(file.left))


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
            layout, root = containers.parse(data, handle, budget)
        return TorchFile(path, layout, budget.bytes, root)


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


def select(root: Any, entry: str | None = None) -> Module | dict:
    """The part of a parsed file that holds the weights: a module, or a dictionary with tensors.

    Raises:
      UnsafeFileError: there is no such part, or several without an entry that chooses one.
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
        # a file can name one part many times
        distinct = {id(value): value for value in root.values()}
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
    """(name, tensor) in the order of PyTorch's state_dict.

    Of a module: its parameters, its buffers that persist, then its children.

    Raises:
      UnsafeFileError: names that are no short texts, modules in a circle or more than MAX_ENTRIES.
    """
    if isinstance(part, Module):
        yield from _module_leaves(part)
        return
    for name, value in part.items():
        if isinstance(value, Leaf):
            if not isinstance(name, str) or len(name) > MAX_NAME:
                raise UnsafeFileError(
                    f"a tensor is named by a {quote(name)}, no text of {MAX_NAME} letters"
                )
            yield name, value


def _module_leaves(part: Module) -> Iterator[tuple[str, Leaf]]:
    seen = 0  # modules and what they name: shared ones count each time, as their tensors would
    pending: list[tuple[str, str, Any, int]] = [("", "", part, 0)]
    while pending:
        parent, own, module, depth = pending.pop()
        prefix = f"{parent}{own}." if depth else ""
        groups = {
            group: _named(module, group, MAX_NAME - len(prefix))
            for group in ("_parameters", "_buffers", "_modules")
        }
        seen += 1 + sum(map(len, groups.values()))
        if seen > MAX_ENTRIES or depth > MAX_DEPTH:
            raise UnsafeFileError(
                f"its modules are nested too deeply or in a circle, or more than {MAX_ENTRIES}"
            )
        skipped = module.state.get("_non_persistent_buffers_set")
        skipped = skipped if isinstance(skipped, set) else ()
        buffers = {n: value for n, value in groups["_buffers"].items() if n not in skipped}
        for name, value in [*groups["_parameters"].items(), *buffers.items()]:
            if isinstance(value, Leaf):
                yield f"{prefix}{name}", value
        children = [(prefix, name, c, depth + 1) for name, c in groups["_modules"].items()]
        pending.extend(child for child in reversed(children) if isinstance(child[2], Module))


def _named(module: Module, group: str, longest: int) -> dict[str, Any]:
    """A group of a module's attributes, by names of at most so many characters."""
    items = module.state.get(group, {})
    plain = isinstance(items, dict) and all(
        isinstance(name, str) and len(name) <= longest for name in items
    )
    if not plain:
        raise UnsafeFileError(
            f"the {group} of {quote(module.name)} are not a dictionary by name of at most "
            f"{MAX_NAME} letters"
        )
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
