"""Checkpoints of a training folder, through orbax: asynchronous, atomic, from one process or many.

    workdir/checkpoints/STEP/{params,ema,state,config,data}

params  the denoiser as trained.
ema     {"params": moving average, "buffers": frozen tensors}: all that sampling needs.
state   step, optimiser, what methods carry.
config  the configuration, the image shape, the number of classes, and what the data set was.
data    where the loader stands.

    workdir/evaluations.json

The reports of evaluations in training, by step: what a resumed run knows of the best ones.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from ogdm_jax import config as configs
from ogdm_jax import places
from ogdm_jax.parallel import Plan
from ogdm_jax.training import older
from ogdm_jax.training.state import TrainState
from ogdm_jax.typing import PyTree

ITEMS = ("params", "ema", "state", "config", "data")
RECORD = "evaluations.json"
# distances can be compared where these are equal
_PROTOCOL = ("features", "n", "n_samples", "solver", "steps")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another network; one sentence names it."""


class Checkpoints:
    """The checkpoints of one training folder.

    Close it, or use it in a `with`: the last save is finished then.

    Args:
      workdir: the training folder.
      keep: how many of the newest to keep.
      keep_every: steps; of the others, those at its multiples are kept, too; 0: none.
      keep_best: how many of those with the smallest distances to keep, too.
    """

    def __init__(
        self, workdir: str | os.PathLike, keep: int = 3, keep_every: int = 0, keep_best: int = 0
    ) -> None:
        self.folder = places.absolute(places.workdir(workdir)) / "checkpoints"
        self.reports = evaluations(workdir)
        kept = [policies.LatestN(max(keep, 1)), _Best(self.reports, keep_best)]
        kept += [policies.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), create=True, step_prefix=None
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Waits until the last save is finished."""
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        """The newest step that was saved; None: none was."""
        return self._manager.latest_step()

    def record(self, report: Mapping[str, Any]) -> bool:
        """Notes the report of an evaluation, for the next save. Call it in every process.

        Returns:
          Whether no other checkpoint's distance is smaller than that of report["step"].
        """
        self.reports[report["step"]] = dict(report)
        if jax.process_index() == 0:
            path = self.folder.parent / RECORD
            listed = [self.reports[step] for step in sorted(self.reports)]
            with places.written(path) as new:  # whole or not at all, where the run is stopped here
                new.write_text(json.dumps(listed, indent=1) + "\n")
        best = ranked(self.reports, [*self._manager.all_steps(), report["step"]])
        return best[:1] == [report["step"]]

    def preempted(self, step: int) -> bool:
        """Whether the processes of a pod agreed that one was told to stop; False outside pods."""
        return self._manager.reached_preemption(step)

    def save(self, step: int, state: TrainState, about: dict, data: dict) -> None:
        """Starts to save; training may go on at once. A step that is already there stays as it is.

        Args:
          step: its number.
          state: to save.
          about: describe()'s dict.
          data: the loader's get_state().
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
        path, trees = self.folder / str(step), _split(plan.shapes(like))
        stored = item_tree(path, "state")
        if older.is_older(stored):
            trees["state"] = older.as_older(trees["state"], stored)
        wanted = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        found = _guard(
            path,
            lambda: self._manager.restore(
                step, args=ocp.args.Composite(**wanted, data=ocp.args.JsonRestore())
            ),
        )
        rest = older.as_newer(found["state"]) if older.is_older(stored) else found["state"]
        return TrainState(
            step=rest["step"],
            params=found["params"],
            ema=found["ema"]["params"],
            buffers=found["ema"]["buffers"],
            opt_state=rest["opt_state"],
            carry=rest["carry"],
        ), found["data"]


def _split(state: TrainState) -> dict[str, PyTree]:
    return {
        "params": state.params,
        "ema": {"params": state.ema, "buffers": state.buffers},
        "state": {
            "step": state.step,
            "opt_state": state.opt_state,
            "carry": state.carry,
        },
    }


class _Best(policies.PreservationPolicy):
    """Preserves the checkpoints whose evaluation found the smallest distances."""

    def __init__(self, reports: Mapping[int, Mapping[str, Any]], count: int) -> None:
        self._reports, self._count = reports, count

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = ranked(self._reports, [info.step for info in checkpoints])[: self._count]
        return [info.step in best for info in checkpoints]


def evaluations(workdir: str | os.PathLike) -> dict[int, dict[str, Any]]:
    """{step: report} of the evaluations of a training folder; {} where there were none."""
    path = places.place(workdir) / RECORD
    reports = json.loads(path.read_text()) if path.is_file() else []
    return {report["step"]: report for report in reports}


def ranked(reports: Mapping[int, Mapping[str, Any]], steps: Sequence[int]) -> list[int]:
    """The evaluated ones of some steps, smallest distance first.

    Those that were evaluated in another way than the last report (features, number of images,
    sampler) are left out.
    """
    if not reports:
        return []
    protocol = lambda report: [report.get(key) for key in _PROTOCOL]
    last = protocol(reports[max(reports)])
    alike = [step for step in set(steps) & set(reports) if protocol(reports[step]) == last]
    return sorted(alike, key=lambda step: (reports[step]["fd"], step))


