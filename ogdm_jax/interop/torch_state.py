"""Reads PyTorch checkpoints without PyTorch and without running anything that a file contains.

The layouts are those of containers.py, and all go through restricted_pickle, so the worst that a
hostile file can do is to be refused. Bytes are mapped, not loaded; every declared size is compared
with the real one before an array is made. What parsing copies and all arrays together may take at
most 4 times the file's size + 16 MiB, beside about 200 bytes an instruction of a pickle, of which a
file may have a million (inert.Budget).
"""

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ogdm_jax import places, records
from ogdm_jax.interop import containers, diffusers, parts, strangers
from ogdm_jax.interop.inert import Budget, Odd, UnsafeFileError, quote
from ogdm_jax.interop.parts import MAX_ENTRIES, Leaf, Part


class MissingFileError(UnsafeFileError, FileNotFoundError):
    """There is no such file; one sentence names it."""


@dataclass(frozen=True)
class TorchFile:
    """What a file holds.

    Attributes:
      path: where it is.
      layout: "zip", "TorchScript", "legacy", "pickle", "safetensors", "npz", "npy" or "shards".
      left: bytes that its arrays may take.
      root: the object in it, made of inert records (Tensor, Module, dict, list, numbers, texts).
    """

    path: Path
    layout: str
    left: int
    root: Any

    def part(self, entry: str | None = None, kind: str | None = None) -> tuple[Part, list[Part]]:
        """The part that holds the weights and the other ones; see parts.choose."""
        with _naming(self.path):
            return parts.choose(self.root, Budget(self.left), entry, kind)

    def arrays(self, part: Part, copy: bool = True) -> dict[str, np.ndarray]:
        """The arrays of a part by name; without copy views of the mapped file, in any order."""
        with _naming(self.path):
            return _materialise(part.names, Budget(self.left), copy)


def read_torch(path: str | os.PathLike, entry: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their PyTorch names.

    Types are those of the file (bfloat16 through ml_dtypes), the memory order is C. Tensors that
    share one storage and layout come back as one array. Nothing from the file is executed, and no
    torch is needed.

    Args:
      path: `.pt` or `.pth` of any torch version since 0.4, `.safetensors` (also the folder or the
        index of its shards, and diffusers' folder of an autoencoder), `.npz`, EDM's
        `network-snapshot-*.pkl` (its `ema`) or `training-state-*.pt` (its `net`, without the
        optimiser).
      entry: the way to the part to read of a file that has several, such as "state.model"; without
        it parts.choose finds it, averaged weights first. Names are those below it, and of a known
        network those below the prefix under which it lies.

    Raises:
      UnsafeFileError: (a ValueError) the file needs code to be read, is of another kind, or its
        sizes contradict each other; one sentence names the file and the reason.
      FileNotFoundError: there is no such file.
    """
    file = open_torch(path)
    return file.arrays(file.part(entry)[0])


def open_torch(path: str | os.PathLike) -> TorchFile:
    """Parses a checkpoint into inert records without making any array. Errors as in read_torch."""
    path = places.local(path, "checkpoint")
    with _naming(path):
        path = (path.is_dir() and diffusers.weights(path)) or path
    if path.is_dir() or strangers.INDEX.search(path.name):
        return _open_shards(path)
    if not path.is_file():
        raise MissingFileError(
            f"{path}: there is no such file; expected .pt, .pth, .pkl, .safetensors or .npz"
        )
    with _naming(path):
        if path.stat().st_size == 0:
            raise UnsafeFileError("it is empty")
        with path.open("rb") as handle:
            data = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
            budget = Budget.of(len(data))
            layout, root = containers.parse(data, handle, budget, path.name)
        return TorchFile(path, layout, budget.bytes, root)


def _open_shards(path: Path) -> TorchFile:
    """A folder's (or an index file's) shards as one file."""
    if path.is_dir() and not any(path.iterdir()):
        raise MissingFileError(f"{path}: is an empty folder; there is no such file as a checkpoint")
    with _naming(path):
        shards = strangers.shards(path)
    folder = path if path.is_dir() else path.parent
    root: dict[str, Any] = {}
    left = 0
    for shard, names in shards.items():
        file = open_torch(folder / shard)
        left += file.left
        with _naming(file.path):
            there = file.root if isinstance(file.root, dict) else {}
            for name in names:
                if name not in there:
                    raise UnsafeFileError(f"it lacks {quote(name)}, which the index says it has")
                root[name] = there[name]
    return TorchFile(path, "shards", left, root)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Completes the sentence of a refusal, and refuses where memory runs out."""
    try:
        yield
    except (UnsafeFileError, records.RecordError) as error:
        said = str(error).removeprefix("file: ")
        raise UnsafeFileError(f"{path}: cannot be read: {said}.") from error.__cause__
    except MemoryError as error:
        raise UnsafeFileError(
            f"{path}: cannot be read: it needs more memory than there is."
        ) from error


def _materialise(names: Mapping[str, Leaf], budget: Budget, copy: bool) -> dict[str, np.ndarray]:
    made: dict[tuple, np.ndarray] = {}
    result: dict[str, np.ndarray] = {}
    for name, leaf in names.items():
        if len(result) >= MAX_ENTRIES:
            raise UnsafeFileError(f"it has more than {MAX_ENTRIES} tensors")
        if isinstance(leaf, Odd):
            raise UnsafeFileError(f"its tensor {quote(name)} is {leaf.what}")
        budget.charge(len(name), "names unfold")
        key = (id(leaf.storage), leaf.offset, leaf.shape, leaf.strides, leaf.dtype)
        if key not in made:
            budget.charge(leaf.nbytes, "tensors unfold", name)
            made[key] = np.array(leaf.array(), order="C") if copy else leaf.array()
        result[name] = made[key]
    return result
