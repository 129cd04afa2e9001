"""Real colour images: EDM and OGDM from the same start, equal images seen, compared at few and
at many evaluations.

Both networks begin with the same weights and see the same batches with the same noise; they train
in turns of a few steps until the time is up, so that whenever that is, both have done equally many.
The distance is fd_lite0 to the half of the set, beside that of the other half to it (the floor); a
distance clearly below the floor would mean copies.
"""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerator_parts import ROOT, Case, Options, programs, sizes, train

METHODS = {"edm": "methods=", "ogdm": "methods=ogdm"}
SUBSET = "skin_tone=0"  # one picture of each emoji
SIGMA_DATA = 0.6  # of that subset in [-1, 1]
MOST = 240.0  # seconds of training that one method gets at most
SHOWN = 10  # images of a cell of the grid
_RECIPE = (
    f"precondition.sigma_data={SIGMA_DATA}",
    "ema.halflife=50 kimg",
    "optim.ramp=100 kimg",
    "network.dtype=bfloat16",
)


def cases(options: Options) -> list[Case]:
    names = [f"images-{kind}-{method}" for kind in ("step", "init") for method in METHODS]
    names += [
        f"images-{solver}-{evaluations}"
        for solver, evaluations in sizes.of(options.rehearse).evaluations
    ]
    names += [] if options.rehearse else ["images-lite0-features"]
    needs = "" if options.rehearse else "images"
    return [
        Case("images", "edm-and-ogdm", "images", programs=tuple(names), needs=needs, seconds=30.0)
    ]


def source_of(options: Options) -> Any:
    """The default subset of the file, or (rehearsal) random pictures."""
    from ogdm_jax import data

    if not options.images:
        return train.random_images(sizes.REHEARSAL.shape, 96)
    if options.rehearse:
        return data.open_source(
            f"npz:{options.images}?{SUBSET}&base<40", resolution=sizes.REHEARSAL.shape[0]
        )
    return data.open_source(f"npz:{options.images}?{SUBSET}")


def build(method: str, options: Options) -> Any:
    from ogdm_jax import config as configs
    from ogdm_jax import parallel
    from ogdm_jax.training import run as runs

    size = sizes.of(options.rehearse)
    flags = (*_RECIPE, *size.images_flags, METHODS[method], f"data.batch={size.images_batch}")
    config = configs.load(ROOT / "configs" / "cifar10_ogdm.py", flags)
    return runs.build(config, source_of(options), parallel.make_plan("mesh", 1))


