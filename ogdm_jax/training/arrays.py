"""The arrays of a checkpoint, read through orbax; what goes wrong there is one sentence."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ogdm_jax.training import saving
from ogdm_jax.training.steps import CheckpointError
from ogdm_jax.typing import PyTree


def read(step: epath.Path, item: str, like: PyTree) -> Any:
    """The tree of an item.

    Args:
      step: the folder of the checkpoint.
      item: its name.
      like: arrays or shapes; shardings there are kept.

    Raises:
      CheckpointError: the files are damaged.
    """
    with ocp.StandardCheckpointer() as reader:
        return guard(step, lambda: reader.restore(step / item, _shapes(like)))


def same_network(step: epath.Path, wanted: PyTree, field: str) -> None:
    """Compares names and shapes before anything is read.

    Of a network that does not fit, orbax says less, and that in several threads.
    """
    found = item_tree(step, "ema")
    there, here = tensors(found), tensors(wanted)
    names = here | there
    differ, first = difference(there, here)
    if differ:
        partial = (
            f", or --config.init.partial=true, which copies the {len(names) - len(differ)} that fit"
            if field.endswith("init.workdir")
            else ""
        )
        raise CheckpointError(
            f"{field}: checkpoint {step} is of another network ({first}; "
            f"{len(differ)} of {len(names)} tensors differ); expected the network "
            f"settings that it was trained with{partial}"
        )


def named(tree: PyTree) -> dict[str, Any]:
    """{name: leaf} of a tree, in the order of its leaves; names such as "params/conv/kernel"."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tensors(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the arrays of a tree, or of what `item_tree` knows of them."""
    leaves = named(tree).items()
    return {name: tuple(leaf.shape or ()) for name, leaf in leaves if hasattr(leaf, "shape")}


def difference(
    there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], str]:
    """The names whose shapes differ, and the first of them in words."""
    differ = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    shapes = [side.get(name, "missing") for name in differ[:1] for side in (there, here)]
    return differ, f"{differ[0]} is {shapes[0]} there, {shapes[1]} here" if differ else ""


def item_tree(step: epath.Path, item: str) -> PyTree:
    """The tree of a checkpoint's item with what is known of each leaf; no array is read."""
    # a Checkpointer would warn of other metadata
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        return guard(step, lambda: reader.metadata(step / item).tree)


def _shapes(tree: PyTree) -> PyTree:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=getattr(a, "sharding", None) or default
        ),
        tree,
    )


def guard(step: epath.Path, read: Callable[[], Any]) -> Any:
    """What read() gives; any error inside the storage library becomes a sentence with the path."""
    try:
        return read()
    # orbax and tensorstore raise many kinds; none may reach the user as a bare traceback
    except Exception as error:
        saving.quiet()
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"checkpoint {step}: damaged, or of another network ({type(error).__name__}: {first})"
        ) from error
