"""What a resumed run may change, and the way back to an earlier step.

Settings that change no mathematics (declared `free`) may differ freely. Those that a person may
decide (declared `decided`, and those of methods) differ with --override; so does the data set. What
makes another network stays as it was. WORKDIR/history.jsonl keeps what was decided, one line each.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from ogdm_jax import places, records
from ogdm_jax.config import Config, ConfigError, flatten, make
from ogdm_jax.config.whole import DURATIONS, GROUPS
from ogdm_jax.data import identity
from ogdm_jax.training import (
    arrays,
    checkpoint,
    checksums,
    evaluations,
    older,
    snapshots,
    steps,
)
from ogdm_jax.training.state import TrainState

HISTORY = "history.jsonl"
SET_ASIDE = "set_aside"  # where the checkpoints go that lie behind init.step
_OVERRIDE = "expected them as they were, or --override to go on with the new ones"
Changes = dict[str, tuple[Any, Any]]  # {"group.key": (before, now)}


def goes_on_from(
    workdir: epath.Path,
    newest: checkpoint.Snapshot | None,
    config: Config,
    methods: Mapping[str, type],
) -> checkpoint.Snapshot | None:
    """The checkpoint that init.step asks for; the newest one where it asks for none, or where the
    run has been there already (its newest checkpoint was made with the same init.step and the same
    settings; with others, going back once more is meant).

    The init.step that a fine-tuned run began with is a step of init.workdir, whatever else differs;
    another one is a step of the run itself.

    Args:
      workdir: the training folder.
      newest: its newest checkpoint.
      config: the settings now.
      methods: as of `check`.

    Raises:
      CheckpointError: there is no such step.
    """
    step = config.init.step
    if newest is None or step < 0 or step == newest.step:
        return newest
    if newest.config.init.step == step:
        tuned = config.init.workdir and newest.config.init.workdir
        if tuned or not any(differences(newest.config, config, methods)):
            return newest
    if step == 0 and 0 not in steps.complete(workdir):
        return None
    found = checkpoint.find(workdir, step, "config.init.workdir", checksums.ITEMS)
    return dataclasses.replace(found, field="--workdir")


def set_aside(
    workdir: epath.Path, found: checkpoint.Snapshot | None, log: Callable[[str], None]
) -> None:
    """Moves what lies behind a checkpoint to WORKDIR/set_aside: later checkpoints, snapshots of
    averages, the reports of evaluations, and the distances of `ogdm report`. None: all of them.
    Call it in the lead process.
    """
    start = -1 if found is None else found.step
    later = [step for step in steps.present(workdir) if step > start]
    if not later:
        return
    number = 1
    while (workdir / SET_ASIDE / str(number)).exists():
        number += 1
    target = workdir / SET_ASIDE / str(number)
    places.begin(target)
    record = workdir / evaluations.NAME
    if record.exists():
        reports = evaluations.read(workdir)
        record.copy(target / evaluations.NAME)
        evaluations.write(workdir, {s: report for s, report in reports.items() if s <= start})
    measured = workdir / evaluations.MEASURED
    if measured.exists():  # of a checkpoint whose step may come again
        measured.rename(target / measured.name)
    for step in later:
        (workdir / "checkpoints" / str(step)).rename(target / str(step))
    if after := [step for step in snapshots.present(workdir) if step > start]:
        places.begin(target / snapshots.FOLDER)
        for path in (snapshots.path_of(workdir, step) for step in after):
            path.rename(target / snapshots.FOLDER / path.name)
    note(workdir, max(start, 0), "went back", set_aside=later, where=str(target))
    log(f"went back to step {max(start, 0)}; steps {spelled_steps(later)} are now in {target}")


def spelled_steps(steps: list[int]) -> str:
    """At most four steps."""
    shown = [*map(str, steps)] if len(steps) < 5 else [str(steps[0]), "...", str(steps[-1])]
    return ", ".join(shown)


def check(
    workdir: epath.Path,
    saved: checkpoint.Snapshot,
    config: Config,
    methods: Mapping[str, type],
    override: bool = False,
) -> Changes:
    """Refuses to resume a training folder with settings that would make it another run.

    Args:
      workdir: the training folder.
      saved: its checkpoint.
      config: the settings now.
      methods: {method: the dataclass of its settings}, of all training methods.
      override: whether a person decided that settings differ.

    Returns:
      What the person decided.

    Raises:
      ConfigError: naming the first settings that differ, with both values, and what can be done.
    """
    fixed, decided = differences(saved.config, config, methods)
    if saved.data_set:  # what the images are is known better than by a name; see check_data
        decided.pop("data.source", None)
    if fixed:
        raise ConfigError(
            f"--workdir holds a run of another configuration: {spelled(fixed)}; expected them as "
            "they were, or a new --workdir: --config.init.workdir="
            f"{workdir} starts there from the weights of this one where they fit"
        )
    if decided and not override:
        raise ConfigError(
            f"--workdir holds a run of another configuration: {spelled(decided)}; {_OVERRIDE}"
        )
    return decided


def differences(
    saved: Config, config: Config, methods: Mapping[str, type]
) -> tuple[Changes, Changes]:
    """(what cannot differ and does, what a person may decide and differs).

    Settings of a method that neither run uses are left out; durations are compared in steps.
    """
    used = set(config.methods) | set(saved.methods)
    old, new = (_values(c, methods, used) for c in (saved, config))
    fixed: Changes = {}
    decided: Changes = {}
    for key in sorted(old | new):
        before, now = (values.get(key, (None, False))[0] for values in (old, new))
        if before != now and not _same_length(key, saved, config):
            may_differ = old.get(key, new.get(key))
            (decided if may_differ and may_differ[1] else fixed)[key] = (before, now)
    # They clip the levels that are trained; otherwise they are the sampler's alone.
    if not (used or saved.noise.clip or config.noise.clip):
        for key in ("sample.sigma_min", "sample.sigma_max"):
            decided.pop(key, None)
    return fixed, decided


def _values(
    config: Config, methods: Mapping[str, type], used: set[str]
) -> dict[str, tuple[Any, bool]]:
    """{"group.key": (value, whether a person may decide it)} of what is not free."""
    found: dict[str, tuple[Any, bool]] = {"init.workdir": (bool(config.init.workdir), True)}
    groups = {name: getattr(config, name) for name in GROUPS if name != "init"} | {"": config}
    for name, values in config.others.items():
        if name not in methods:
            found |= {k: (_plain(v), True) for k, v in flatten(dict(values), f"{name}.").items()}
        elif name in used:
            groups[name] = make(methods[name], values, name)
    for name, group in groups.items():
        for field in dataclasses.fields(group):
            declared = field.metadata
            if "free" in declared and not declared["free"]:
                may_differ = declared["decided"] or (name != "" and name not in GROUPS)
                key = f"{name}.{field.name}" if name else field.name
                found[key] = (getattr(group, field.name), may_differ)
    return found


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _same_length(key: str, saved: Config, config: Config) -> bool:
    """Whether a setting is a duration of as many steps in both."""
    if key not in DURATIONS:
        return False
    group, _, name = key.partition(".")
    before, now = (c.steps(getattr(getattr(c, group), name)) for c in (saved, config))
    return before == now


def spelled(changes: Changes) -> str:
    """The first settings that differ, with both values."""
    shown = [f"{key} ({old!r} there, {new!r} now)" for key, (old, new) in changes.items()]
    return "; ".join(shown[:4]) + (f"; {len(shown) - 4} more" if len(shown) > 4 else "")


def check_data(saved: checkpoint.Snapshot, now: Mapping[str, Any], override: bool) -> str:
    """Refuses to go on with another data set than the checkpoint's.

    Args:
      saved: the checkpoint.
      now: `data.fingerprint` of the run's source.
      override: whether a person decided it.

    Returns:
      What differs, "" where nothing does.

    Raises:
      ConfigError: the data sets differ and nobody decided it.
    """
    differs = identity.difference(dict(saved.data_set), dict(now))
    if differs and not override:
        raise ConfigError(
            "config.data.source: is another data set than the one that --workdir was trained on "
            f"({differs}); expected that one, a new --workdir, or --override to go on with this one"
        )
    return differs


def check_state(saved: checkpoint.Snapshot, wanted: TrainState, changed: Changes) -> None:
    """Refuses settings that were decided but make another state than the checkpoint's.

    Args:
      saved: the checkpoint.
      wanted: the shapes of the run's state.
      changed: what was decided.

    Raises:
      ConfigError: naming the first tensor that differs.
    """
    stored = {item: arrays.item_tree(saved.path, item) for item in ("params", "state")}
    here = checkpoint.items_of(wanted)
    del here["ema"]
    if older.is_older(stored["state"]):
        here["state"] = older.as_older(here["state"], stored["state"])
    differ, first = arrays.difference(arrays.tensors(stored), arrays.tensors(here))
    if differ:
        raise ConfigError(
            f"--override: {spelled(changed)}: these make another state than the checkpoint's "
            f"({first}; {len(differ)} tensors differ); expected them as they were, or a new "
            "--workdir"
        )


def note(workdir: epath.Path, step: int, what: str, **values: Any) -> None:
    """Adds a line to WORKDIR/history.jsonl."""
    path = workdir / HISTORY
    before = path.read_text() if path.exists() else ""
    with places.written(path) as new:
        new.write_text(before + records.dumps({"step": step, "what": what} | values) + "\n")
