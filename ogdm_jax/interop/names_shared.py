"""What every name map needs: layouts of tensors, orders of attention channels, a strict exchange.

A name map is a list of `Entry`, one for each tensor of a network: its name in PyTorch and its path
in our variables.
"""

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ogdm_jax.typing import PyTree

Path = tuple[str, ...]
Network = TypeVar("Network", bound=nn.Module)

# Axes of the first dimension of a qkv kernel in a checkpoint: h heads, c channels of a head,
# x = {q, k, v}. Ours is "xhc" everywhere, in which q, k and v are contiguous.
EDM_ORDER, LEGACY_ORDER, NEW_ORDER = "hcx", "hxc", "xhc"
# the last part of our paths -> that of PyTorch's names
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
LEAVES |= {"mean": "running_mean", "var": "running_var", "embedding": "weight"}
_SIDE = 4  # pixels: the side of the image in front of a "chw" layer


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor under both of its names.

    Attributes:
      name: in the PyTorch state dict.
      path: (collection, module, ..., leaf) in our variables.
      shape: ours.
      layout: how PyTorch stores it. "auto": HWIO as OIHW, [in, out] as [out, in], vectors as they
        are. "conv1d": as a one-dimensional convolution of width 1, [out, in, 1]. "chw": a dense
        kernel behind a flattened 4x4 image, whose inputs PyTorch counts as (c, h, w) and we as
        (h, w, c). "same": as ours.
      heads: attention heads of a qkv layer; 0 for every other layer.
      order: of a qkv layer: the order of the checkpoint's channels.
      row, rows: of a tensor that is one row of our array: which one, and of how many; shape is a
        row's.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    layout: str = "auto"
    heads: int = 0
    order: str = NEW_ORDER
    row: int = 0
    rows: int = 0

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The tensor's shape in PyTorch."""
        return self._laid_out(np.broadcast_to(np.float32(0), self.shape)).shape

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """Our array as PyTorch stores it."""
        value = _reorder(self._laid_out(np.asarray(value)), self.heads, NEW_ORDER, self.order)
        return np.ascontiguousarray(value)

    def to_flax(self, value: np.ndarray) -> np.ndarray:
        """PyTorch's array as ours, at least float32 (some checkpoints are in half precision).

        Raises:
          ValueError: another shape.
        """
        value = np.asarray(value)
        if value.shape != self.torch_shape:
            raise ValueError(
                f"state: {self.name} has shape {value.shape}; the network expects "
                f"{self.torch_shape}"
            )
        value = value.astype(np.promote_types(value.dtype, np.float32))
        value = _reorder(value, self.heads, self.order, NEW_ORDER)
        if self.layout == "chw":
            out = value.shape[0]
            value = value.reshape(out, -1, _SIDE, _SIDE).transpose(2, 3, 1, 0)
        elif self.layout != "same" and len(self.shape) > 1:
            value = value[..., 0] if self.layout == "conv1d" else value
            value = np.moveaxis(np.swapaxes(value, 0, 1), (0, 1), (-2, -1))
        return np.ascontiguousarray(value.reshape(self.shape))

    def _laid_out(self, value: np.ndarray) -> np.ndarray:
        if self.layout == "same" or value.ndim < 2:
            return value
        if self.layout == "conv1d":
            return value.reshape(value.shape[-2:]).T[..., None]
        if self.layout == "chw":
            out = value.shape[-1]
            return value.reshape(_SIDE, _SIDE, -1, out).transpose(3, 2, 0, 1).reshape(out, -1)
        return np.swapaxes(np.moveaxis(value, (-2, -1), (0, 1)), 0, 1)


