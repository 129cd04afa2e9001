"""The train step: DDPM++ on CIFAR-10's recipe (dropout and augmentation on), every method over
it, ADM at 64 pixels.

One call is forward, backward, Adam, moving average and every method's own networks, on a batch that
lies on the device.
"""

from collections.abc import Callable
from typing import Any

from accelerator_parts import ROOT, Case, Options, clock, programs, sizes

# name: (configuration, variant of benchmarks/method_cost.py, type of the network)
STEPS = {
    "plain-bfloat16": ("cifar10_edm", "baseline", "bfloat16"),
    "plain-float32": ("cifar10_edm", "baseline", "float32"),
    "ogdm-euler": ("cifar10_edm", "ogdm euler, shared denoiser output", "bfloat16"),
    "ogdm-heun": ("cifar10_edm", "ogdm heun, shared denoiser output", "bfloat16"),
    "stf-full": ("cifar10_edm", "stf, the whole set as references", "bfloat16"),
    "sp": ("cifar10_edm", "sp", "bfloat16"),
    "adm64-bfloat16": ("imagenet64_edm", "baseline", "bfloat16"),
}
TORCH = (
    "torch-product",
    "torch-eager-float32",
    "torch-compile-autocast",
    "torch-channels_last-autocast",
    "torch-channels_last-float32",
    "torch-compile-bfloat16",
    "torch-compile-float32",
    "torch-adm64-autocast",
)


def cases(options: Options) -> list[Case]:
    ours = [Case("train", name, "train", programs=(name,), seconds=8.0) for name in STEPS]
    theirs = [pytorch("train", name, "torch_train", i) for i, name in enumerate(TORCH)]
    return [Case("train", "product", "train"), *ours, *theirs]


def pytorch(part: str, name: str, module: str, rank: int) -> Case:
    """A case of EDM's code; torch.compile is not begun with less than 45 seconds left."""
    seconds = 45.0 if "compile" in name else 12.0
    return Case(part, name, module, side="torch", needs="edm", seconds=seconds, rank=rank)


def prepare(
    name: str, options: Options, report: Callable[[dict], None], rounds: int = 1
) -> dict[str, Any]:
    """Compiles the step of a name, with as few accumulation rounds (at least `rounds`) as the
    memory allows.
    """
    programs.start()
    from ogdm_jax.models import parameter_count

    while True:
        run = build(name, options, rounds)
        state, *rest = run.shapes()
        about = {
            "batch": run.config.data.batch,
            "accumulate": rounds,
            "parameters": parameter_count(state.params),
        }
        found = programs.save(name, options, run.compile(state), (state, *rest), **about)
        if programs.fits(found, options) or rounds >= 8:
            return found
        rounds *= 2


def build(name: str, options: Options, rounds: int) -> Any:
    """The run behind a name, on one device; of data and of a teacher's weights there are shapes
    alone.
    """
    import method_cost

    from ogdm_jax import config as configs
    from ogdm_jax import parallel
    from ogdm_jax.planning import program

    size, (config, variant, dtype) = sizes.of(options.rehearse), STEPS[name]
    adm = config == "imagenet64_edm"
    flags = [
        *(size.adm_flags if adm else size.flags),
        f"network.dtype={dtype}",
        f"optim.accumulate={rounds}",
    ]
    flags += [f"data.batch={size.adm_batch if adm else size.batch}"]
    flags += (
        ["methods=sp", "sp.calibration=1"] if variant == "sp" else method_cost.VARIANTS[variant]
    )
    flags += () if variant == "baseline" else size.method_flags
    loaded = configs.load(ROOT / "configs" / f"{config}.py", flags)
    shape = ",".join(map(str, size.adm_shape if adm else size.shape))
    source = program.source_like(loaded, shape, size.classes if adm else 0, size.references)
    return program.build(loaded, source, parallel.make_plan("mesh", 1))


def random_images(shape: tuple[int, int, int], count: int, classes: int = 0) -> Any:
    """A source of noise pictures."""
    import numpy as np

    from ogdm_jax.data import from_arrays

    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % classes if classes else None
    return from_arrays("random", rng.integers(0, 256, (count, *shape), np.uint8), labels)


def run(name: str, options: Options, report: Callable[[dict], None]) -> dict[str, Any]:
    if name == "product":
        return product(options)
    rounds = 1
    while True:
        try:
            return measure(name, options)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rounds >= 8:
                raise
        rounds *= 2  # the compiler's estimate was too low
        prepare(name, options, report, rounds)


def measure(name: str, options: Options) -> dict[str, Any]:
    jax = programs.start()
    import numpy as np

    program = programs.load(name, options, prepare)
    state, *rest = program.arguments()
    holder, metrics = [state], {}

    def work() -> None:
        holder[0], found = program.run(holder[0], *rest)
        metrics.update(found)

    del state
    found = clock.timed(
        work, lambda: jax.block_until_ready(holder[0]), sizes.of(options.rehearse).timing
    )
    seconds, about = found["ms"] / 1000, program.about
    stats = jax.devices()[0].memory_stats() or {}
    finite = bool(np.isfinite(float(metrics["loss"])))
    return found | about | {
        "images_per_second": about["batch"] / seconds,
        "tflop_per_second": about["tflop"] / seconds,
        "process_peak_bytes": stats.get("peak_bytes_in_use", 0),  # of all cases so far
        "finite": finite,
    }  # fmt: skip


def product(options: Options) -> dict[str, Any]:
    """TFLOP/s of one large matrix product in both types: the ceiling that the steps are held
    against.
    """
    jax = programs.start()
    import jax.numpy as jnp

    size = sizes.of(options.rehearse)
    n, found = size.product, {"size": size.product}
    multiply = jax.jit(jnp.matmul)
    for dtype in ("bfloat16", "float32"):
        a, b = (jax.random.normal(jax.random.key(i), (n, n)).astype(dtype) for i in range(2))
        last = []

        def work(a=a, b=b, last=last) -> None:
            last[:] = [multiply(a, b)]

        seconds = (
            clock.timed(work, lambda last=last: jax.block_until_ready(last), size.timing / 2)["ms"]
            / 1000
        )
        found[f"{dtype}_tflop_per_second"] = 2 * n**3 / seconds / 1e12
    return found
