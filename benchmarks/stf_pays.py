"""Does STF train faster? Distance against images seen, DSM and STF, under the EDM and the VE noise
law, several seeds.

    python benchmarks/stf_pays.py --out runs/stf_pays

Both laws use EDM's preconditioning and sampler, so that only the noise levels trained on and the
target differ. STF takes the whole set as references: the target is then the exact posterior mean.
Same updates, seeds, noise draws and initial weights for both. Run again, it goes on where it
stopped.
"""

import argparse
from pathlib import Path

from ogdm_jax import startup

LAWS = ("edm", "ve")
TARGETS = {"DSM": ("methods=",), "STF": ("methods=stf", "stf.source=full")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=1000, help="images per distance")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--out", default="runs/stf_pays")
    args, rest = parser.parse_known_args()
    startup.prepare()
    import study

    from ogdm_jax.training.workdir import open_source, open_workdir

    out, measure = Path(args.out), None
    shared = (
        *startup.split_overrides(rest),
        f"train.duration={args.updates} steps",
        "optim.decay=0 steps",
    )
    shared += (f"train.save_every={args.every} steps", "train.keep=100", "ema.halflife=2 kimg")
    for seed in map(int, args.seeds.split(",")):
        for law in LAWS:
            for target, flags in TARGETS.items():
                folder = out / f"{law}-{target}-{seed}"
                study.trained(
                    folder, "digits", f"seed={seed}", f"noise.distribution={law}", *flags, *shared
                )
                done = [e["updates"] for e in study.read(folder.with_suffix(".jsonl"))]
                for updates in range(args.every, args.updates + 1, args.every):
                    if updates in done:
                        continue
                    model = open_workdir(folder, updates)
                    measure = measure or study.Measure(
                        "digits", open_source(model.config), args.num
                    )
                    found = measure(model, "heun", 10, seed)
                    entry = {"law": law, "target": target, "updates": updates, "seed": seed} | found
                    study.record(folder.with_suffix(".jsonl"), **entry)
    entries = [e for path in sorted(out.glob("*.jsonl")) for e in study.read(path)]
    print(study.table(entries, ("law", "updates"), "target", "fd"))


if __name__ == "__main__":
    main()
