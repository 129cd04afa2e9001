"""The training loop. Its order matters: save, then take the next batch, step, log.

A checkpoint therefore holds the loader's position before the next batch, and a resumed run sees
exactly what an uninterrupted one sees. A run starts from the workdir's own checkpoint, else from
config.init.workdir, else fresh.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from ogdm_jax import cluster, parallel, places
from ogdm_jax import config as configs
from ogdm_jax.methods import discovery
from ogdm_jax.training import logs, resume
from ogdm_jax.training import profile as profiles
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import Checkpoints, complete, describe, find, load_weights
from ogdm_jax.training.evaluate import check_evaluation, note
from ogdm_jax.training.partial import fitting_weights
from ogdm_jax.training.signals import stop_signals
from ogdm_jax.training.state import TrainState, copy
from ogdm_jax.training.task import DENOISER, Batches, Log, Task
from ogdm_jax.typing import PyTree

Initial = tuple[PyTree, PyTree, str]  # (params, buffers) of a checkpoint, and what to say of them


class NotFinite(RuntimeError):
    """A loss became nan or infinite; the message names it, the step, and the checkpoint that is
    still good.
    """


def train(
    config: configs.Config,
    workdir: str | os.PathLike,
    log: Log = print,
    task: Task[Any] | None = None,
    profile: profiles.Steps | None = None,
) -> tuple[runs.Run, TrainState]:
    """Trains to config.train.duration, from the workdir's newest checkpoint if it has one.

    Args:
      config: of the run.
      workdir: the training folder, local or gs://.
      log: gets the lines of the log, in the lead process.
      task: what is trained; None trains a denoiser.
      profile: the (first, last) step of which a trace is written to workdir/profile.

    Returns:
      The run and its last state.

    Raises:
      ConfigError, SourceError, CheckpointError: bad settings, data or checkpoint, before anything
        is compiled.
      NotFinite: a loss is not finite; the last good checkpoint is kept.
      cluster.Stopped: SIGTERM or Ctrl-C came; the state is saved.
    """
    task, workdir = task or DENOISER, places.workdir(workdir)
    cluster.compare(_shared_settings(config, workdir))
    places.writable(workdir, "--workdir", keep=jax.process_count() > 1)
    plan = parallel.make_plan(config.parallel.plan, config.parallel.devices)
    check_evaluation(config)
    resumes = (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir())
    if resumes:
        resume.check(workdir, find(workdir), config, discovery.settings_types())
    run = task.build(config, plan, workdir, log)
    profiles.check(profile, run.steps)
    # Read before the loop writes anything.
    initial = _initial_weights(run) if config.init.workdir and not resumes else None
    lead = jax.process_index() == 0
    cluster.keep_safe(lambda: _how_to_go_on(workdir))
    with (
        _checkpoints(config, workdir) as saved,
        logs.Writer(workdir, config.log.tensorboard, lead) as writer,
        profiles.Profiler(profile if lead else None, workdir, log) as profiler,
        stop_signals() as stopped,
    ):
        batches = task.batches(run)
        state = _first_state(run, saved, batches, initial, log)
        if lead:
            with places.written(workdir / "config.json") as new:
                new.write_text(configs.to_json(config))
        loop = _Loop(
            run=run,
            batches=batches,
            watch=task.watch(run, workdir, writer),
            evaluate=task.evaluation(run, workdir),
            saved=saved,
            writer=writer,
            profiler=profiler,
            stopped=stopped,
            workdir=workdir,
            log=log if lead else _log_nothing,
        )
        return run, loop.run_from(state)


def _checkpoints(config: configs.Config, workdir: epath.Path) -> Checkpoints:
    settings = config.train
    every = config.steps(settings.keep_every)
    return Checkpoints(workdir, settings.keep, every, config.evaluate.keep_best)


def _shared_settings(config: configs.Config, workdir: epath.Path) -> dict[str, Any]:
    """What every process of a run has to have alike; their data may lie at different places."""
    flat = configs.flatten(config).items()
    settings = {f"config.{key}": value for key, value in flat if key != "data.data_dir"}
    return settings | {"--workdir": str(workdir), "the version of jax": jax.__version__}


def _how_to_go_on(workdir: epath.Path) -> str:
    """How a run goes on after one of its processes died, for the last sentence of the others."""
    steps = complete(workdir)
    if not steps:
        return (
            f"no checkpoint in {workdir} is complete yet; the same command in all processes starts "
            "afresh"
        )
    return (
        f"step {steps[-1]} in {workdir} is safe; the same command in all processes goes on from "
        "there"
    )


def _initial_weights(run: runs.Run) -> Initial:
    """The weights that fine-tuning starts from, placed as the plan wants them."""
    init = run.config.init
    snapshot = find(init.workdir, field="config.init.workdir")
    shapes = run.plan.shapes(jax.eval_shape(run.create, run.key))
    if init.partial:
        return fitting_weights(snapshot, shapes.params, shapes.buffers, init.weights)
    weights = load_weights(snapshot, shapes.params, shapes.buffers, init.weights)
    return *weights, f"fine-tuning the {init.weights} weights of {snapshot.path}"


def _first_state(
    run: runs.Run, saved: Checkpoints, batches: Batches, initial: Initial | None, log: Log
) -> TrainState:
    """The newest checkpoint's state, else a fresh one, of the initial weights if there are any."""
    latest = saved.latest()
    if latest is not None:
        state, position = saved.restore(latest, jax.eval_shape(run.create, run.key), run.plan)
        batches.set_state(position)
        log(f"resumed from step {latest}")
        return state
    state = run.init()
    if initial is not None:
        *loaded, said = initial
        # what does not fit is a shape still (init.partial)
        params, buffers = jax.tree.map(
            lambda new, fresh: fresh if isinstance(new, jax.ShapeDtypeStruct) else new,
            tuple(loaded),
            (state.params, state.buffers),
        )
        state = dataclasses.replace(state, params=params, ema=copy(params), buffers=buffers)
        log(said)
    return state


