"""What a run says before it compiles: what was understood of its settings, data and devices."""

import jax
from etils import epath

import ogdm_jax
from ogdm_jax import models
from ogdm_jax.training import run as runs
from ogdm_jax.training import snapshots
from ogdm_jax.training.state import TrainState

_NAMES = 60  # characters of class names


def lines(run: runs.AnyRun, shapes: TrainState, workdir: epath.Path, found: str) -> list[str]:
    """About eight lines: what is trained, on what, with what, how long, where.

    Args:
      run: the run.
      shapes: of its state.
      workdir: the training folder.
      found: how the run begins, in a sentence.
    """
    config, plan = run.config, run.plan
    count, kind = len(plan.devices), plan.devices[0].device_kind
    parts = config.data.batch // (count * config.optim.accumulate)
    rounds = f", {config.optim.accumulate} rounds" if config.optim.accumulate > 1 else ""
    methods = f", with {', '.join(config.methods)}" if config.methods else ""
    number, kimg = models.parameter_count(shapes.params), run.steps * config.data.batch / 1000
    size = f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"
    of_kind = f", {config.network.kind}" if config.task == "denoiser" else ""
    said = {
        "ogdm_jax": f"{ogdm_jax.__version__}, jax {jax.__version__}",
        "data": _data(run),
        "network": f"{config.task}{of_kind}, {size} parameters{methods}",
        "devices": f"{count} x {kind}, plan {plan.kind}; {config.data.batch} images a step "
        f"({parts} a device{rounds})",
        "memory": f"{_bytes(plan.state_bytes(shapes))} a device for the state; activations come on "
        "top (ogdm plan says how much)",
        "length": f"{run.steps:,} steps = {kimg:,.{0 if kimg >= 10 else 2}f} kimg; "
        f"{_intervals(run)}",
        "folder": f"{workdir}: {found}",
    }
    if stds := config.ema.stds:
        every, bytes_each = snapshots.interval(config), 2 * number * len(stds)
        said["averages"] = (
            f"of stds {', '.join(map(str, stds))}; every {every:,} steps a snapshot of "
            f"{_bytes(bytes_each)}, {run.steps // every} in the run (ogdm ema)"
        )
    if read := run.weights_read:
        said["weights"] = ", ".join(f"{field} is of step {step:,}" for field, step in read.items())
    notes = [*run.source.notes]
    if run.source.images is not None and config.data.workers > 0:
        workers = config.data.workers
        notes.append(f"data.workers: {workers} has no effect, the set is held in memory")
    return [f"{name:9} {text}" for name, text in said.items()] + [
        f"{'note':9} {text}" for text in notes
    ]


def _data(run: runs.AnyRun) -> str:
    source, config = run.source, run.config
    text = f"{source.name}, {len(source):,} images of {'x'.join(map(str, source.shape))}"
    if not source.num_classes:
        return f"{text}, {'with captions' if source.captioned else 'no classes'}"
    names = ", ".join(source.class_names)
    names = names if len(names) <= _NAMES else f"{names[:_NAMES].rpartition(',')[0]}, ..."
    text += f", {source.num_classes} classes" + (f" ({names})" if names else "")
    return text + ("" if config.data.conditional else ", which the network does not see")


def _intervals(run: runs.AnyRun) -> str:
    """How many steps lie between two saves, lines, evaluations and pictures."""
    config = run.config
    every = {
        "save": config.train.save_every,
        "log": config.log.every,
        "evaluate": config.evaluate.every if config.evaluate.features else "0 steps",
    }
    if config.task != "discriminator":  # which draws none
        every["picture"] = config.sample.every
    steps = {name: config.steps(text) for name, text in every.items()}
    at_end = "at the end" if config.evaluate.features else "never"
    words = {"log": "at every step", "evaluate": at_end}
    return ", ".join(
        f"{name} " + (f"every {n:,}" if n else words.get(name, "at the end"))
        for name, n in steps.items()
    )


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"
