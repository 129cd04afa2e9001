"""Checkpoints of a training folder, through orbax: asynchronous, atomic, from one process or many.

    workdir/checkpoints/STEP/{params,ema,state,config,data}

params  the denoiser as trained.
ema     {"params": moving average, "buffers": frozen tensors}: all that sampling needs.
state   step, optimiser, what methods carry, averages of config.ema.stds where there are any.
config  the configuration, the image shape, the number of classes, and what the data set was.
data    where the loader stands.

    workdir/evaluations.json

The reports of evaluations in training, by step: what a resumed run knows of the best ones.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from ogdm_jax import config as configs
from ogdm_jax import places, records
from ogdm_jax.data.labels import one_form
from ogdm_jax.latents import Latents, from_json
from ogdm_jax.parallel import Plan
from ogdm_jax.training import arrays, checksums, evaluations, older, saving, steps
from ogdm_jax.training.checksums import ITEMS
from ogdm_jax.training.state import TrainState
from ogdm_jax.training.steps import CheckpointError, complete
from ogdm_jax.typing import PyTree

Log = Callable[[str], None]


def _aloud(text: str) -> None:
    print(text, file=sys.stderr)


class Checkpoints(saving.Closing):
    """The checkpoints of one training folder; `lock.hold` keeps other runs away from it.

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
        self.workdir, self.folder = workdir, steps.folder(workdir)
        self.reports = evaluations.read(workdir)
        kept = [policies.LatestN(max(keep, 1)), evaluations.Best(self.reports, keep_best)]
        kept += [policies.EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            create=True,
            step_prefix=None,
            lightweight_initialize=True,  # nothing beside the items is read
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._list_files,
                # a folder that cannot be made is an error here, not threads that wait 20 minutes
                create_directories_asynchronously=False,
            ),
        )
        self._saving: int | None = None  # the step whose save has not been waited for
        saving.quiet()
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)

    def close(self) -> None:
        """Waits until the last save is finished. Raises CheckpointError as `wait`."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # wait() has raised what there was
                self._manager.close()

    def wait(self) -> None:
        """Returns when the last save is closed: only then may a line say that it is saved.

        Raises:
          CheckpointError: it could not be written; the sentence says why, and which step is safe.
        """
        if self._saving is not None:
            self._told(self._saving, self._manager.wait_until_finished)
            self._saving = None

    def check(self) -> None:
        """Raises as `wait` if the last save has failed meanwhile; never waits."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def latest(self) -> int | None:
        """The newest step that is complete, None where none is; a save under way does not count."""
        return next(reversed(complete(self.workdir)), None)

    def record(self, report: Mapping[str, Any]) -> bool:
        """Notes the report of an evaluation, for the next save. Call it in every process.

        Returns:
          Whether no other checkpoint's distance is smaller than that of report["step"].
        """
        self.reports[report["step"]] = dict(report)
        if jax.process_index() == 0:
            evaluations.write(self.workdir, self.reports)
        listed = [*self._manager.all_steps(), report["step"]]
        return evaluations.ranked(self.reports, listed)[:1] == [report["step"]]

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

        Raises:
          CheckpointError: this save cannot be started, or the one before has failed; see `wait`.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        plain = lambda value: ocp.args.JsonSave(json.loads(records.dumps(value)))
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items_of(state).items()}
        args = ocp.args.Composite(**trees, config=plain(about), data=plain(data))
        if places.is_local(self.folder) and not self.folder.is_dir():
            raise CheckpointError(
                f"--workdir: {str(self.folder)!r} is gone, so that step {step} cannot be saved; "
                "expected the folder to stay while the run writes there"
            )
        self._saving = step
        self._told(step, lambda: self._manager.save(step, args=args, force=True))

    def _told(self, step: int, save: Callable[[], Any]) -> None:
        """Calls save(); what goes wrong in it becomes one sentence, and its half is removed."""
        try:
            save()
        # orbax and tensorstore raise many kinds, in threads of their own
        except Exception as error:
            self._saving = None
            lead = jax.process_index() == 0
            for path in steps.unfinished(self.folder, step) if lead else ():
                with contextlib.suppress(Exception):  # its threads may still be writing
                    path.rmtree(missing_ok=True)
            whole, why = self.latest(), saving.reason(error, self.folder)
            if whole == step:
                raise CheckpointError(
                    f"step {step} is saved, but not all after it: {why}"
                ) from error
            safe = "no checkpoint is complete" if whole is None else f"step {whole} is safe"
            raise CheckpointError(f"step {step} was not saved ({why}); {safe}") from error

    def _list_files(self) -> None:
        """In the saving thread of process 0, when all is written and has no name yet."""
        assert self._saving is not None
        for path in steps.unfinished(self.folder, self._saving):
            checksums.write(path)

    def restore(self, step: int, like: TrainState, plan: Plan) -> tuple[TrainState, dict]:
        """The state of a step, placed as the plan wants it, and where the loader stood.

        Args:
          step: one that is whole, see `resumable`.
          like: a state of the same run, or its shapes.
          plan: of the devices.

        Raises:
          CheckpointError: the files are damaged or belong to another network.
        """
        path, trees = self.folder / str(step), items_of(plan.shapes(like))
        position = records.read(path / "data" / "metadata", dict, "--workdir")
        if type(position.get("step")) is not int or position["step"] != step:
            raise CheckpointError(
                f"--workdir: {str(path / 'data' / 'metadata')!r} holds {position!r}; expected "
                f"{{'step': {step}}}, as training wrote it"
            )
        stored = arrays.item_tree(path, "state")
        if older.is_older(stored):
            trees["state"] = older.as_older(trees["state"], stored)
        wanted = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        read = lambda: self._manager.restore(step, args=ocp.args.Composite(**wanted))
        found = arrays.guard(path, read)
        rest = older.as_newer(found["state"]) if older.is_older(stored) else found["state"]
        return TrainState(
            step=rest["step"],
            params=found["params"],
            ema=found["ema"]["params"],
            buffers=found["ema"]["buffers"],
            opt_state=rest["opt_state"],
            carry=rest["carry"],
            averages=rest.get("averages", ()),
        ), position


