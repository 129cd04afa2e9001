"""Is this device right? Golden files at the highest precision, accumulation, and resuming bit
for bit.

Nothing here is timed: the cases run side by side, with XLA's deterministic operations and without
its search for the quickest algorithm (`ENV`).
"""

import fnmatch
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerator_parts import ROOT, Case, Options, programs, sizes, train

FAMILIES = ("edm_*", "gd_unet_*", "ogdm_*", "stf_*", "dsg_*")
MODULES = ("edm", "adm", "ogdm", "stf", "dsg", "samplers")
REHEARSED = ("ogdm_edm_step_scalar", "stf_targets_a", "dsg_step_4")
ENV = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


def cases(options: Options) -> list[Case]:
    names = sorted(path.stem for path in Path(options.golden).glob("*.npz"))
    chosen = [name for name in names if any(fnmatch.fnmatch(name, family) for family in FAMILIES)]
    if options.rehearse:
        chosen = [name for name in chosen if name in REHEARSED]
    return [Case("exact", name, "exact", timed=False) for name in ("accumulate", "resume", *chosen)]


def run(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    jax = programs.start()
    jax.config.update("jax_default_matmul_precision", "highest")
    return {"accumulate": accumulate, "resume": resume}.get(
        name, lambda options: golden(name, options)
    )(options)


def golden(name: str, options: Options) -> dict[str, Any]:
    """One golden file by the check that tests/test_golden.py runs."""
    import jax

    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    from tests.support import golden_support

    for module in MODULES:
        loaded = importlib.import_module(f"tests.support.families.{module}")
        if jax.default_backend() != "cpu":  # the shortcut of the tests is for CPU's compiler
            for alias in {"jit", "quick_jit"} & set(vars(loaded)):
                setattr(loaded, alias, jax.jit)
    prefix = max((p for p in golden_support.FAMILIES if name.startswith(p)), key=len)
    try:
        golden_support.FAMILIES[prefix](golden_support.Golden(Path(options.golden) / f"{name}.npz"))
    except AssertionError as error:
        words = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in words if line.startswith(("Max", "Mismatched"))]
        return {"passed": False, "why": " | ".join([*words[:2], *told])[:400]}
    return {"passed": True}


def _run(options: Options, *flags: str) -> Any:
    """A tiny OGDM run on random images with dropout, augmentation and labels: all that a step
    draws.

    In the rehearsal without OGDM and augmentation: they take a minute of a CPU's time to compile.
    """
    from ogdm_jax import config as configs
    from ogdm_jax import parallel
    from ogdm_jax.training import run as runs

    small = (
        *sizes.REHEARSAL.flags,
        "data.batch=16",
        "data.conditional=true",
        "data.label_dropout=0.2",
    )
    # otherwise the discriminator's statistics are those of a whole round
    small += ("ogdm.statistics_batch=8",)
    small += ("methods=", "data.augment=0.0") if options.rehearse else ()
    config = configs.load(ROOT / "configs" / "cifar10_ogdm.py", (*small, *flags))
    return runs.build(config, train.random_images((8, 8, 3), 64, 10), parallel.make_plan("mesh", 1))


def _trainer(run: Any) -> Callable[[Any, int, int], tuple[Any, dict[str, float]]]:
    """(state, first, last) -> (state, metrics) after the steps first to last - 1; compiled once."""
    import jax

    from ogdm_jax import data

    step, constants = run.compile(jax.eval_shape(run.create, run.key)), run.constants()

    def trained(state: Any, first: int, last: int) -> tuple[Any, dict[str, float]]:
        metrics: dict[str, Any] = {}
        batches = data.batches(run.source, run.config.data.batch, 0, start_step=first)
        for _ in range(first, last):
            state, metrics = step(state, constants, run.plan.place_batch(next(batches)), run.key)
        return state, {name: float(value) for name, value in metrics.items()}

    return trained


def accumulate(options: Options) -> dict[str, Any]:
    """Two halves of a batch, one after the other, make the step of the whole batch: draws belong to
    examples.
    """
    import jax
    import numpy as np

    whole, parts = (_run(options, f"optim.accumulate={rounds}") for rounds in (1, 2))
    start = jax.tree.map(np.asarray, whole.init())  # on the host: the step takes what it is given
    (a, seen), (b, also) = (_trainer(run)(start, 0, 2) for run in (whole, parts))
    losses = {"loss", "loss/denoise", "loss/ogdm", "loss/ogdm_discriminator"}
    names = seen.keys() & (losses | {"grad_norm"})
    # loss/ogdm begins near 0
    off = max(abs(seen[name] - also[name]) / max(abs(seen[name]), 1.0) for name in names)
    gaps = [
        np.abs(np.asarray(x) - np.asarray(y)).max()
        for x, y in zip(*map(jax.tree.leaves, (a.params, b.params)))
    ]
    # Adam turns a gradient that is float noise into its sign: a weight may move by learning_rate a
    # step.
    passed = off < 2e-4 and max(gaps) < 2.5 * whole.config.optim.learning_rate
    return {"passed": bool(passed), "metrics_off": float(off), "weights_off": float(max(gaps))}


def resume(options: Options) -> dict[str, Any]:
    """Save in the middle, restore, go on: the bits of an uninterrupted run; beside it, whether a
    run repeats itself.
    """
    import tempfile

    import jax
    import numpy as np

    from ogdm_jax.training.checkpoint import Checkpoints, describe

    run = _run(options)
    trained, start = _trainer(run), jax.tree.map(np.asarray, run.init())
    (straight, _), (again, _), (half, _) = (trained(start, 0, last) for last in (4, 4, 2))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        with Checkpoints(folder) as saved:
            saved.save(
                2, half, describe(run.config, run.source.shape, run.source.num_classes), {"step": 2}
            )
        with Checkpoints(folder) as saved:
            restored, _ = saved.restore(2, jax.eval_shape(run.create, run.key), run.plan)
    resumed, _ = trained(restored, 2, 4)
    equal = lambda tree: all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(*map(jax.tree.leaves, (straight, tree)))
    )
    return {"passed": equal(resumed), "repeats_itself": equal(again)}
