"""What the loop trains: `Task` is what it asks of a kind of run, DENOISER the ordinary kind."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np
from etils import epath

from ogdm_jax import config as configs
from ogdm_jax import data, parallel
from ogdm_jax.data import pictures
from ogdm_jax.data.labels import class_words
from ogdm_jax.sampling import generate
from ogdm_jax.training import decoding, logs, texts
from ogdm_jax.training import run as runs
from ogdm_jax.training.evaluate import Evaluator, write_report
from ogdm_jax.training.heldout import HeldOut
from ogdm_jax.training.state import TrainState
from ogdm_jax.training.workdir import open_source

RunT = TypeVar("RunT", bound=runs.AnyRun)
Log = Callable[[str], None]
Began = Mapping[str, int] | None


class Batches(Protocol):
    """The batches of one process, without an end; they can go on from a saved position."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, int]:
        """The position of the next batch."""
        ...

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a position that `get_state` gave."""
        ...


@dataclasses.dataclass(frozen=True)
class Task(Generic[RunT]):
    """What differs between kinds of runs; everything else is the same for every network.

    Attributes:
      build: (config, plan, workdir, log, began) -> the run; began: as of `run.build`.
      batches: run -> this process's batches.
      watch: (run, workdir, writer) -> write(step, state), called every config.sample.every in all
        processes.
      evaluation: (run, workdir) -> evaluate(state) -> a report with "fd", called every
        config.evaluate.every in all processes.
      held_out: run -> measure(state) -> {name: number}, called as often in all processes; None
        where nothing is held out.
      finish: (run, last state, workdir, log), called in all processes when the run has ended.
    """

    build: Callable[[configs.Config, parallel.Plan, epath.Path, Log, Began], RunT]
    batches: Callable[[RunT], Batches]
    watch: Callable[[RunT, epath.Path, logs.Writer], Callable[[int, TrainState], None]]
    evaluation: Callable[[RunT, epath.Path], Callable[[TrainState], dict[str, Any]]]
    held_out: Callable[[RunT], Callable[[TrainState], dict[str, float]] | None] = lambda run: None
    finish: Callable[[RunT, TrainState, epath.Path, Log], None] = lambda *_: None


def _build(
    config: configs.Config,
    plan: parallel.Plan,
    workdir: epath.Path,
    log: Log,
    began: Began,
) -> runs.DenoiserRun:
    source, tokenizer = open_source(config), None
    if config.network.kind == "sd":
        texts.check_source(source)
        tokenizer = texts.open_words(config, workdir)
        source = texts.tokenised(source, tokenizer)
    elif source.captioned:
        notes = (*source.notes, f"its captions are not used, as network.kind={config.network.kind}")
        source = dataclasses.replace(source, notes=notes)
    run = runs.build(config, source, plan, began=began)
    run = dataclasses.replace(run, tokenizer=tokenizer)
    generate.check_settings(config.sample, run.model)
    return decoding.with_decoder(run)


def batches(run: runs.AnyRun) -> data.Batches:
    """This process's batches of a run on images."""
    return data.batches(
        run.source,
        run.config.data.batch,
        run.config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        extra_references=run.methods.references,
        mates=run.methods.mates,
        workers=run.config.data.workers,
    )


def _watch(
    run: runs.DenoiserRun, workdir: epath.Path, writer: logs.Writer
) -> Callable[[int, TrainState], None]:
    """Writes samples/STEP.png of the moving average, from the same seeds every time; of a model of
    texts by the captions of the data's first images.
    """
    settings = run.config.sample
    if run.tokenizer is not None and jax.process_index() == 0:
        texts.keep(run.config, workdir)
    model, more = decoding.attach(run.model, {}, run.decoder)
    if run.model.latents is not None and run.decoder is None:
        return lambda step, state: None  # `decoding.with_decoder` has said it
    devices = run.plan.local_devices[:1]
    compiled = functools.cache(lambda: generate.sampler(model, settings, devices))

    def write(step: int, state: TrainState) -> None:
        params, buffers = (run.plan.local_copy(tree) for tree in (state.ema, state.buffers))
        if jax.process_index() != 0:
            return
        seeds = np.arange(settings.num)
        classes = run.model.label_dim
        labels: Any = seeds % classes if classes else None
        captions = class_words(labels, run.source.class_names)
        if run.model.text is not None:
            labels = texts.of_rows(run.source, seeds)
            captions = [run.source.captions[int(i) % len(run.source)] for i in seeds]
        buffers = {**buffers, **more}
        batch = generate.batch_size(model, settings.num, 1)
        parts = generate.generate(compiled(), params, buffers, seeds, labels, batch)
        picture = pictures.sheet(np.concatenate(list(parts)), captions=captions)
        pictures.save_png(workdir / "samples" / f"{step:08d}.png", picture)
        writer.image(step, "samples", picture)

    return write


def _evaluation(
    run: runs.DenoiserRun, workdir: epath.Path
) -> Callable[[TrainState], dict[str, Any]]:
    """Measures the moving average's samples; the lead process writes them with the report."""
    evaluator = Evaluator(run, run.model)

    def evaluate(state: TrainState) -> dict[str, Any]:
        params, buffers = (run.plan.local_copy(tree) for tree in (state.ema, state.buffers))
        report, images = evaluator.measure(int(state.step), params, buffers)
        write_report(workdir, report, images)
        return report

    return evaluate


def _held_out(run: runs.DenoiserRun) -> Callable[[TrainState], dict[str, float]] | None:
    """The loss of config.data.heldout with the moving average."""
    if not run.config.data.heldout:
        return None
    held_out = HeldOut(run)

    def measure(state: TrainState) -> dict[str, float]:
        params, buffers = (run.plan.local_copy(tree) for tree in (state.ema, state.buffers))
        return held_out(params, buffers) if jax.process_index() == 0 else {}

    return measure


DENOISER = Task(_build, batches, _watch, _evaluation, _held_out)
