"""Which checkpoints a training folder holds, and which of them are whole."""

import os
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ogdm_jax import cluster, places
from ogdm_jax.training import checksums

_CUT = ".orbax-checkpoint-tmp"  # in the name of a local folder that a save has not finished


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another network; one sentence names it."""


def folder(workdir: str | os.PathLike, field: str = "--workdir") -> epath.Path:
    """Where the checkpoints of a training folder are."""
    return places.absolute(places.workdir(workdir, field)) / "checkpoints"


def present(workdir: str | os.PathLike) -> list[int]:
    """The steps of which there is anything, in order; in a bucket, those that are finished.

    Raises:
      CheckpointError: the name is taken, or a link to where nothing is.
    """
    top = places.absolute(places.place(workdir)) / "checkpoints"
    if places.is_local(top) and os.path.lexists(top) and not top.is_dir():
        raise CheckpointError(
            f"--workdir: {str(top)!r} is no folder (a file, or a link to a place that is not "
            "there); expected one"
        )
    names = [path.name for path in top.iterdir()] if top.is_dir() else []
    digits = [name for name in names if name.isdecimal() and len(name) < 10]
    found = [int(name) for name in digits if name == str(int(name))]
    if not places.is_local(top):
        # No folder can be renamed in a bucket: a file in it says that it is complete.
        found = [step for step in found if ocp.utils.is_checkpoint_finalized(top / str(step))]
    return sorted(found)


def complete(workdir: str | os.PathLike) -> list[int]:
    """The steps whose checkpoints have all their files, in order; checksums are not compared."""
    top = places.absolute(places.place(workdir)) / "checkpoints"
    return [step for step in present(workdir) if not checksums.damage(top / str(step))]


def unfinished(top: epath.Path, step: int) -> list[epath.Path]:
    """The folders of a save of this step that has not finished."""
    if not places.is_local(top):
        path = top / str(step)
        return [] if not path.exists() or ocp.utils.is_checkpoint_finalized(path) else [path]
    if not top.is_dir():
        return []
    return [path for path in top.iterdir() if path.name.startswith(f"{step}{_CUT}")]


def newest_whole(workdir: str | os.PathLike, log: Callable[[str], None]) -> int | None:
    """The step from which a run goes on, after what a broken one left was put aside.

    Call it in every process of the run that holds the folder's lock; all get the same answer.

    Args:
      workdir: the training folder.
      log: gets a line about each checkpoint that is passed over, and each save that was cut.

    Returns:
      The newest step whose files are as they were written; None: nothing was ever saved.

    Raises:
      CheckpointError: there are checkpoints, all of them damaged.
      OSError: one cannot be read.
    """
    step = -1
    if jax.process_index() == 0:
        top = folder(workdir)
        if places.is_local(top) and top.is_dir():
            _remove_cut(top, log)
        step = _newest(top, present(workdir), log)
    cluster.meet()  # reading may take minutes
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return None if step < 0 else step


def _remove_cut(top: epath.Path, log: Callable[[str], None]) -> None:
    for path in top.iterdir():
        if _CUT in path.name:
            path.rmtree()
            log(f"{path} removed: a save that was cut short")


def _newest(top: epath.Path, steps: list[int], log: Callable[[str], None]) -> int:
    """The newest whole one of some steps, -1 for none; those after it are put aside."""
    damaged = {}
    for step in reversed(steps):
        wrong = checksums.damage(top / str(step), checksums.ITEMS)
        if not wrong:
            break
        damaged[step] = wrong
    whole = next((step for step in reversed(steps) if step not in damaged), None)
    lost = {s: wrong for s, wrong in damaged.items() if not _is_empty(top / str(s))}
    if whole is None and lost:
        what = "; ".join(f"step {step}: {wrong}" for step, wrong in list(lost.items())[:3])
        raise CheckpointError(
            f"--workdir: every checkpoint in {str(top)!r} is damaged ({what}); bring their files "
            "back, or delete that folder to start afresh"
        )
    for step, wrong in damaged.items():
        path = top / str(step)
        if step not in lost:
            path.rmdir()
            log(f"{path} is empty: removed")
            continue
        aside = places.unused(path.with_name(f"{step}.damaged"))
        path.rename(aside)
        log(f"checkpoint {path} is damaged: {wrong}; put aside as {aside.name}")
    if damaged and whole is not None:
        log(f"going on from step {whole}, the newest checkpoint that is whole")
    return -1 if whole is None else whole


def _is_empty(path: epath.Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
