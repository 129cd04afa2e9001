"""The training loop. Order, on purpose: save, THEN take the next batch, step, log.

The checkpoint therefore holds the loader's position before the next batch, and a resumed run sees
exactly what an
uninterrupted one sees. Resume priority: the workdir's own checkpoint, then config.init.workdir,
  then fresh.
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath

from ogdm_jax import cluster, data, parallel, places
from ogdm_jax import config as configs
from ogdm_jax.data import pictures as report
from ogdm_jax.methods import contract as slots
from ogdm_jax.sampling import generate
from ogdm_jax.training import logs
from ogdm_jax.training import profile as profiles
from ogdm_jax.training import run as runs
from ogdm_jax.training import state as states
from ogdm_jax.training.checkpoint import Checkpoints, complete, describe, find, load_weights
from ogdm_jax.training.evaluate import Evaluator, check_evaluation, make_evaluation
from ogdm_jax.training.workdir import open_source
from ogdm_jax.typing import PyTree

Say = Callable[[str], None]


class NotFinite(RuntimeError):
    """A loss became nan or infinite; the message names it, the step, and the checkpoint that is
    still good.
    """


@dataclasses.dataclass(frozen=True)
class Task:
    """What the loop trains; everything else is the same for every network.

    Attributes:
      build: (config, plan, workdir, say) -> Run.
      batches: run -> endless iterator of this process's batches, with get_state and set_state.
      watch: (run, workdir, writer) -> write(step, state), called every config.sample.every in all
        processes.
      evaluator: (run, workdir) -> evaluate(state) -> report with "fd", called every
        config.evaluate.every.
    """

    build: Callable[[configs.Config, parallel.Plan, epath.Path, Say], runs.Run]
    batches: Callable[[runs.Run], Any]
    watch: Callable[[runs.Run, epath.Path, logs.Writer], Callable[[int, states.TrainState], None]]
    evaluator: Callable[[runs.Run, epath.Path], Evaluator]


def train(
    config: configs.Config,
    workdir: str | os.PathLike,
    say: Say = print,
    task: Task | None = None,
    profile: profiles.Steps | None = None,
) -> tuple[runs.Run, states.TrainState]:
    """Trains to config.train.duration, from the workdir's newest checkpoint if it has one.

    Args:
      workdir: local, or gs://.   task: what is trained; None = a denoiser.
      profile: the (first, last) step of which a trace is written to workdir/profile.

    Returns:
      The run and its last state. After SIGTERM or Ctrl-C the state is saved, and cluster.Stopped
      raised.

    Raises:
      ConfigError, SourceError, CheckpointError: bad settings, data or checkpoint, before anything
      is compiled. NotFinite: a loss is not finite; the last good checkpoint is kept.
    """
    task, workdir = task or DENOISER, places.workdir(workdir)
    cluster.compare(_shared(config, workdir))
    places.writable(workdir, "--workdir", keep=jax.process_count() > 1)
    plan = parallel.make_plan(config.parallel.plan, config.parallel.devices)
    check_evaluation(config)
    resumes = (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir())
    if resumes:
        configs.check_same_run(find(workdir).config, config, slots.settings_types())
    run = task.build(config, plan, workdir, say)
    profiles.check(profile, run.steps)
    given = (
        _given(run) if config.init.workdir and not resumes else None
    )  # before the loop writes anything
    lead = jax.process_index() == 0
    batch = config.data.batch
    cluster.keep_safe(lambda: _safe(workdir))
    with (
        Checkpoints(
            workdir,
            config.train.keep,
            configs.duration(config.train.keep_every, batch),
            config.evaluate.keep_best,
        ) as saved,
        logs.Writer(workdir, config.log.tensorboard, lead) as writer,
        profiles.Profiler(profile if lead else None, workdir, say) as profiler,
        _stop_signals() as stopped,
    ):
        batches = task.batches(run)
        state = _start(run, saved, batches, given, say)
        if lead:
            with places.written(workdir / "config.json") as new:
                new.write_text(configs.to_json(config))
        state = _steps(
            task,
            run,
            state,
            saved,
            batches,
            writer,
            profiler,
            stopped,
            workdir,
            say if lead else _silent,
        )
    return run, state


def _shared(config: configs.Config, workdir: epath.Path) -> dict[str, Any]:
    """What every process of a run has to have alike; their data may lie at different places."""
    flat = configs.flatten(config).items()
    settings = {f"config.{key}": value for key, value in flat if key != "data.data_dir"}
    return settings | {"--workdir": str(workdir), "the version of jax": jax.__version__}


def _safe(workdir: epath.Path) -> str:
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


def _given(run: runs.Run) -> tuple[PyTree, PyTree, epath.Path]:
    """(params, buffers) that fine-tuning starts from, where the plan wants them, and their
    checkpoint.
    """
    init = run.config.init
    snapshot = find(init.workdir, field="config.init.workdir")
    shapes = run.plan.shapes(jax.eval_shape(run.create, run.key))
    return *load_weights(snapshot, shapes.params, shapes.buffers, init.weights), snapshot.path


def _start(
    run: runs.Run,
    saved: Checkpoints,
    batches,
    given: tuple[PyTree, PyTree, epath.Path] | None,
    say: Say,
) -> states.TrainState:
    """The state to begin with, by resume priority."""
    latest = saved.latest()
    if latest is not None:
        state, position = saved.restore(latest, jax.eval_shape(run.create, run.key), run.plan)
        batches.set_state(position)
        say(f"resumed from step {latest}")
        return state
    state = run.init()
    if given is not None:
        params, buffers, path = given
        state = state.replace(params=params, ema=states.copy(params), buffers=buffers)
        say(f"fine-tuning the {run.config.init.weights} weights of {path}")
    return state


def _steps(
    task, run, state, saved, batches, writer, profiler, stopped, workdir, say
) -> states.TrainState:
    config, plan, batch = run.config, run.plan, run.config.data.batch
    every = {
        "save": configs.duration(config.train.save_every, batch),
        "log": max(configs.duration(config.log.every, batch), 1),
        "sample": configs.duration(config.sample.every, batch),
        "evaluate": configs.duration(config.evaluate.every, batch),
    }
    frozen = run.frozen()
    for method in run.filled.methods:
        if method.verify is not None:
            method.verify(state.memory[method.name], frozen["whole"][method.name])
    compiled = run.compile(state)
    about = describe(config, run.source.shape, run.source.num_classes)
    first = int(state.step)
    interval, began, count = logs.Interval(), time.monotonic(), 0
    profiler.skipped(first)
    bar = _progress(first, run.steps, say)
    watch = task.watch(run, workdir, writer)
    evaluate = make_evaluation(task.evaluator(run, workdir), workdir, saved, writer, say)
    for step in range(first, run.steps + 1):
        done = step == run.steps
        stop = stopped() or saved.preempted(step)
        due = {name: bool(n) and step % n == 0 and step > first for name, n in every.items()}
        if (
            every["evaluate"]
            and step == first > 0
            and step % every["evaluate"] == 0
            and step not in saved.reports
        ):
            due["evaluate"] = True  # stopped between saving and measuring
        if (
            stop or done or due["save"] or due["evaluate"]
        ):  # so that there is a checkpoint to keep as the best
            _check_finite(step, interval, saved)
            saved.save(step, plan.globalise(state), about, batches.get_state())
        paused = time.monotonic()
        if due["sample"] or done:
            watch(step, state)
        if stop:
            say(f"stopped at step {step}; saved, the same command goes on from here")
            saved.close()
            raise cluster.Stopped
        if due["evaluate"] or done:
            evaluate(state)
        if done:
            return state
        began += time.monotonic() - paused  # speed is that of training
        profiler.before(step + 1)
        state, metrics = compiled(state, frozen, plan.place_batch(next(batches)), run.key)
        profiler.after(step + 1, metrics)
        if step == first:
            jax.block_until_ready(metrics)
            say(f"compiled in {time.monotonic() - began:.1f} s")
            began = time.monotonic()
        else:
            count += 1  # the compiling step would spoil the interval's speed
        interval.add(metrics)
        bar(step + 1)
        if (step + 1) % every["log"] == 0 or step + 1 == run.steps:
            _check_finite(step + 1, interval, saved)
            values = interval.means()
            seconds = time.monotonic() - began
            values |= {
                "kimg": (step + 1) * batch / 1000,
                "images_per_second": count * batch / max(seconds, 1e-9),
            }
            began, count = time.monotonic(), 0
            writer.write(step + 1, values)
            say(logs.line(step + 1, values))
    return state


def _check_finite(step: int, interval: logs.Interval, saved: Checkpoints) -> None:
    """Stops before a state that came out of a non-finite loss can be saved."""
    bad = interval.bad_loss()
    if bad:
        raise NotFinite(
            f"{bad[0]} is {bad[1]} by step {step}; the newest good checkpoint is step "
            f"{saved.latest()}: "
            "lower optim.learning_rate or the method's weight and start again from there"
        )


def _grids(
    run: runs.Run, workdir: epath.Path, writer: logs.Writer
) -> Callable[[int, states.TrainState], None]:
    """Writes samples/STEP.png of the moving average, from the same seeds every time."""
    settings = run.config.sample
    compiled = []

    def write(step: int, state: states.TrainState) -> None:
        params, buffers = (run.plan.local_copy(tree) for tree in (state.ema, state.buffers))
        if jax.process_index() != 0:
            return
        if not compiled:
            compiled.append(generate.sampler(run.model, settings, run.plan.local_devices[:1]))
        seeds = np.arange(settings.num)
        classes = run.model.label_dim
        labels = seeds % classes if classes else None
        images = np.concatenate(
            list(generate.generate(compiled[0], params, buffers, seeds, labels, settings.num))
        )
        picture = report.sheet(images)
        report.save_png(workdir / "samples" / f"{step:08d}.png", picture)
        writer.image(step, "samples", picture)

    return write


def _build(config: configs.Config, plan: parallel.Plan, workdir: epath.Path, say: Say) -> runs.Run:
    run = runs.build(config, open_source(config), plan)
    generate.check_settings(config.sample, run.model)
    return run


def _batches(run: runs.Run) -> data.Batches:
    return data.batches(
        run.source,
        run.config.data.batch,
        run.config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        extra_references=run.filled.references,
        workers=run.config.data.workers,
    )


DENOISER = Task(build=_build, batches=_batches, watch=_grids, evaluator=Evaluator)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGTERM or Ctrl-C into a flag that the loop reads between steps; a second one
    acts at once.

    Among several processes JAX's own handler of SIGTERM stays: through it all of them learn of a
    signal to one, and stop at the same step (Checkpoints.preempted). Ctrl-C is passed on to it.
    """
    flagged = []
    previous = {}
    several = jax.process_count() > 1

    def handle(number, _frame):
        signal.signal(number, previous[number])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            flagged.append(number)

    try:
        for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not in the main thread (a notebook's worker): nothing to catch there
    try:
        yield lambda: bool(flagged)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress(first: int, total: int, say: Say) -> Callable[[int], None]:
    """A progress bar on a terminal of the lead process; nothing elsewhere."""
    if say is _silent or not sys.stderr.isatty():
        return lambda step: None
    from tqdm import tqdm

    bar = tqdm(total=total, initial=first, unit="step", leave=False)
    return lambda step: bar.update(step - bar.n)


def _silent(_: str) -> None:
    pass
