"""Does the self-perceptual loss help unconditional pixels? The MSE model, trained equally
longer, and SP's two presets.

    python benchmarks/ogdm_pays.py --out runs/ogdm_pays      # trains the MSE models
    python benchmarks/sp_pays.py --base runs/ogdm_pays --out runs/sp_pays

Frechet distance, precision and recall of unconditional samples, 3 seeds. The teacher is the MSE
model's moving average; all continuations take the same number of updates, from the same weights.
Run again, it goes on where it stopped.
"""

import argparse
from pathlib import Path

from ogdm_jax import startup

SAMPLERS = (("euler", 10), ("heun", 18))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=1000, help="images per distance")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument(
        "--rate", type=float, default=2e-4, help="learning rate of all continuations, falling to 0"
    )
    parser.add_argument("--base", default="runs/ogdm_pays")
    parser.add_argument("--out", default="runs/sp_pays")
    args, rest = parser.parse_known_args()
    startup.prepare()
    import study

    from ogdm_jax.methods import sp
    from ogdm_jax.training.workdir import open_source, open_workdir

    out, measure = Path(args.out), None
    presets = {
        name: tuple(f"sp.{k}={v}" for k, v in settings.items())
        for name, settings in sp.PRESETS.items()
    }
    for seed in map(int, args.seeds.split(",")):
        base = Path(args.base) / f"baseline-{seed}"
        more = (
            f"seed={seed}",
            f"train.duration={args.updates} steps",
            f"optim.decay={args.updates} steps",
        )
        more += (*study.TUNING, f"init.workdir={base}", f"optim.learning_rate={args.rate}")
        more += tuple(startup.split_overrides(rest))
        variants = {"MSE": None, "MSE longer": (*more, "methods=")}
        variants |= {f"SP {name}": (*more, "methods=sp", *flags) for name, flags in presets.items()}
        for name, flags in variants.items():
            folder = out / f"{name.replace(' ', '_')}-{seed}"
            model = study.trained(folder, "digits", *flags) if flags else open_workdir(base)
            measure = measure or study.Measure("digits", open_source(model.config), args.num)
            done = [e["sampler"] for e in study.read(folder.with_suffix(".jsonl"))]
            for solver, steps in SAMPLERS:
                sampler = f"{solver} {study.evaluations(solver, steps)} NFE"
                if sampler not in done:
                    found = measure(model, solver, steps, seed)
                    study.record(
                        folder.with_suffix(".jsonl"),
                        variant=name,
                        sampler=sampler,
                        seed=seed,
                        **found,
                    )
    order = ("MSE", "MSE longer", *(f"SP {name}" for name in presets))
    entries = [
        e
        for n in order
        for path in sorted(out.glob(f"{n.replace(' ', '_')}-[0-9].jsonl"))
        for e in study.read(path)
    ]
    for value in ("fd", "precision", "recall"):
        print(f"\n{value}\n\n" + study.table(entries, ("sampler",), "variant", value, 3))


if __name__ == "__main__":
    main()