def describe(
    config: configs.Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    data_set: Mapping[str, Any] | None = None,
) -> dict:
    """What a checkpoint says about its model, so that sampling needs no data set.

    Args:
      config: of the run.
      image_shape: (height, width, channels).
      num_classes: 0 where there are none.
      data_set: `data.fingerprint`'s dict, with "class_names" where they are known.
    """
    return {
        "config": json.loads(configs.to_json(config)),
        "image_shape": list(image_shape),
        "num_classes": num_classes,
    } | ({"data_set": dict(data_set)} if data_set else {})


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What sampling and fine-tuning take from a training folder.

    Attributes:
      config: of the run.
      image_shape: (height, width, channels).
      num_classes: 0 where there are none.
      step: of the checkpoint.
      path: of the checkpoint.
      field: the setting that named the folder, for messages.
      data_set: the fingerprint of the data; {} in folders of before.
    """

    config: configs.Config
    image_shape: tuple[int, int, int]
    num_classes: int
    step: int
    path: epath.Path
    field: str = "--workdir"
    data_set: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in order; () where they are not known."""
        return tuple(map(str, self.data_set.get("class_names") or ()))


def find(
    workdir: str | os.PathLike, step: int | str | None = None, field: str = "--workdir"
) -> Snapshot:
    """A checkpoint of a training folder.

    Args:
      workdir: the training folder.
      step: its number, "best" for that of the smallest distance, None for the newest.
      field: the setting that named the folder, for messages.

    Raises:
      CheckpointError: no folder, no checkpoint, no such step, no evaluation, or an unreadable
        configuration.
    """
    folder = places.absolute(places.workdir(workdir, field)) / "checkpoints"
    steps = complete(workdir)
    if not steps:
        raise CheckpointError(
            f"{field}: {str(workdir)!r} holds no checkpoint; expected a training folder that "
            "train.py wrote"
        )
    if step == "best":
        best = ranked(evaluations(workdir), steps)
        if not best:
            at = _beside(field, "step")
            raise CheckpointError(
                f"{at}: no checkpoint in {str(workdir)!r} was evaluated; expected a number"
            )
        step = best[0]
    if step is not None and step not in steps:
        at = _beside(field, "step")
        raise CheckpointError(
            f"{at}: no checkpoint of step {step} in {str(workdir)!r}; there are {steps}"
        )
    path = folder / str(step if step is not None else steps[-1])
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        saved = _guard(path, lambda: reader.restore(path / "config"))
    return Snapshot(
        config=configs.from_json(json.dumps(saved["config"])),
        image_shape=tuple(saved["image_shape"]),
        num_classes=saved["num_classes"],
        step=int(path.name),
        path=path,
        field=field,
        data_set=saved.get("data_set") or {},
    )


def complete(workdir: str | os.PathLike) -> list[int]:
    """The steps whose checkpoints are written to their end, in order."""
    folder = places.place(workdir) / "checkpoints"
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if not places.is_local(folder):
        # No folder can be renamed in a bucket: a file in it says that it is complete.
        found = [path for path in found if ocp.utils.is_checkpoint_finalized(path)]
    return sorted(int(path.name) for path in found)


def _beside(field: str, what: str) -> str:
    """The setting beside one that names a folder: --step of --workdir, X_step of X."""
    return field.removesuffix("workdir") + what if field.endswith("workdir") else f"{field}_{what}"


def load_weights(
    snapshot: Snapshot, params: PyTree, buffers: PyTree, which: str = "ema"
) -> tuple[PyTree, PyTree]:
    """The (params, buffers) of a checkpoint.

    Args:
      snapshot: the checkpoint.
      params: arrays or shapes of the network that they are for; shardings there are kept.
      buffers: as params.
      which: of the moving average ("ema") or as trained ("params").

    Raises:
      CheckpointError: damaged files, a network of other names or shapes, or another word than ema
        or params.
    """
    if which not in ("ema", "params"):
        raise CheckpointError(
            f"{_beside(snapshot.field, 'weights')}: {which!r} given; expected ema or params"
        )
    _same_network(snapshot, {"params": params, "buffers": buffers})
    with ocp.StandardCheckpointer() as reader:
        ema = _guard(
            snapshot.path,
            lambda: reader.restore(
                snapshot.path / "ema", _shapes({"params": params, "buffers": buffers})
            ),
        )
        if which == "params":
            ema["params"] = _guard(
                snapshot.path, lambda: reader.restore(snapshot.path / "params", _shapes(params))
            )
    return ema["params"], ema["buffers"]


def _same_network(snapshot: Snapshot, wanted: PyTree) -> None:
    """Compares names and shapes before anything is read.

    Of a network that does not fit, orbax says less, and that in several threads.
    """
    stored = item_tree(snapshot.path, "ema")
    there, here = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in leaves
        }
        for leaves in map(jax.tree_util.tree_leaves_with_path, (stored, wanted))
    )
    names = here | there
    differ = [name for name in names if there.get(name) != here.get(name)]
    if differ:
        first = (
            f"{differ[0]} is {there.get(differ[0], 'missing')} there, "
            f"{here.get(differ[0], 'missing')} here"
        )
        raise CheckpointError(
            f"{snapshot.field}: checkpoint {snapshot.path} is of another network ({first}; "
            f"{len(differ)} of {len(names)} tensors differ); expected the network "
            "settings that it was trained with"
        )


def item_tree(path: epath.Path, item: str) -> PyTree:
    """The tree of a checkpoint's item with what is known of each leaf; no array is read."""
    # a Checkpointer would warn of other metadata
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        return _guard(path, lambda: reader.metadata(path / item).tree)


def _shapes(tree: PyTree) -> PyTree:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=getattr(a, "sharding", None) or default
        ),
        tree,
    )


def _guard(path: epath.Path, read: Callable[[], Any]) -> Any:
    """What read() gives; any error inside the storage library becomes a sentence with the path."""
    try:
        return read()
    # orbax and tensorstore raise many kinds; none may reach the user as a bare traceback
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"checkpoint {path}: damaged, or of another network ({type(error).__name__}: {first})"
        ) from error
