"""What every name map needs: tensor layouts, the order of attention channels, and a strict exchange
of tensors.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ogdm_jax.typing import PyTree

Path = tuple[str, ...]

# Axes of the first dimension of a qkv kernel in a checkpoint: h heads, c channels a head, x = {q,
# k, v}. Ours is "xhc" everywhere, in which q, k and v are contiguous.
EDM_ORDER, LEGACY_ORDER, NEW_ORDER = "hcx", "hxc", "xhc"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor under both of its names.

    Attributes:
      name: in the PyTorch state dict.   path: (collection, module, ..., leaf) in our variables.
        shape: ours.
      layout: how PyTorch stores it. "auto": HWIO as OIHW, [in, out] as [out, in], vectors as they
        are; "conv1d": as a one-dimensional convolution of width 1 [out, in, 1]; "same": as ours.
      heads, order: of a qkv layer: attention heads and the checkpoint's channel order; heads 0 =
        not a qkv layer.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    layout: str = "auto"
    heads: int = 0
    order: str = NEW_ORDER

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return self._laid_out(np.broadcast_to(np.float32(0), self.shape)).shape

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        value = _reorder(self._laid_out(np.asarray(value)), self.heads, NEW_ORDER, self.order)
        return np.ascontiguousarray(value)

    def to_flax(self, value: np.ndarray) -> np.ndarray:
        value = np.asarray(value)
        if value.shape != self.torch_shape:
            raise ValueError(
                f"state: {self.name} has shape {value.shape}; the network expects "
                f"{self.torch_shape}"
            )
        value = value.astype(
            np.promote_types(value.dtype, np.float32)
        )  # half-precision checkpoints
        value = _reorder(value, self.heads, self.order, NEW_ORDER)
        if self.layout != "same" and len(self.shape) > 1:
            value = value[..., 0] if self.layout == "conv1d" else value
            value = np.moveaxis(np.swapaxes(value, 0, 1), (0, 1), (-2, -1))
        return np.ascontiguousarray(value.reshape(self.shape))

    def _laid_out(self, value: np.ndarray) -> np.ndarray:
        if self.layout == "same" or value.ndim < 2:
            return value
        if self.layout == "conv1d":
            return value.reshape(value.shape[-2:]).T[..., None]
        return np.swapaxes(np.moveaxis(value, (-2, -1), (0, 1)), 0, 1)


def _reorder(value: np.ndarray, heads: int, source: str, target: str) -> np.ndarray:
    """Permutes the first dimension between two orders of the axes h, c, x."""
    if not heads or source == target:
        return value
    sizes = {"h": heads, "x": 3, "c": value.shape[0] // 3 // heads}
    split = value.reshape(*(sizes[a] for a in source), *value.shape[1:])
    axes = [source.index(a) for a in target]
    return split.transpose(*axes, *range(3, split.ndim)).reshape(value.shape)


def variable_shapes(
    network: nn.Module, *inputs: jax.ShapeDtypeStruct
) -> dict[Path, tuple[int, ...]]:
    """{path: shape} of all variables of a network, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(network.init, key, *inputs)
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables).items()}


def image_input(network: nn.Module) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """A batch of one for `variable_shapes`: x and c_noise."""
    side, channels = network.img_resolution, network.img_channels
    struct = jax.ShapeDtypeStruct
    return struct((1, side, side, channels), jnp.float32), struct((1,), jnp.float32)


def to_flax(
    state: Mapping[str, np.ndarray], entries: Iterable[Entry], what: str, ignore: Iterable[str] = ()
) -> PyTree:
    """Variables of a network from a PyTorch state dict: every tensor in its place, none missing,
    none left over.

    Args:
      entries: the network's tensors.   what: the kind of network, for the messages.
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
    return traverse_util.unflatten_dict({e.path: e.to_flax(state[e.name]) for e in entries})


def to_torch(variables: PyTree, entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """{PyTorch name: array} of the collections that `variables` has: {"params": gradients} maps
    gradients.
    """
    flat = traverse_util.flatten_dict(dict(variables))
    return {e.name: e.to_torch(flat[e.path]) for e in entries if e.path[0] in variables}
