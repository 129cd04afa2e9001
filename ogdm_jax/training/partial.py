"""Fine-tuning onto another network: what fits of a checkpoint is copied, the rest is listed."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import traverse_util

from ogdm_jax.training import arrays
from ogdm_jax.training.checkpoint import CheckpointError, Snapshot, check_weights
from ogdm_jax.typing import PyTree

_LISTED = 8  # tensors of each kind that the log names


def fitting_weights(
    snapshot: Snapshot, params: PyTree, buffers: PyTree, which: str = "ema"
) -> tuple[PyTree, PyTree, str]:
    """The (params, buffers) of a checkpoint where they fit; arguments as checkpoint.load_weights.

    A tensor fits where name and shape are the same. Of networks with as many levels, for images of
    another size, level i is that of level i.

    Returns:
      Both trees, in which what does not fit is what was given, and a sentence that lists it.

    Raises:
      CheckpointError: damaged files, or nothing fits.
    """
    check_weights(snapshot, which)
    here = _flat({"params": params, "buffers": buffers})
    stored = _flat(arrays.item_tree(snapshot.path, "ema"))
    sides = _sides(stored, here)
    named = {_renamed(name, sides): name for name in stored}  # here -> there
    fits = {
        name: named[name]
        for name, leaf in here.items()
        if name in named and tuple(stored[named[name]].shape) == tuple(leaf.shape)
    }
    if not fits:
        raise CheckpointError(
            f"{snapshot.field}: no tensor of checkpoint {snapshot.path} fits this network; "
            "expected one of the same kind and width"
        )
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
    like |= {there: here[name] for name, there in fits.items()}
    tree = {"params": {}, "buffers": {}} | traverse_util.unflatten_dict(like, sep="/")
    read = _flat(arrays.read(snapshot.path, "ema", tree))
    if which == "params":
        read |= _flat({"params": arrays.read(snapshot.path, "params", tree["params"])})
    filled = here | {name: read[there] for name, there in fits.items()}
    found = traverse_util.unflatten_dict(filled, sep="/")
    said = (
        f"fine-tuning {len(fits)} of {len(here)} tensors of the {which} weights of {snapshot.path}"
    )
    fresh = [name for name in here if name not in fits]
    shape = lambda name: f"{name} {tuple(here[name].shape)}"
    said += _listed("fresh", [f"{shape(n)}{_there(stored, named.get(n))}" for n in fresh])
    said += _listed("not used", [there for n, there in named.items() if n not in here])
    return found["params"], found.get("buffers", {}), said


def _there(stored: Mapping[str, Any], name: str | None) -> str:
    return "" if name is None else f" (there {tuple(stored[name].shape)})"


def _listed(what: str, names: list[str]) -> str:
    some = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    return f"; {what}: {len(names)} ({some})" if names else ""


def _flat(tree: PyTree) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _sides(*names: Iterable[str]) -> dict[str, str]:
    """Side of a level there -> here: "8x8" -> "16x16"; {} where the levels are not as many."""
    there, here = (
        sorted({side for name in group for side in re.findall(r"(\d+)x\1(?=_)", name)}, key=int)
        for group in names
    )
    return dict(zip(there, here, strict=True)) if len(there) == len(here) else {}


def _renamed(name: str, sides: Mapping[str, str]) -> str:
    return re.sub(r"(\d+)x\1(?=_)", lambda m: "x".join([sides.get(m[1], m[1])] * 2), name)
