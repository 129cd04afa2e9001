"""Does OGDM pay? Baseline, OGDM from scratch and OGDM fine-tuned, equal numbers of updates, several
seeds.

    python benchmarks/ogdm_pays.py --out runs/ogdm_pays

For every solver and number of network evaluations: the Frechet distance of --num samples to the
whole set, in the feature space of the configuration, mean and standard deviation over seeds.
"baseline" and "ogdm" train for --updates; "tuned" continues the baseline's moving average with OGDM
for --tune updates, "longer" continues it without. Run again, it goes on where it stopped; runs of
single seeds may go side by side in one folder.
"""

import argparse
from pathlib import Path

from ogdm_jax import startup

SOLVERS = ("euler", "heun", "spndm")
EVALUATIONS = (5, 8, 10, 15, 25)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="digits")
    parser.add_argument("--num", type=int, default=1000, help="images per distance")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--tune", type=int, default=300)
    parser.add_argument("--out", default="runs/ogdm_pays")
    args, rest = parser.parse_known_args()
    startup.prepare()
    import study

    from ogdm_jax.training.workdir import open_source

    out = Path(args.out)
    shared = startup.split_overrides(rest)
    plain = ("methods=",)
    measure = None
    for seed in map(int, args.seeds.split(",")):
        base = (
            f"seed={seed}",
            f"train.duration={args.updates} steps",
            f"optim.decay={args.updates} steps",
            *shared,
        )
        more = (
            f"train.duration={args.tune} steps",
            f"optim.decay={args.tune} steps",
            *study.TUNING,
        )
        more = (f"seed={seed}", *more, *shared, f"init.workdir={out / f'baseline-{seed}'}")
        variants = {
            "baseline": (*base, *plain),
            "ogdm": base,
            "longer": (*more, *plain),
            "tuned": more,
        }
        for name, flags in variants.items():
            model = study.trained(out / f"{name}-{seed}", args.config, *flags)
            measure = measure or study.Measure(
                model.config.evaluate.features, open_source(model.config), args.num
            )
            results = out / f"{name}-{seed}.jsonl"
            done = [(e["solver"], e["NFE"]) for e in study.read(results)]
            for solver in SOLVERS:
                for evaluations in EVALUATIONS:
                    steps = study.steps_of(solver, evaluations)
                    nfe = study.evaluations(solver, steps)
                    if (solver, nfe) not in done:
                        found = measure(model, solver, steps, seed)
                        study.record(
                            results, variant=name, seed=seed, solver=solver, NFE=nfe, **found
                        )
    entries = [
        e
        for name in variants
        for path in sorted(out.glob(f"{name}-*.jsonl"))
        for e in study.read(path)
    ]
    print(study.table(entries, ("solver", "NFE"), "variant", "fd"))


if __name__ == "__main__":
    main()
