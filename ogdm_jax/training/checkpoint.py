"""Checkpoints of a training folder, through orbax: asynchronous, atomic, from one process or many.

    workdir/checkpoints/STEP/{params,ema,state,config,data}

params  the denoiser as trained.
ema     {"params": moving average, "buffers": frozen tensors}: all that sampling needs.
state   step, optimiser, companions, memory.
config  the configuration, the image shape and the number of classes.
data    where the loader stands.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from ogdm_jax import config as configs
from ogdm_jax.parallel import Plan
from ogdm_jax.training.state import TrainState
from ogdm_jax.typing import PyTree

ITEMS = ("params", "ema", "state", "config", "data")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another network; the message is one sentence that names it."""


class Checkpoints:
    """The checkpoints of one training folder. Close it (or use it in a `with`), so that the last save is finished."""

    def __init__(self, workdir: str | Path, keep: int = 3, keep_every: int = 0):
        self.folder = Path(workdir).absolute() / "checkpoints"
        kept = [policies.LatestN(max(keep, 1))] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), create=True, step_prefix=None
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def preempted(self, step: int) -> bool:
        """Whether the processes of a pod agreed that one of them was told to stop (False outside pods)."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: TrainState, about: dict, data: dict) -> None:
        """Starts to save; training may go on at once. A step that is already there is left as it is.

        Args:
          about: describe()'s dict.   data: the loader's get_state().
        """
        if step in self._manager.all_steps():
            return
        trees = _split(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
                config=ocp.args.JsonSave(about),
                data=ocp.args.JsonSave(data),
            ),
            force=True,
        )

    def restore(self, step: int, like: TrainState, plan: Plan) -> tuple[TrainState, dict]:
        """The state of a step, placed as the plan wants it, and where the loader stood.

        Args:
          like: a state of the same run, or its shapes.

        Raises:
          CheckpointError: the files are damaged or belong to another network.
        """
        shapes = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            like,
            plan.state_shardings(like),
        )
        wanted = {name: ocp.args.StandardRestore(tree) for name, tree in _split(shapes).items()}
        found = _guard(
            self.folder / str(step),
            lambda: self._manager.restore(step, args=ocp.args.Composite(**wanted, data=ocp.args.JsonRestore())),
        )
        rest = found["state"]
        return TrainState(
            step=rest["step"],
            params=found["params"],
            ema=found["ema"]["params"],
            buffers=found["ema"]["buffers"],
            opt_state=rest["opt_state"],
            companions=rest["companions"],
            memory=rest["memory"],
        ), found["data"]


def _split(state: TrainState) -> dict[str, PyTree]:
    return {
        "params": state.params,
        "ema": {"params": state.ema, "buffers": state.buffers},
        "state": {
            "step": state.step,
            "opt_state": state.opt_state,
            "companions": state.companions,
            "memory": state.memory,
        },
    }


def describe(config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int) -> dict:
    """What a checkpoint says about its model, so that sampling needs no data set."""
    return {
        "config": json.loads(configs.to_json(config)),
        "image_shape": list(image_shape),
        "num_classes": num_classes,
    }


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What sampling and fine-tuning take from a training folder."""

    config: ConfigDict
    image_shape: tuple[int, int, int]
    num_classes: int
    step: int
    path: Path


def find(workdir: str | Path, step: int | None = None) -> Snapshot:
    """The newest checkpoint of a training folder, or that of a given step.

    Raises:
      CheckpointError: no folder, no checkpoint, no such step, or an unreadable configuration.
    """
    folder = Path(workdir).absolute() / "checkpoints"
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise CheckpointError(f"{str(workdir)!r} holds no checkpoint; expected a training folder that train.py wrote")
    if step is not None and step not in steps:
        raise CheckpointError(f"--step: no checkpoint of step {step} in {str(workdir)!r}; there are {steps}")
    path = folder / str(step if step is not None else steps[-1])
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        saved = _guard(path, lambda: reader.restore(path / "config"))
    return Snapshot(
        config=configs.from_json(json.dumps(saved["config"])),
        image_shape=tuple(saved["image_shape"]),
        num_classes=saved["num_classes"],
        step=int(path.name),
        path=path,
    )


def load_weights(snapshot: Snapshot, params: PyTree, buffers: PyTree, which: str = "ema") -> tuple[PyTree, PyTree]:
    """The (params, buffers) of a checkpoint: of the moving average ("ema") or as trained ("params").

    Args:
      params, buffers: arrays or shapes of the network they are for; shardings given there are kept.

    Raises:
      CheckpointError: damaged files, or a network of other shapes.
    """
    configs.choose("init.weights", which, ("ema", "params"))
    with ocp.StandardCheckpointer() as reader:
        ema = _guard(
            snapshot.path,
            lambda: reader.restore(snapshot.path / "ema", _shapes({"params": params, "buffers": buffers})),
        )
        if which == "params":
            ema["params"] = _guard(snapshot.path, lambda: reader.restore(snapshot.path / "params", _shapes(params)))
    return ema["params"], ema["buffers"]


def _shapes(tree: PyTree) -> PyTree:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None) or default), tree
    )


def _guard(path: Path, read):
    """Runs a read; whatever goes wrong inside the storage library becomes one sentence with the path."""
    try:
        return read()
    except Exception as error:  # orbax and tensorstore raise many kinds; none may reach the user as a bare traceback
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"checkpoint {path}: damaged, or of another network ({type(error).__name__}: {first})"
        ) from error