def items_of(state: TrainState) -> dict[str, PyTree]:
    """The trees of a state by the items of a checkpoint that hold them."""
    averages = {"averages": state.averages} if state.averages else {}
    return {
        "params": state.params,
        "ema": {"params": state.ema, "buffers": state.buffers},
        "state": {"step": state.step, "opt_state": state.opt_state, "carry": state.carry}
        | averages,
    }


def describe(
    config: configs.Config,
    image_shape: tuple[int, int, int],
    num_classes: int,
    data_set: Mapping[str, Any] | None = None,
    weights_read: Mapping[str, int] | None = None,
) -> dict:
    """What a checkpoint says about its model, so that sampling needs no data set.

    Args:
      config: of the run.
      image_shape: (height, width, channels).
      num_classes: 0 where there are none.
      data_set: `data.fingerprint`'s dict, with "class_names" where they are known.
      weights_read: of `Run`.
    """
    more = {"data_set": data_set, "weights_read": weights_read}
    return {
        "config": json.loads(configs.to_json(config)),
        "image_shape": list(image_shape),
        "num_classes": num_classes,
    } | {name: dict(value) for name, value in more.items() if value}


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
      weights_read: of the `Run`; {} in folders of before.
    """

    config: configs.Config
    image_shape: tuple[int, int, int]
    num_classes: int
    step: int
    path: epath.Path
    field: str = "--workdir"
    data_set: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights_read: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def latents(self) -> Latents | None:
        """What the numbers of the data are; None of pixels."""
        told = self.data_set.get("latents")
        return from_json(told) if told else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in order; () where they are not known."""
        names = self.data_set.get("class_names")
        return tuple(one_form(names)) if isinstance(names, list) else ()