def prepare(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    """Compiles images-step-METHOD, images-init-METHOD, images-SOLVER-EVALUATIONS, or what fd_lite0
    needs.
    """
    jax = programs.start()
    import numpy as np

    from ogdm_jax.sampling import generate

    _, kind, which = name.split("-")
    if kind in ("step", "init"):
        run = build(which, options)
        state, *rest = run.shapes()
        if kind == "init":
            return programs.save(name, options, jax.jit(run.create), (rest[-1],))
        return programs.save(name, options, run.compile(state), (state, *rest))
    run = build("edm", options)
    if kind == "lite0":  # no program of ours: it goes into JAX's own cache on disk
        from ogdm_jax.metrics import feature_space

        feature_space("lite0")(run.source.take(np.arange(32))["image"])
        return {}
    settings = dataclasses.replace(run.config.sample, solver=kind, steps=_steps(kind, int(which)))
    images = generate.sampler(run.model, settings, jax.devices()[:1])
    weights = jax.eval_shape(run.model.init, jax.random.key(0))
    seeds = jax.ShapeDtypeStruct((_sample_batch(options),), np.uint32)
    return programs.save(
        name, options, images, (*weights, seeds, None, [], []), steps=settings.steps
    )


def _steps(solver: str, evaluations: int) -> int:
    """Steps that cost at most so many network evaluations: N steps of Heun cost 2N - 1."""
    return (evaluations + 1) // 2 if solver == "heun" else evaluations


def _sample_batch(options: Options) -> int:
    return 16 if options.rehearse else 512


def run(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    began = time.monotonic()
    programs.start()
    import numpy as np

    size, run = sizes.of(options.rehearse), build("edm", options)
    found: dict[str, Any] = {"batch": size.images_batch, "set": len(run.source)}
    trained, told = _train(run, options, began)
    found |= told
    report(found)
    judge, floor = _judge(run.source, size.samples or len(run.source) // 2)
    found |= floor | {"cells": []}
    rows = [run.source.take(np.linspace(0, len(run.source) - 1, SHOWN).astype(int))["image"]]
    names = [f"images-{solver}-{evaluations}" for solver, evaluations in size.evaluations]
    with ThreadPoolExecutor(4) as pool:  # those that nobody compiled yet
        samplers = list(pool.map(lambda name: programs.load(name, options, prepare), names))
    for (solver, evaluations), sampler in zip(size.evaluations, samplers):
        for method, state in trained.items():
            pictures = _sample(sampler, state, found["samples"], _sample_batch(options))
            cell = {"solver": solver, "nfe": evaluations, "method": method} | judge(pictures)
            rows.append(pictures[:SHOWN])
            found["cells"].append(cell)
            _grid(rows, Path(options.out) / "images.png")
            report(found)
    found["grid_rows"] = [
        "real",
        *(f"{c['method']} {c['solver']} {c['nfe']}" for c in found["cells"]),
    ]
    return found


def _train(run: Any, options: Options, began: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state by method, what it took): turns of `block` steps until the part's time, less that of
    judging, is up.
    """
    import jax
    import numpy as np

    from ogdm_jax import data

    size = sizes.of(options.rehearse)
    steps = {m: programs.load(f"images-step-{m}", options, prepare) for m in METHODS}
    trained = {
        m: programs.load(f"images-init-{m}", options, prepare).run(jax.random.key(0))
        for m in METHODS
    }
    # Equal by construction (the same key); made equal bit for bit, whatever the two compiled
    # programs round.
    start = jax.tree.map(np.asarray, trained["edm"].params)
    trained["ogdm"] = trained["ogdm"].replace(
        params=jax.device_put(start), ema=jax.device_put(start)
    )
    constants = run.constants()
    batches = data.batches(run.source, size.images_batch, 0)
    reserve = (
        min(max(40.0, 0.35 * options.seconds), 90.0)
        if not options.rehearse
        else options.seconds - 3.0
    )
    until = began + options.seconds - reserve
    spent, done, losses = dict.fromkeys(METHODS, 0.0), 0, {}
    turn = 0.0
    while done < 2 * size.block or (time.monotonic() + turn < until and max(spent.values()) < MOST):
        block = [batches.at(done + i) for i in range(size.block)]
        turn = time.monotonic()
        for method, program in steps.items():
            start = time.monotonic()
            for batch in block:
                trained[method], metrics = program.run(
                    trained[method], constants, run.plan.place_batch(batch), run.key
                )
            losses[method] = float(metrics["loss/denoise"])  # waits for the device
            if done:
                spent[method] += time.monotonic() - start
        turn = time.monotonic() - turn
        done += size.block
    rest = max(done - size.block, 1)
    speed = {m: rest * size.images_batch / s if s else 0.0 for m, s in spent.items()}
    told = {"steps": done, "images_seen": done * size.images_batch, "seconds": spent}
    return trained, told | {"images_per_second": speed, "loss": losses}


def _judge(source: Any, samples: int) -> tuple[Callable[[Any], dict[str, float]], dict[str, Any]]:
    """(uint8 images -> {"fd", "floor"}, {"features", "samples", "floor"}): fd_lite0 of as many real
    as drawn images.
    """
    from ogdm_jax.metrics import Moments, feature_space, frechet_distance, protocol

    space = feature_space("lite0")
    ((half, other),) = protocol.of_source(space, source, samples, splits=1).halves
    floor = float(frechet_distance(*other, *half))

    def judge(images: Any) -> dict[str, float]:
        return {
            "fd": float(frechet_distance(*Moments().update(space(images)).finalize(), *half)),
            "floor": floor,
        }

    return judge, {"features": space.name, "samples": samples, "floor": floor}


def _sample(sampler: programs.Program, state: Any, count: int, batch: int) -> Any:
    """uint8 images of the moving average, from seeds 0, 1, 2, ..., the same for every method."""
    import numpy as np

    from ogdm_jax.pixels import to_uint8
    from ogdm_jax.sampling import generate

    parts = generate.generate(sampler.run, state.ema, state.buffers, np.arange(count), None, batch)
    return np.concatenate([to_uint8(part) for part in parts])


def _grid(rows: list[Any], path: Path) -> None:
    import numpy as np

    from ogdm_jax.data.pictures import save_png, sheet

    save_png(path, sheet(np.concatenate(rows), columns=SHOWN))
