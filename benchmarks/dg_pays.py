"""Does DG pay? Distances before and after, for every prior and sampler, with several discriminators
each.

    ogdm study --config baseline=digits --config ogdm=digits --baseline.methods= --seeds 0
        --out runs/priors
    python benchmarks/dg_pays.py --prior baseline=runs/priors/baseline-seed0
        --prior ogdm=runs/priors/ogdm-seed0 --sampler heun:18 --out runs/dg_pays

A discriminator is trained on samples of that prior by that sampler; its checkpoint and its weight
are chosen by the distance of images of seeds 0 to n - 1 (see the group dg of the configuration).
What is reported comes from other seeds: per prior and sampler the distance without guidance, and
the mean and standard deviation with it over discriminators. --config.KEY=VALUE reaches the
discriminators' configuration. Run again, it goes on where it stopped.
"""

import argparse
import json
import statistics
from pathlib import Path

from ogdm_jax import records, startup

FIRST_SEED = 1_000_000  # of reported images: none of them was seen while training or choosing


def read(path: Path) -> list[dict]:
    """All lines, [] without the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def table(entries: list[dict], value: str) -> str:
    """Markdown: a row for each prior and sampler, unguided and guided."""
    lines = ["| prior | sampler | unguided | guided |", "|---|---|---|---|"]
    for prior, sampler in dict.fromkeys((e["prior"], e["sampler"]) for e in entries):
        mine = [e for e in entries if (e["prior"], e["sampler"]) == (prior, sampler)]
        cells = [
            cell([e[value] for e in mine if e["variant"] == variant])
            for variant in ("unguided", "guided")
        ]
        lines.append("| " + " | ".join([prior, sampler, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prior",
        action="append",
        required=True,
        help="NAME=DIR",
    )
    parser.add_argument(
        "--sampler", action="append", default=[], help="SOLVER:STEPS; default: euler:18 and heun:18"
    )
    parser.add_argument("--config", default="digits_dg")
    parser.add_argument("--seeds", default="0,1,2", help="of the discriminators")
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        help="sets of reported images, each as large as the data set",
    )
    parser.add_argument("--out", default="runs/dg_pays")
    args, rest = parser.parse_known_args()
    startup.prepare()
    import jax
    import numpy as np

    from ogdm_jax import config as configs
    from ogdm_jax.discriminator import generated
    from ogdm_jax.discriminator.guidance import Use, open_guidance
    from ogdm_jax.discriminator.settings import of
    from ogdm_jax.discriminator.train import TASK
    from ogdm_jax.metrics.features import distance_report
    from ogdm_jax.pixels import to_uint8
    from ogdm_jax.sampling import generate
    from ogdm_jax.training import evaluations, loop
    from ogdm_jax.training.evaluate import references, space_of
    from ogdm_jax.training.workdir import open_source, open_workdir

    out = Path(args.out)
    priors = dict(text.split("=", 1) for text in args.prior)
    results, shared = out / "results.jsonl", startup.split_overrides(rest)

    def measured(model, config, guidance) -> list[dict]:
        """One report per set of reported images."""
        source = open_source(model.config)
        sampler = generate.sampler(model.model, config.sample, jax.devices()[:1], guidance=guidance)
        found, num = [], config.evaluate.num or len(source)
        space = space_of(config if config.evaluate.features else model.config)
        for repeat in range(args.repeats):
            seeds = FIRST_SEED * (repeat + 1) + np.arange(num)
            labels = generate.labels_for(seeds, model.model.label_dim, None)
            parts = generate.generate(
                sampler, model.params, model.buffers, seeds, labels, 256, guidance
            )
            images = np.concatenate([to_uint8(part) for part in parts])
            found.append(distance_report(space, images, references(source)))
        return found

    for prior, folder in priors.items():
        model = open_workdir(folder)
        for sampler in args.sampler or ("euler:18", "heun:18"):
            solver, steps = sampler.split(":")
            seeds: list[int | None] = [None, *map(int, args.seeds.split(","))]
            done = [(e["prior"], e["sampler"], e["seed"]) for e in read(results)]
            for seed in seeds:
                if (prior, sampler, seed) in done:
                    continue
                flags = (f"dg.prior={folder}", f"sample.solver={solver}", f"sample.steps={steps}")
                flags += (
                    f"dg.samples={out / f'{prior}-{solver}{steps}.npz'}",
                    f"seed={seed or 0}",
                    *shared,
                )
                config = configs.load(args.config, flags)
                guidance, chosen = (
                    generated.base_guidance(config),
                    {"variant": "unguided", "weight": 0.0, "step": 0},
                )
                if seed is not None:
                    workdir = out / f"{prior}-{solver}{steps}-{seed}"
                    say = lambda line: print(line, flush=True)
                    loop.train(config, workdir, log=say, task=TASK)
                    best = min(evaluations.read(workdir).values(), key=lambda r: r["fd"])
                    chosen = {"variant": "guided", "weight": best["weight"], "step": best["step"]}
                    settings = of(config)
                    use = Use(model, config.sample, settings.sampler_churn(), settings.cfg)
                    guidance = (*guidance, open_guidance(workdir, best["step"], use=use))
                for found in measured(model, config, guidance):
                    keys = ("features", "n", "fd", "floor", "fd_all", "precision", "recall")
                    entry = {k: found[k] for k in keys}
                    about = {"prior": prior, "sampler": sampler, "seed": seed}
                    out.mkdir(parents=True, exist_ok=True)
                    with results.open("a") as file:
                        file.write(records.dumps(about | chosen | entry) + "\n")
    entries = read(results)
    for value in ("fd", "fd_all", "precision", "recall"):
        print(f"\n{value}\n\n" + table(entries, value))
    print(f"\nreal against real (fd): {cell([e['floor'] for e in entries])}, n = {entries[0]['n']}")
    weights = {
        (e["prior"], e["sampler"], e["seed"]): (e["weight"], e["step"])
        for e in entries
        if e["seed"] is not None
    }
    print(
        "chosen (weight, step): "
        + "; ".join(f"{p} {s} seed {k}: {w}" for (p, s, k), w in weights.items())
    )


if __name__ == "__main__":
    main()