def _reorder(value: np.ndarray, heads: int, source: str, target: str) -> np.ndarray:
    """Permutes the first dimension between two orders of the axes h, c, x."""
    if not heads or source == target:
        return value
    sizes = {"h": heads, "x": 3, "c": value.shape[0] // 3 // heads}
    split = value.reshape(*(sizes[a] for a in source), *value.shape[1:])
    axes = [source.index(a) for a in target]
    return split.transpose(*axes, *range(3, split.ndim)).reshape(value.shape)


def _traced_shapes(
    network: nn.Module, *inputs: jax.ShapeDtypeStruct
) -> Mapping[Path, tuple[int, ...]]:
    """{path: shape} of all variables of a network, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = _flat(jax.eval_shape(network.init, key, *inputs))
    return types.MappingProxyType({path: tuple(leaf.shape) for path, leaf in variables.items()})


# A trace of the network takes a second, and both directions of a name map ask for it. Modules of
# flax can be hashed, but their type denies it.
variable_shapes: Callable[..., Mapping[Path, tuple[int, ...]]] = functools.lru_cache(maxsize=32)(
    _traced_shapes
)


def _flat(variables: PyTree) -> dict[Path, Any]:
    return cast(dict[Path, Any], traverse_util.flatten_dict(dict(variables)))


def image(side: int, channels: int = 3) -> jax.ShapeDtypeStruct:
    """A batch of one image for `variable_shapes`."""
    return jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)


def image_input(network: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """A batch of one for `variable_shapes`: x and c_noise."""
    noise = jax.ShapeDtypeStruct((1,), jnp.float32)
    return image(network.img_resolution, network.img_channels), noise


def make(cls: type[Network], settings: Mapping[str, Any]) -> Network:
    """The network with these attributes; lists, which JSON has, become tuples.

    Raises:
      ValueError: an attribute that it does not have.
    """
    unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown setting {unknown[0]!r}")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})


def path_entry(path: Path, shape: tuple[int, ...]) -> Entry:
    """A tensor whose name is its path; "fc_bias" is the bias of fc."""
    module, _, leaf = re.sub("_bias$", ".bias", ".".join(path[1:])).rpartition(".")
    layout = "same" if leaf == "embedding" else "auto"  # a table: [rows, width] in both
    return Entry(f"{module}.{LEAVES[leaf]}", path, shape, layout)


def path_entries(
    network: nn.Module, *inputs: jax.ShapeDtypeStruct, rename: Callable[[str], str] = str
) -> list[Entry]:
    """Every tensor of a network whose names are its paths, renamed, in the names' order."""
    shapes = variable_shapes(network, *inputs)
    found = [path_entry(path, shape) for path, shape in shapes.items()]
    found = [dataclasses.replace(entry, name=rename(entry.name)) for entry in found]
    return sorted(found, key=lambda entry: entry.name)


def to_flax(
    state: Mapping[str, np.ndarray], entries: Iterable[Entry], what: str, ignore: Iterable[str] = ()
) -> PyTree:
    """Variables of a network from a PyTorch state dict: none missing, none left over.

    Args:
      state: {PyTorch name: array}.
      entries: the network's tensors.
      what: the kind of network, for the messages.
      ignore: names that the state may have but the network does not need.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    entries = list(entries)
    left = set(state) - set(ignore)
    missing = [e.name for e in entries if e.name not in left]
    if missing:
        raise ValueError(
            f"state: {missing[0]} is missing ({len(missing)} of {len(entries)} tensors); expected "
            f"{what} of this size"
        )
    extra = sorted(left - {e.name for e in entries})
    if extra:
        raise ValueError(
            f"state: {extra[0]} has no place in the network ({len(extra)} such); expected {what} "
            "of this size"
        )
    found: dict[Path, np.ndarray] = {}
    for e in entries:
        value = e.to_flax(state[e.name])
        if not e.rows:
            found[e.path] = value
            continue
        if e.path not in found:
            found[e.path] = np.empty((e.rows, *e.shape), value.dtype)
        found[e.path][e.row] = value  # so that there are never two copies of a big network
    return traverse_util.unflatten_dict(found)


def to_torch(variables: PyTree, entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """{PyTorch name: array} of the collections that `variables` has.

    {"params": gradients} gives the gradients under PyTorch's names.
    """
    flat = _flat(jax.device_get(variables))
    there = (e for e in entries if e.path[0] in variables)
    return {e.name: e.to_torch(flat[e.path][e.row] if e.rows else flat[e.path]) for e in there}
