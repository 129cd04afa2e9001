"""What each training method costs: its step over the baseline's step, in one process, taking turns.

    python benchmarks/method_cost.py [--rounds 9] [--config configs/digits.py]
        [--config.KEY=VALUE ...]

Prints one JSON line per variant: the median over rounds of (variant / baseline). SP's teacher is
the untrained network: the cost does not depend on weights; its weight is calibrated in the first
step, which is not timed.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from ogdm_jax import startup

VARIANTS = {
    "baseline": ("methods=",),
    "ogdm euler, shared denoiser output": ("methods=ogdm", "ogdm.share_denoise=true"),
    "ogdm euler, own network call": ("methods=ogdm", "ogdm.share_denoise=false"),
    "ogdm heun, shared denoiser output": (
        "methods=ogdm",
        "ogdm.solver=heun",
        "ogdm.share_denoise=true",
    ),
    "ogdm heun, own network calls": (
        "methods=ogdm",
        "ogdm.solver=heun",
        "ogdm.share_denoise=false",
    ),
    "stf, the whole set as references": ("methods=stf", "stf.source=full"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default=str(Path(__file__).parent.parent / "configs" / "digits.py")
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument(
        "--only", default="", help="variants whose name has this text (and the baseline)"
    )
    args, rest = parser.parse_known_args()
    startup.prepare()
    import jax

    from ogdm_jax import config as configs
    from ogdm_jax import data, parallel
    from ogdm_jax.methods import sp
    from ogdm_jax.training import run as runs
    from ogdm_jax.training.checkpoint import Checkpoints, describe
    from ogdm_jax.training.workdir import open_source

    teacher = tempfile.TemporaryDirectory()
    variants = dict(VARIANTS)
    for name, settings in sp.PRESETS.items():
        flags = (f"sp.{key}={value}" for key, value in settings.items())
        variants[f"sp {name}"] = (
            "methods=sp",
            f"sp.teacher={teacher.name}",
            *flags,
            "sp.calibration=1",
        )
    variants = {
        name: flags for name, flags in variants.items() if name == "baseline" or args.only in name
    }
    turns, compiled, times = {}, {}, {name: [] for name in variants}
    for name, flags in variants.items():
        config = configs.load(args.config, (*startup.split_overrides(rest), *flags))
        run = runs.build(config, open_source(config), parallel.make_plan("pmap", 1))
        holder = [run.init()]
        if name == "baseline":
            with Checkpoints(teacher.name) as checkpoints:
                about = describe(run.config, run.source.shape, run.source.num_classes)
                checkpoints.save(0, holder[0], about, {"step": 0})
        constants = run.constants()
        step = run.compile(holder[0])
        batch = run.plan.place_batch(next(data.batches(run.source, config.data.batch, 0)))

        def turn(n, holder=holder, step=step, constants=constants, batch=batch, key=run.key):
            began = time.perf_counter()
            for _ in range(n):
                holder[0], _ = step(holder[0], constants, batch, key)
            jax.block_until_ready(holder[0])
            return (time.perf_counter() - began) / n

        compiled[name] = turn(1)
        turn(2)
        turns[name] = turn
    for _ in range(args.rounds):
        for name, turn in turns.items():
            times[name].append(turn(args.steps))
    for name in variants:
        ratio = statistics.median(
            a / b for a, b in zip(times[name], times["baseline"], strict=True)
        )
        ms = 1000 * statistics.median(times[name])
        print(json.dumps({"variant": name, "over_baseline": round(ratio, 2), "ms": round(ms, 1),
                          "first_call_s": round(compiled[name], 1)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
