"""Does OGDM pay? Baseline, OGDM from scratch and OGDM fine-tuned, equal numbers of updates, several seeds.

    python benchmarks/ogdm_pays.py --out runs/ogdm_pays.json

For every solver and number of network evaluations: the Frechet distance of as many samples as the data set has images,
in the feature space of the configuration, mean and standard deviation over seeds. "baseline" and "ogdm" train for
--updates; "tuned" continues the baseline's moving average with OGDM for --tune updates, "longer" continues it without.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from ogdm_jax import startup

SOLVERS = ("euler", "heun", "spndm")
EVALUATIONS = (5, 8, 10, 15, 25)


def steps_of(solver: str, evaluations: int) -> int:
    """Sampler steps that cost at most so many network evaluations (Heun: an odd number, 2N - 1)."""
    return {"euler": evaluations, "heun": (evaluations + 1) // 2, "spndm": evaluations - 1}[solver]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent.parent / "configs" / "digits.py"))
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; runs of single seeds may go side by side")
    parser.add_argument(
        "--merge", default="", help="comma-separated JSON files of earlier runs: only prints their table"
    )
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--tune", type=int, default=400)
    parser.add_argument("--out", default="runs/ogdm_pays.json")
    args, rest = parser.parse_known_args()
    if args.merge:
        found = [json.loads(Path(name).read_text()) for name in args.merge.split(",")]
        return print(table({key: sum((f[key] for f in found), []) for key in found[0]}))
    startup.prepare()
    import numpy as np

    from ogdm_jax import config as configs
    from ogdm_jax import data, generate, parallel
    from ogdm_jax.evaluation import report
    from ogdm_jax.evaluation.features import distance_report, feature_space
    from ogdm_jax.training import finish
    from ogdm_jax.training import run as runs
    from ogdm_jax.training import state as states

    overrides = startup.split_overrides(rest)

    def build(seed: int, updates: int, *more: str) -> runs.Run:
        flags = [f"seed={seed}", f"train.duration={updates} steps", *overrides, *more]
        config = configs.load(args.config, flags)
        return runs.build(config, finish.open_source(config), parallel.make_plan("pmap"))

    def train(run: runs.Run, weights=None):
        state = run.init()
        if weights is not None:
            state = state.replace(params=states.copy(weights), ema=states.copy(weights))
        step, frozen = run.compile(state), run.frozen()
        batches = data.batches(run.source, run.config.data.batch, run.config.seed)
        for _ in range(run.steps):
            state, _ = step(state, frozen, run.plan.place_batch(next(batches)), run.key)
        return run.plan.local_copy(state.ema), run.plan.local_copy(state.buffers)

    results: dict[str, list[float]] = {}
    samplers = {}
    plain, tuning = ("methods=",), ("optim.decay=0 steps", "optim.ramp=0 steps", "ema.rampup=0.0")
    features = None
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in map(int, args.seeds.split(",")):
        base = build(seed, args.updates, *plain)
        weights = train(base)
        variants = {
            "baseline": weights,
            "ogdm": train(build(seed, args.updates)),
            "longer": train(build(seed, args.tune, *plain, *tuning), weights[0]),
            "tuned": train(build(seed, args.tune, *tuning), weights[0]),
        }
        features = features or feature_space(base.config.evaluate.features)
        for name, (params, buffers) in variants.items():
            for solver in SOLVERS:
                for evaluations in EVALUATIONS:
                    settings = base.config.sample.copy_and_resolve_references()
                    settings.solver, settings.steps = solver, steps_of(solver, evaluations)
                    if (solver, evaluations) not in samplers:
                        samplers[solver, evaluations] = generate.sampler(
                            base.model, settings, base.plan.local_devices[:1]
                        )
                    seeds = np.arange(len(base.source)) + 100_000 * seed
                    pictures = [
                        report.to_uint8(part)
                        for part in generate.generate(samplers[solver, evaluations], params, buffers, seeds, None, 256)
                    ]
                    found = distance_report(features, np.concatenate(pictures), base.source.images)
                    results.setdefault(f"{name}/{solver}/{evaluations}", []).append(found["fd"])
                    results.setdefault("floor", []).append(found["floor"])
            out.write_text(json.dumps(results, indent=1))
        print(f"seed {seed} done at {time.process_time():.0f} s of processor time", flush=True)
    print(table(results))


def table(results: dict[str, list[float]]) -> str:
    """The figures as Markdown: one row per solver and number of evaluations."""
    names = ("baseline", "ogdm", "longer", "tuned")
    lines = ["| solver | NFE | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for solver in SOLVERS:
        for evaluations in EVALUATIONS:
            cells = []
            for name in names:
                values = results[f"{name}/{solver}/{evaluations}"]
                spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
            steps = steps_of(solver, evaluations)
            real = {"euler": steps, "heun": 2 * steps - 1, "spndm": steps + 1}[solver]
            lines.append(f"| {solver} | {real} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nreal against real: {statistics.mean(results['floor']):.3f}"


if __name__ == "__main__":
    main()
