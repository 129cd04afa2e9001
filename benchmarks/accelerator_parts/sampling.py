"""Sampling: Heun's 18 steps beside PyTorch's loop, and guided sampling (DPS, DSG) over the unguided
sampler.
"""

from collections.abc import Callable
from typing import Any

from accelerator_parts import ROOT, Case, Options, clock, programs, sizes, train

# name: (solver, type of the network, guidance)
SAMPLERS = {
    "heun-bfloat16": ("heun", "bfloat16", ""),
    "heun-float32": ("heun", "float32", ""),
    "ddim-unguided": ("ddim", "bfloat16", "none"),
    "ddim-dsg": ("ddim", "bfloat16", "dsg"),
    "ddim-dps": ("ddim", "bfloat16", "dps"),
}
TORCH = ("torch-heun-float32", "torch-heun-autocast", "torch-heun-compile-autocast")


def cases(options: Options) -> list[Case]:
    ours = [Case("sampling", name, "sampling", programs=(name,), seconds=8.0) for name in SAMPLERS]
    theirs = [train.pytorch("sampling", name, "torch_sampling", i) for i, name in enumerate(TORCH)]
    return [*ours, *theirs]


def prepare(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    """Compiles a sampler; its measurements and noise are real, its weights are not."""
    jax = programs.start()
    import numpy as np

    from ogdm_jax import config as configs
    from ogdm_jax import models
    from ogdm_jax.sampling import generate
    from ogdm_jax.sampling.sampler import nfe

    size, (solver, dtype, guided) = sizes.of(options.rehearse), SAMPLERS[name]
    steps = size.guided_steps if guided else size.sample_steps
    eta = 1.0 if guided else 0.0
    flags = (
        *size.flags,
        f"network.dtype={dtype}",
        f"sample.solver={solver}",
        f"sample.steps={steps}",
    )
    config = configs.load(ROOT / "configs" / "cifar10_edm.py", (*flags, f"sample.eta={eta}"))
    model = models.build(config, size.shape, 0)
    batch = size.guided_batch if guided else size.sample_batch
    guidance = _guidance(guided, size.shape, batch)
    images = generate.sampler(model, config.sample, jax.devices()[:1], guidance=guidance)
    weights = jax.eval_shape(model.init, jax.random.key(0))
    arguments = (*weights, np.arange(batch, dtype=np.uint32), None, *generate.arrays(guidance))
    return programs.save(name, options, images, arguments, batch=batch, nfe=nfe(solver, steps))


def _guidance(name: str, shape: tuple[int, int, int], batch: int) -> tuple[Any, ...]:
    """dsg_vs_dps.py's guidance for random inpainting."""
    if not name:
        return ()
    import dsg_vs_dps
    import numpy as np

    from ogdm_jax.inverse import tasks
    from ogdm_jax.inverse.measured import measure
    from ogdm_jax.pixels import to_float

    settings = tasks.Settings()
    clean = to_float(np.random.default_rng(0).integers(0, 256, (batch, *shape), np.uint8))
    task = tasks.make_task("inpaint", settings, shape)
    measured = measure(task, settings, clean, np.arange(batch))
    return dsg_vs_dps.guidance(name, measured, 0.2)


def run(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    jax = programs.start()
    import numpy as np

    program = programs.load(name, options, prepare)
    arguments, last = program.arguments(), []

    def work() -> None:
        last[:] = [program.run(*arguments)]

    found = clock.timed(
        work, lambda: jax.block_until_ready(last), sizes.of(options.rehearse).timing
    )
    about, seconds = program.about, found["ms"] / 1000
    finite = bool(np.isfinite(np.asarray(last[0])).all())
    return found | about | {"images_per_second": about["batch"] / seconds, "finite": finite}