def find(
    workdir: str | os.PathLike,
    step: int | str | None = None,
    field: str = "--workdir",
    read: Sequence[str] = ("ema", "config"),
    log: Log = _aloud,
) -> Snapshot:
    """A checkpoint of a training folder, its files compared with their checksums.

    Args:
      workdir: the training folder.
      step: its number, "best" for that of the smallest distance, None for the newest. Of the two
        last, damaged ones are passed over.
      field: the setting that named the folder, for messages.
      read: the items that will be read.
      log: gets a line about each damaged checkpoint that is passed over.

    Raises:
      CheckpointError: no folder, no checkpoint, no such step, no evaluation, a damaged one that was
        asked for by its number, or an unreadable configuration.
      RecordError: evaluations.json cannot be read, and "best" is asked for.
    """
    folder, present = steps.folder(workdir, field), steps.present(workdir)
    if not present:
        raise CheckpointError(
            f"{field}: {str(workdir)!r} holds no checkpoint; expected a training folder that "
            "train.py wrote"
        )
    at, named = _beside(field, "step"), step not in (None, "best")
    choices = present[::-1]
    if step == "best":
        choices = _best_first(workdir, present, at)
    elif named:
        choices = [number for number in present if number == step]
    wrong, passed = "", []
    for number in choices:
        wrong = checksums.damage(folder / str(number), read)
        if not wrong:
            return _opened(folder / str(number), field)
        passed.append(number)
        if not named:
            log(f"{field}: checkpoint {folder / str(number)} is damaged ({wrong}): passed over")
    what = f"checkpoint {step} is damaged ({wrong})" if choices else f"no checkpoint of step {step}"
    if not named:
        at, what = field, f"every checkpoint is damaged ({wrong})"
    whole = [number for number in complete(workdir) if number not in passed]
    raise CheckpointError(f"{at}: {what} in {str(workdir)!r}; there are {whole or 'no others'}")


def _best_first(workdir: str | os.PathLike, present: list[int], at: str) -> list[int]:
    reports = evaluations.read(workdir)
    best = evaluations.ranked(reports, present)
    if best:
        return best
    gone = f" (those of {sorted(reports)[:5]} were, and are gone)" if reports else ""
    raise CheckpointError(
        f"{at}: no checkpoint in {str(workdir)!r} was evaluated{gone}; expected a number, one of "
        f"{present}"
    )


def resumable(workdir: str | os.PathLike, log: Log) -> Snapshot | None:
    """What a run of this folder goes on from; None: nothing was saved, it starts afresh.

    Call it in every process of a run that holds the folder's lock. See `steps.newest_whole` for
    what it puts aside, and for its errors.
    """
    step = steps.newest_whole(workdir, log)
    return None if step is None else find(workdir, step, read=())


def _opened(path: epath.Path, field: str) -> Snapshot:
    """The snapshot of a checkpoint whose files are there."""
    file = path / "config" / "metadata"
    try:
        saved = records.read(file, dict, field)
        shape, classes, data_set = (
            saved.get(k) for k in ("image_shape", "num_classes", "data_set")
        )
        sizes = [*shape, classes] if isinstance(shape, list) else []
        if len(sizes) != 4 or any(type(n) is not int or not 0 <= n < 1 << 20 for n in sizes):
            raise ValueError(f"image_shape is {shape!r}, num_classes {classes!r}")
        if not isinstance(data_set or {}, dict):
            raise ValueError(f"data_set is {data_set!r}")
        read = saved.get("weights_read", {})
        if not isinstance(read, dict) or any(type(step) is not int for step in read.values()):
            raise ValueError(f"weights_read is {read!r}")
        config = configs.from_json(json.dumps(saved["config"]))
    except records.RecordError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{field}: {str(file)!r} describes no model ({reason}); expected what training wrote"
        ) from error
    known = data_set or {}, read
    return Snapshot(config, tuple(shape), classes, int(path.name), path, field, *known)


def _beside(field: str, what: str) -> str:
    """The setting beside one that names a folder: --step of --workdir, X_step of X."""
    return field.removesuffix("workdir") + what if field.endswith("workdir") else f"{field}_{what}"


def check_weights(snapshot: Snapshot, which: str) -> None:
    """Raises CheckpointError unless `which` is ema or params, and is whole: `find` compared ema."""
    if which not in ("ema", "params"):
        raise CheckpointError(
            f"{_beside(snapshot.field, 'weights')}: {which!r} given; expected ema or params"
        )
    wrong = checksums.damage(snapshot.path, ["params"]) if which == "params" else ""
    if wrong:
        raise CheckpointError(f"{snapshot.field}: checkpoint {snapshot.path} is damaged ({wrong})")


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
    check_weights(snapshot, which)
    wanted = {"params": params, "buffers": buffers}
    arrays.same_network(snapshot.path, wanted, snapshot.field)
    ema = arrays.read(snapshot.path, "ema", wanted)
    if which == "params":
        ema["params"] = arrays.read(snapshot.path, "params", params)
    return ema["params"], ema["buffers"]