@dataclasses.dataclass
class _Loop:
    """One pass over the steps of a run, and what it needs for that.

    Attributes:
      run: the fixed parts.
      batches: of this process.
      watch: `Task.watch`'s function.
      evaluate: `Task.evaluation`'s function.
      saved: the checkpoints.
      writer: of the numbers.
      profiler: of the steps that are traced.
      stopped: whether a signal came.
      workdir: the training folder.
      log: of lines.
    """

    run: runs.Run
    batches: Batches
    watch: Callable[[int, TrainState], None]
    evaluate: Callable[[TrainState], dict[str, Any]]
    saved: Checkpoints
    writer: logs.Writer
    profiler: profiles.Profiler
    stopped: Callable[[], bool]
    workdir: epath.Path
    log: Log

    def run_from(self, state: TrainState) -> TrainState:
        """Trains from a state to the end of the run; returns the last state."""
        run, first = self.run, int(state.step)
        constants = run.constants()
        run.check(state.carry, constants)
        compiled = run.compile(state)
        interval = logs.Interval()
        self.profiler.skipped(first)
        advance = _progress_bar(first, run.steps, self.log)
        for step in range(first, run.steps + 1):
            self._between_steps(step, first, state, interval)
            if step == run.steps:
                break
            self.profiler.before(step + 1)
            batch = run.plan.place_batch(next(self.batches))
            state, metrics = compiled(state, constants, batch, run.key)
            self.profiler.after(step + 1, metrics)
            interval.add(metrics)
            if step == first:  # it would spoil the interval's speed
                jax.block_until_ready(metrics)
                self.log(f"compiled in {interval.restart():.1f} s")
            advance(step + 1)
            if (step + 1) % max(self._every["log"], 1) == 0 or step + 1 == run.steps:
                self._write_numbers(step + 1, interval)
        return state

    @functools.cached_property
    def _every(self) -> dict[str, int]:
        """Steps from one save, line, picture and evaluation to the next; 0: none in between."""
        config = self.run.config
        return {
            "save": config.steps(config.train.save_every),
            "log": config.steps(config.log.every),
            "sample": config.steps(config.sample.every),
            "evaluate": config.steps(config.evaluate.every),
        }

    def _due(self, what: str, step: int, first: int) -> bool:
        """Whether something is due before the step that follows `step`."""
        every = self._every[what]
        if not every or step % every:
            return False
        # A run that was stopped between saving and measuring measures when it is resumed.
        missed = what == "evaluate" and step > 0 and step not in self.saved.reports
        return step > first or (step == first and missed)

    def _between_steps(
        self, step: int, first: int, state: TrainState, interval: logs.Interval
    ) -> None:
        """Saves, draws and measures what is due after `step` steps.

        Raises:
          NotFinite: instead of saving a state that came out of such a loss.
          cluster.Stopped: a signal came; the state is saved.
        """
        done = step == self.run.steps
        stop = self.stopped() or self.saved.preempted(step)
        measures = done or self._due("evaluate", step, first)
        # What is measured is saved, so that it can be kept as the best.
        if stop or measures or self._due("save", step, first):
            self._save(step, state, interval)
        with interval.paused():  # the speed is that of training
            if done or self._due("sample", step, first):
                self.watch(step, state)
            if stop:
                self.log(f"stopped at step {step}; saved, the same command goes on from here")
                self.saved.close()
                raise cluster.Stopped
            if measures and self.run.config.evaluate.features:
                self._measure(state)

    def _save(self, step: int, state: TrainState, interval: logs.Interval) -> None:
        run = self.run
        self._check_finite(step, interval)
        about = describe(run.config, run.source.shape, run.source.num_classes)
        self.saved.save(step, run.plan.globalise(state), about, self.batches.get_state())

    def _measure(self, state: TrainState) -> None:
        report = self.evaluate(state)
        sentence = note(report, self.saved, self.writer)
        self.log(f"{sentence}\nsamples: {self.workdir / 'samples.png'}")

    def _write_numbers(self, step: int, interval: logs.Interval) -> None:
        self._check_finite(step, interval)
        values = interval.means() | interval.speed(step, self.run.config.data.batch)
        self.writer.write(step, values)
        self.log(logs.line(step, values))

    def _check_finite(self, step: int, interval: logs.Interval) -> None:
        """Stops before a state that came out of a non-finite loss can be saved."""
        bad = interval.bad_loss()
        if bad:
            raise NotFinite(
                f"{bad[0]} is {bad[1]} by step {step}; the newest good checkpoint is step "
                f"{self.saved.latest()}: "
                "lower optim.learning_rate or the method's weight and start again from there"
            )


def _progress_bar(first: int, total: int, log: Log) -> Callable[[int], None]:
    """A progress bar on a terminal of the lead process; nothing elsewhere."""
    if log is _log_nothing or not sys.stderr.isatty():
        return lambda step: None
    from tqdm import tqdm

    bar = tqdm(total=total, initial=first, unit="step", leave=False)

    def advance(step: int) -> None:
        bar.update(step - bar.n)

    return advance


def _log_nothing(_: str) -> None:
    """The log of the processes that do not lead."""
