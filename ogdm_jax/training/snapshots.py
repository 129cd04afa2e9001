"""Snapshots of the averages of config.ema.stds, and models of any width from them.

    workdir/ema/STEP.npz    "STD/NAME OF A PARAMETER": float16, float32 where a number is too large

Two bytes a number and average. float16 moves a weight by at most 2^-11 of it; what that does to an
average that is put together from snapshots is in `power.coefficients`. A zip's checksums tell of
damage when it is read.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ogdm_jax import places
from ogdm_jax.config import Config, ConfigError
from ogdm_jax.data.arrays import DAMAGED
from ogdm_jax.training import arrays, power
from ogdm_jax.training.steps import CheckpointError
from ogdm_jax.typing import PyTree

FOLDER = "ema"
_IN_A_RUN = 32  # profiles of 0.1 and 0.15 come out to 0.3 % from so many of 0.05 and 0.1
_WORST = 0.2  # of a profile's norm; more is another profile


def interval(config: Config) -> int:
    """Steps from snapshot to snapshot."""
    steps = config.steps(config.ema.snapshots)
    return steps or max(-(-config.steps(config.train.duration) // _IN_A_RUN), 1)


def present(workdir: str | os.PathLike) -> list[int]:
    """The steps of which there are snapshots, in order."""
    folder = places.place(workdir) / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    stems = [name.removesuffix(".npz") for name in names if name.endswith(".npz")]
    return sorted(int(stem) for stem in stems if stem.isdecimal() and len(stem) >= 8)


def path_of(workdir: str | os.PathLike, step: int) -> epath.Path:
    """The file of a step."""
    return places.place(workdir) / FOLDER / f"{step:08d}.npz"


def write(
    workdir: str | os.PathLike, step: int, stds: Sequence[float], averages: Sequence[PyTree]
) -> None:
    """Writes the snapshot of a step: whole, or not at all. The same averages make the same bytes.

    Raises:
      OSError: it cannot be written.
    """
    columns = {
        f"{std}/{name}": _half(leaf)
        for std, average in zip(stds, averages, strict=True)
        for name, leaf in arrays.named(average).items()
    }
    with places.written(path_of(workdir, step)) as new, open(new, "wb") as file:
        save: Any = np.savez  # its types know no names of arrays
        save(file, **columns)


def remove_after(workdir: str | os.PathLike, step: int, log: Callable[[str], None]) -> None:
    """Removes the snapshots of steps that a run which goes on from `step` will make once more."""
    later = [number for number in present(workdir) if number > step]
    for number in later:
        path_of(workdir, number).unlink()
    if later:
        log(f"{len(later)} snapshots after step {step} removed; the run makes them again")


def reconstruct(
    workdir: str | os.PathLike,
    tracked: Sequence[float],
    wanted: Sequence[float],
    like: PyTree,
    step: int | None = None,
    field: str = "--workdir",
) -> tuple[list[PyTree], int, np.ndarray]:
    """The averages of other widths, from the snapshots up to a step (2312.02696, appendix C).

    Args:
      workdir: the training folder.
      tracked: config.ema.stds of the run.
      wanted: relative widths, above 0 and below 0.2886.
      like: the parameters or their shapes.
      step: at which the averages end, one with a snapshot; None: the last one.
      field: the setting that named the folder, for messages.

    Returns:
      A tree of float32 arrays for each width, the step, and `power.coefficients`' distance of each.

    Raises:
      ConfigError: a width out of range, or one that these snapshots do not determine.
      CheckpointError: no snapshots, none of that step, or one that is damaged or of another run.
    """
    for std in wanted:
        if not 0 < std < 0.2886:
            raise ConfigError(f"std: {std!r} given; expected a number above 0 and below 0.2886")
    found = present(workdir) if tracked else []
    if not found:
        raise CheckpointError(
            f"{field}: {os.fspath(workdir)!r} holds no snapshots of averages; expected a run that "
            "was trained with --config.ema.stds=0.05,0.1"
        )
    step = found[-1] if step is None else step
    if step not in found:
        shown = f"{found[:4]}{f' ... {found[-1]}' if len(found) > 4 else ''}"
        raise CheckpointError(
            f"{field}: no snapshot of step {step} in {os.fspath(workdir)!r}; there are {shown}"
        )
    used = [number for number in found if number <= step]
    times, stds = np.repeat(used, len(tracked)), np.tile(tracked, len(used))
    weights, errors = power.coefficients(list(times), list(stds), step, wanted)
    for std, error in zip(wanted, errors):
        if not error <= _WORST:
            raise ConfigError(
                f"std: {std:g} given, whose profile comes out wrong by {100 * error:.0f} % from "
                f"{len(used)} snapshots of {', '.join(map(str, tracked))}; expected a width nearer "
                "to those, or a run with more snapshots (ema.snapshots)"
            )
    leaves, structure = arrays.named(like), jax.tree.structure(like)
    totals = [[np.zeros(leaf.shape, np.float32) for leaf in leaves.values()] for _ in wanted]
    for row, (number, std) in enumerate(zip(times, stds)):
        for index, value in enumerate(_read(path_of(workdir, int(number)), std, leaves, field)):
            for total, weight in zip(totals, weights[row]):
                total[index] += np.float32(weight) * value
    return [jax.tree.unflatten(structure, total) for total in totals], step, errors


def _read(
    path: epath.Path, std: float, leaves: dict[str, jax.Array], field: str
) -> list[np.ndarray]:
    """One average of a snapshot, in the order of leaves, float32."""
    try:
        with path.open("rb") as file, np.load(file) as archive:
            values = [archive[f"{std}/{name}"].astype(np.float32) for name in leaves]
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{field}: snapshot {path} is damaged or of another run ({reason}); expected what "
            "training wrote: bring it back, or delete it to go on without it"
        ) from None
    for value, (name, leaf) in zip(values, leaves.items()):
        if value.shape != leaf.shape:
            raise CheckpointError(
                f"{field}: snapshot {path} is of another network: {name} is {value.shape} there, "
                f"{leaf.shape} here"
            )
    return values


def _half(leaf: jax.Array) -> np.ndarray:
    whole = np.asarray(leaf, np.float32)
    with np.errstate(over="ignore"):
        half = whole.astype(np.float16)
    return half if np.isfinite(half).all() else whole
