"""The training loop. Its order matters: save, then take the next batch, step, log.

A checkpoint therefore holds the loader's position before the next batch, and a resumed run sees
exactly what an uninterrupted one sees. A run starts from the workdir's own checkpoint, else from
config.init.workdir, else fresh.
"""

import os
from typing import Any

import jax
from etils import epath

import ogdm_jax
from ogdm_jax import cluster, data, parallel, places
from ogdm_jax import config as configs
from ogdm_jax.methods import discovery
from ogdm_jax.training import lock, opening, resume, steps, texts, trackers
from ogdm_jax.training import profile as profiles
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import Snapshot, find, load_weights, resumable
from ogdm_jax.training.evaluate import check_evaluation, check_images
from ogdm_jax.training.inner import Initial, Loop, NotFinite, no_log
from ogdm_jax.training.partial import fitting_weights
from ogdm_jax.training.signals import StopSignals
from ogdm_jax.training.state import TrainState
from ogdm_jax.training.task import DENOISER, Log, Task

__all__ = ["NotFinite", "train"]


def train(
    config: configs.Config,
    workdir: str | os.PathLike,
    log: Log = print,
    task: Task[Any] | None = None,
    profile: profiles.Steps | None = None,
    override: bool = False,
    stopped_code: int | None = None,
) -> tuple[runs.AnyRun, TrainState]:
    """Trains to config.train.duration, from the workdir's newest checkpoint if it has one.

    Args:
      config: of the run.
      workdir: the training folder, local or gs://.
      log: gets the lines of the log, in the lead process.
      task: what is trained; None trains a denoiser.
      profile: the (first, last) step of which a trace is written to workdir/profile.
      override: whether settings that a person may decide may differ from the folder's.
      stopped_code: the exit code after a signal, where the process may be ended from a thread;
        None: it never is, as a notebook wants it.

    Returns:
      The run and its last state.

    Raises:
      ConfigError, SourceError, CheckpointError, LockError: bad settings, data or checkpoint, or
        another run in the folder, before anything is compiled.
      NotFinite: a loss or the state is not finite; the last good checkpoint is kept.
      LogError, CheckpointError: the log or a checkpoint cannot be written.
      cluster.Stopped: SIGTERM or Ctrl-C came; the state is saved.
    """
    task, workdir = task or DENOISER, places.workdir(workdir)
    cluster.compare(_shared_settings(config, workdir))
    places.writable(workdir, "--workdir", keep=jax.process_count() > 1)
    log = log if jax.process_index() == 0 else no_log
    cluster.keep_safe(lambda: _how_to_go_on(workdir))
    with (
        StopSignals(log, stopped_code) as stop,
        stop.may_leave("nothing has been trained since the last save, leaving"),
        lock.hold(workdir, log) as held,
    ):
        stop.farewell = lambda: log(f"stopped; {_how_to_go_on(workdir)}")
        plan = parallel.make_plan(config.parallel.plan, config.parallel.devices)
        measured = check_evaluation(config)
        trackers.check(config)
        newest = resumable(workdir, log)
        types = discovery.settings_types()
        found = resume.goes_on_from(workdir, newest, config, types)
        decided = resume.check(workdir, found, config, types, override) if found else {}
        run = task.build(config, plan, workdir, log, found.weights_read if found else None)
        check_images(run, measured)
        held_out = task.held_out(run)
        profiles.check(profile, run.steps)
        shapes = jax.eval_shape(run.create, run.key)
        _check_resumed(run, found, shapes, decided, override, log)
        # Read before the loop writes anything.
        initial = _initial_weights(run, shapes) if config.init.workdir and not found else None
        if jax.process_index() == 0 and found != newest:
            resume.set_aside(workdir, found, log)
        cluster.compare({"where the run goes on": found.step if found else None})
        if found and decided and jax.process_index() == 0:
            resume.note(workdir, found.step, "override", changed=decided)
        begins = initial[-1] if initial else "a new run"
        begins = f"resumed from step {found.step}" if found else begins
        log("\n".join(opening.lines(run, shapes, workdir, begins)))
        loop = Loop(
            run=run,
            task=task,
            held_out=held_out,
            workdir=workdir,
            profile=profile,
            stop=stop,
            log=log,
            found=found,
            initial=initial,
            shapes=shapes,
            still_ours=held.check,
        )
        state = loop.run_to_end()
        task.finish(run, state, workdir, log)
        cluster.meet()  # the lead one still writes; JAX aborts all after five minutes
        return run, state


def _check_resumed(
    run: runs.AnyRun,
    found: Snapshot | None,
    shapes: TrainState,
    decided: resume.Changes,
    override: bool,
    log: Log,
) -> None:
    """Refuses data and states that are not the run's; compares the data of all processes."""
    data_set = data.fingerprint(run.source)
    cluster.compare({f"the data set's {key}": value for key, value in data_set.items()})
    if not found:
        return
    other = resume.check_data(found, data_set, override)
    if decided:
        resume.check_state(found, shapes, decided)
        log(f"--override: {resume.spelled(decided)}, from step {found.step} on")
    if other:
        decided["data.source"] = (dict(found.data_set), data_set)
        log(f"--override: another data set ({other}), from step {found.step} on")


def _shared_settings(config: configs.Config, workdir: epath.Path) -> dict[str, Any]:
    """What every process of a run has to have alike; their data may lie at different places."""
    flat = configs.flatten(config).items()
    settings = {f"config.{key}": value for key, value in flat if key != "data.data_dir"}
    return settings | {
        "--workdir": str(workdir),
        "the version of jax": jax.__version__,
        "the version of ogdm_jax": ogdm_jax.__version__,
    }


def _how_to_go_on(workdir: epath.Path) -> str:
    """How a run goes on after one of its processes died, for the last sentence of the others."""
    several = " in all processes" if jax.process_count() > 1 else ""
    done = steps.complete(workdir)
    if not done:
        return (
            f"no checkpoint in {workdir} is complete yet; the same command{several} starts afresh"
        )
    return f"step {done[-1]} in {workdir} is safe; the same command{several} goes on from there"


def _initial_weights(run: runs.AnyRun, shapes: TrainState) -> Initial:
    """The weights that fine-tuning starts from, placed as the plan wants them."""
    init = run.config.init
    step, placed = None if init.step < 0 else init.step, run.plan.shapes(shapes)
    if texts.is_folder(init.workdir):
        return texts.initial(run.config, placed)
    snapshot = find(init.workdir, step, field="config.init.workdir")
    if init.partial:
        return fitting_weights(snapshot, placed.params, placed.buffers, init.weights)
    if init.weights == "text":
        _, buffers = load_weights(snapshot, placed.params, placed.buffers)
        return placed.params, buffers, f"the text encoder is that of {snapshot.path}"
    weights = load_weights(snapshot, placed.params, placed.buffers, init.weights)
    return *weights, f"fine-tuning the {init.weights} weights of {snapshot.path}"
