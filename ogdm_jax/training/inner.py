"""The loop itself: what `loop.train` does when all is checked. It opens what it writes to."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from tqdm import tqdm

from ogdm_jax import cluster, data, places
from ogdm_jax import config as configs
from ogdm_jax.training import logs, snapshots, steps, trackers
from ogdm_jax.training import profile as profiles
from ogdm_jax.training import run as runs
from ogdm_jax.training.checkpoint import CheckpointError, Checkpoints, Snapshot, describe
from ogdm_jax.training.evaluate import note
from ogdm_jax.training.lock import LockError
from ogdm_jax.training.signals import StopSignals
from ogdm_jax.training.state import TrainState, copy
from ogdm_jax.training.task import Log, Task
from ogdm_jax.typing import Array, PyTree

Initial = tuple[PyTree, PyTree, str]  # (params, buffers) of a checkpoint, and what to say of them


class NotFinite(RuntimeError):
    """A loss or a state became nan or infinite; the message names it, the step, and the checkpoint
    that is still good.
    """


def no_log(_: str) -> None:
    """The log of the processes that do not lead."""


@functools.partial(jax.jit, static_argnums=1)
def _is_sound(state: TrainState, together: int) -> Array:
    """Whether all numbers of a state are finite, and far from the largest: sums of squares are
    finite, too.

    Args:
      state: of a run.
      together: so many numbers are summed as one vector; sums of hundreds of single tensors are
        slow to compile. 0: each tensor by itself, as where tensors are divided over devices.
    """
    groups: list[list[Array]] = []
    room = 0
    for leaf in jax.tree.leaves(state):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        if leaf.size > room:
            groups.append([])
            room = max(together, leaf.size)
        groups[-1].append(leaf.astype(jnp.float32).ravel())
        room -= leaf.size
    sums = [jnp.sum(jnp.square(jnp.concatenate(group))) for group in groups]
    return jnp.all(jnp.isfinite(jnp.stack(sums)))


@dataclasses.dataclass
class Loop:
    """One pass over the steps of a run.

    Attributes:
      run: the fixed parts.
      task: what kind of run it is.
      held_out: `Task.held_out`'s function.
      workdir: the training folder.
      profile: the steps that are traced; None: none.
      stop: the signals.
      log: of lines.
      found: the checkpoint that it goes on from; None: it is a fresh run.
      initial: the weights that a fresh run starts from; None: those of a fresh network.
      shapes: of the state.
      still_ours: raises LockError where another run has taken the folder over.
    """

    run: runs.AnyRun
    task: Task[Any]
    held_out: Callable[[TrainState], dict[str, float]] | None
    workdir: epath.Path
    profile: profiles.Steps | None
    stop: StopSignals
    log: Log
    found: Snapshot | None
    initial: Initial | None
    shapes: TrainState
    still_ours: Callable[[], None]

    def run_to_end(self) -> TrainState:
        """Opens what is written to, trains to the end of the run, and returns the last state."""
        run, config, workdir, found = self.run, self.run.config, self.workdir, self.found
        lead, step = jax.process_index() == 0, found.step if found else 0
        tracker = trackers.Tracker(config, workdir) if lead and config.log.tracker else None
        keep = config.train.keep, config.steps(config.train.keep_every), config.evaluate.keep_best
        with (
            Checkpoints(workdir, *keep) as self.saved,
            logs.Writer(workdir, config.log.tensorboard, lead, step, tracker) as self.writer,
            profiles.Profiler(self.profile if lead else None, workdir, self.log) as self.profiler,
        ):
            self.batches = self.task.batches(run)
            self.state = self._first_state()
            if lead:
                snapshots.remove_after(workdir, step, self.log)
                with places.written(workdir / "config.json") as new:
                    new.write_text(configs.to_json(config))
            self.watch = self.task.watch(run, workdir, self.writer)
            self.evaluate = self.task.evaluation(run, workdir)
            self.first = self.step = int(self.state.step)
            self.key = run.key  # once: it is three programs
            self.kept = found.step if found else None  # the step that was saved last
            self.position = self.batches.get_state()  # of the batch that follows the state
            self.interval, self.told = logs.Interval(), False
            self.stop.farewell = self._farewell
            try:
                self._run()
            except cluster.Stopped:
                self.stop.leave_once()
                raise
            except (NotFinite, CheckpointError, LockError):
                raise
            except Exception:
                self._rescue()
                raise
        return self.state

    def _first_state(self) -> TrainState:
        """The checkpoint's state, else a fresh one, of the initial weights if there are any."""
        run, initial = self.run, self.initial
        if self.found:
            state, position = self.saved.restore(self.found.step, self.shapes, run.plan)
            self.batches.set_state(position)
            return state
        if initial is None:
            return run.init()
        # what does not fit is a shape still (init.partial)
        shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
        if not any(map(shape, jax.tree.leaves(initial[:2]))):
            return run.init(initial[:2])  # of it alone: nothing is drawn that it replaces
        state = run.init()
        params, buffers = jax.tree.map(
            lambda new, fresh: fresh if shape(new) else new,
            initial[:2],
            (state.params, state.buffers),
        )
        return dataclasses.replace(state, params=params, ema=copy(params), buffers=buffers)

    def _run(self) -> None:
        run, first = self.run, self.first
        constants = run.constants()
        run.methods.check(self.state.carry, constants)
        compiled = run.compile(self.state)
        self.profiler.skipped(first)
        if first < run.steps:
            self._between_steps()
            self._first_step(compiled, constants)
        with self.stop.may_leave(None):
            silent = True if self.log is no_log else None  # None: where there is no terminal
            bar = tqdm(total=run.steps, initial=self.step, unit="step", leave=False, disable=silent)
            while True:
                self._between_steps()
                if self.step >= run.steps:
                    break
                self._advance(compiled, constants)
                self._tell_time()
                bar.update()
            self.saved.wait()
        if self.saved.latest() is not None:
            self.log(f"trained to step {self.step}; saved in {self.workdir}")

    def _first_step(self, compiled: Callable[..., Any], constants: PyTree) -> None:
        """The step that is compiled; a signal need not wait for it."""
        self.log("compiling the train step ...")
        began = time.monotonic()
        self._advance(compiled, constants)
        jax.block_until_ready(self.state.step)
        self.interval.restart()  # it would spoil the interval's speed
        self.log(f"compiled in {time.monotonic() - began:.1f} s")

    def _tell_time(self) -> None:
        """Says once how long the run will take, unless a line of the log was quicker."""
        found = None if self.told else self.interval.first_speed(self.state.step)
        if found:
            self.told, (first, last, each) = True, found
            left, speed = self.run.steps - self.step, self.run.config.data.batch / each
            self.log(
                f"{'time':9} about {logs.duration(left * each)} for {left:,} more steps, at "
                f"{speed:,.0f} images/s ({last - first + 1} timed); saves, pictures "
                "and evaluations come on top"
            )

    def _advance(self, compiled: Callable[..., Any], constants: PyTree) -> None:
        """One step, and what is written about it."""
        run, step = self.run, self.step + 1
        self.profiler.before(step)
        batch = run.plan.place_batch(next(self.batches))
        self.state, metrics = compiled(self.state, constants, batch, self.key)
        self.step, self.position = step, self.batches.get_state()
        self.profiler.after(step, metrics)
        self.interval.add(metrics)
        if step % max(self._every["log"], 1) == 0 or step == run.steps:
            self._write_numbers()

    @functools.cached_property
    def _every(self) -> dict[str, int]:
        """Steps from one save, line, picture and evaluation to the next; 0: none in between."""
        config = self.run.config
        return {
            "save": config.steps(config.train.save_every),
            "log": config.steps(config.log.every),
            "sample": config.steps(config.sample.every),
            "evaluate": config.steps(config.evaluate.every),
            "snapshot": snapshots.interval(config),
        }

    def _due(self, what: str) -> bool:
        """Whether something is due before the next step."""
        step, every = self.step, self._every[what]
        if not every or step % every:
            return False
        # A run that was stopped between saving and measuring measures when it is resumed.
        missed = what == "evaluate" and step > 0 and step not in self.saved.reports
        return step > self.first or (step == self.first and missed)

    def _between_steps(self) -> None:
        """Saves, draws and measures what is due after the steps that are done.

        Raises:
          NotFinite: instead of saving a state that came out of such a loss.
          CheckpointError: the save before this one has failed.
          LockError: another run has taken the folder over.
          cluster.Stopped: a signal came.
        """
        step, done = self.step, self.step == self.run.steps
        self.still_ours()
        self.saved.check()
        if self.stop.received or self.saved.preempted(step):
            raise cluster.Stopped
        measures = done or self._due("evaluate")
        with self.interval.paused():  # the speed is that of training
            # What is measured is saved, so that it can be kept as the best.
            if measures or self._due("save"):
                self._save()
            # What was due at the first step is written again: the run may have ended before.
            if step > 0 and (done or step % self._every["snapshot"] == 0):
                self._snapshot()
            if done or self._due("sample"):
                with self.stop.may_leave("leaving without the picture of this step"):
                    self.watch(step, self.state)
            if measures and self.held_out:
                with self.stop.may_leave("leaving the held-out loss of this step"):
                    numbers = self.held_out(self.state)
                    said = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
                    self.writer.write(step, numbers)
                    self.log(f"step {step}  {said}")
            if measures and self.run.config.evaluate.features:
                with self.stop.may_leave(
                    f"leaving the evaluation of step {step}, which the same command makes"
                ):
                    self._measure()

    def _save(self) -> None:
        run, step = self.run, self.step
        if step == self.kept:
            return
        self._check_state()
        shape, classes = run.source.shape, run.source.num_classes
        known = data.fingerprint(run.source)
        about = describe(run.config, shape, classes, known, run.weights_read)
        with self.stop.may_leave(None):
            self.saved.save(step, run.plan.globalise(self.state), about, self.position)
        self.kept = step

    def _snapshot(self) -> None:
        """Writes the averages of config.ema.stds, where there are any."""
        stds = self.run.config.ema.stds
        if not stds:
            return
        if self.step != self.kept:
            self._check_state()
        with self.stop.may_leave(None):
            whole = self.run.plan.local_copy
            averages = [jax.device_get(whole(average)) for average in self.state.averages]
            if jax.process_index() == 0:
                snapshots.write(self.workdir, self.step, stds, averages)

    def _check_state(self) -> None:
        """Raises NotFinite before a state that is no good is written."""
        self._check_finite()
        if not _is_sound(self.state, 0 if self.run.plan.kind == "sharded" else 1 << 23):
            at = f"the state after step {self.step} is not finite"
            raise NotFinite(f"{at}; {self._advice(self.step)}")

    def _farewell(self) -> None:
        """Saves what is not on disk, waits for it, and says so."""
        if self.step > self.first:
            self._save()
        self.saved.wait()
        latest = self.saved.latest()
        self.log(
            "stopped before anything was saved; the same command starts afresh"
            if latest is None
            else f"stopped at step {latest}; saved, the same command goes on from here"
        )

    def _rescue(self) -> None:
        """Saves what an error would lose, such as that of an image; says which step is safe.

        The processes of a run save together: where there are several, the others know nothing of
        this error.
        """
        if jax.process_count() > 1 or self.step == self.first:
            return
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            return  # it went wrong inside a step, which reuses the memory of the state
        try:
            self._save()
            self.saved.wait()
        except (CheckpointError, NotFinite, OSError) as error:
            self.log(f"step {self.step} is not saved: {error}")
        else:
            self.log(f"step {self.step} is saved; the same command goes on from there")

    def _measure(self) -> None:
        report = self.evaluate(self.state)
        sentence = note(report, self.saved, self.writer)
        self.log(f"{sentence}\nsamples: {self.workdir / 'samples.png'}")

    def _write_numbers(self) -> None:
        self._check_finite()
        batch = self.run.config.data.batch
        values = self.interval.means() | self.interval.speed(self.step, batch)
        self.writer.write(self.step, values)
        left = (self.run.steps - self.step) * batch / max(values["images_per_second"], 1e-9)
        self.told = self.step > self.first + 1  # the first step was compiled
        self.log(logs.line(self.step, values, left if self.told else None))

    def _check_finite(self) -> None:
        """Stops before a state that came out of a non-finite loss can be saved."""
        bad = self.interval.bad_loss()
        if bad:
            name, value, ago = bad
            step = self.step - ago
            raise NotFinite(f"{name} is {value} at step {step}; {self._advice(step - 1)}")

    def _advice(self, bad: int) -> str:
        """What to do where the state after `bad` steps is no good."""
        config = self.run.config
        rate = f"{config.optim.learning_rate / 10:g}"
        lower = f"--override --config.optim.learning_rate={rate}"
        with contextlib.suppress(CheckpointError):  # what is under way counts when it is closed
            self.saved.wait()
        good = [step for step in steps.complete(self.workdir) if step < bad]
        # With init.workdir, what the run began with is a step of that folder, and so is 0.
        if config.init.workdir and (not good or good[-1] == config.init.step):
            return (
                "start again by the same command with another --workdir and "
                f"--config.optim.learning_rate={rate}, or another weight of the method"
            )
        if not good:
            return (
                "no step before it is saved: start afresh by the same command with "
                f"--config.init.step=0 {lower}, or another weight of the method"
            )
        return (
            f"step {good[-1]} in {self.workdir} is good: go back to it by the same command with "
            f"--config.init.step={good[-1]} {lower}, or another weight of the method"
        )
