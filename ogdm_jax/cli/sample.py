"""Samples a trained model: python sample.py --workdir DIR --num 64 --solver heun --steps 18 --out
DIR|FILE.npz|FILE.png

Every image depends on its seed alone, whatever the batch size, the number of devices or the other
images. With --guidance dsg --task inpaint --input DIR it measures the images of DIR and restores
them; figures are printed as JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from ogdm_jax import startup
from ogdm_jax.cli import guided


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ogdm sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="training folder")
    step = lambda text: text if text == "best" else int(text)
    parser.add_argument(
        "--step", type=step, default=None, help="checkpoint, or best (default: the newest)"
    )
    parser.add_argument("--weights", default="ema", help="ema or params")
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument(
        "--seeds",
        default="",
        help="FIRST-LAST, both included; replaces --num (default: 0 to num - 1)",
    )
    parser.add_argument(
        "--solver", default="", help="euler, heun, ddim, ... (default: the configuration's)"
    )
    parser.add_argument(
        "--steps", type=int, default=None, help="sampler steps (default: the configuration's)"
    )
    parser.add_argument(
        "--grid", default="", help="edm, vp, ve, iddpm; of discrete models: respaced, ddim, quad"
    )
    parser.add_argument(
        "--eta", type=float, default=None, help="randomness of ddim and heun: 0 none, 1 as DDPM"
    )
    parser.add_argument(
        "--churn", default="", help="S_churn,S_min,S_max,S_noise of EDM's stochastic Heun sampler"
    )
    parser.add_argument(
        "--label",
        type=int,
        default=None,
        help="class of all images (default: drawn from each seed)",
    )
    parser.add_argument("--batch", type=int, default=64, help="images per device at a time")
    parser.add_argument("--devices", type=int, default=0, help="0 = all")
    parser.add_argument(
        "--out", default="samples.png", help="DIR for PNG files, FILE.npz, or FILE.png for a grid"
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="print the distance to the training data as JSON"
    )
    guided.add_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with startup.one_sentence():
        startup.prepare()
        import numpy as np
        from tqdm import tqdm

        from ogdm_jax import parallel
        from ogdm_jax.data import output as files
        from ogdm_jax.pixels import to_uint8
        from ogdm_jax.sampling import generate
        from ogdm_jax.training.evaluate import distance
        from ogdm_jax.training.workdir import open_workdir

        args = guided.prepare(args)
        seeds = generate.parse_seeds(args.seeds, args.num)
        out = files.check_output(args.out)
        run = open_workdir(args.workdir, args.step, args.weights)
        chosen = {
            "solver": args.solver,
            "steps": args.steps,
            "eta": args.eta,
            "grid": guided.grid_of(args, run),
        }
        settings = run.settings(num=len(seeds), **chosen)
        churn = generate.parse_churn(args.churn, settings.solver)
        extra = guided.build(args, run, settings, seeds)
        seeds = seeds if extra.restoration is None else extra.restoration.seeds
        devices = parallel.make_plan("mesh", args.devices).local_devices
        images = generate.sampler(
            run.model, settings, devices, churn=churn, guidance=extra.guidance
        )
        batch = min(args.batch, -(-len(seeds) // len(devices))) * len(devices)
        weights = (run.params, run.buffers)
        bar = tqdm(total=len(seeds), unit="image", disable=not sys.stderr.isatty())
        done, start = [], time.perf_counter()
        for part in generate.generate(images, *weights, seeds, extra.labels, batch, extra.guidance):
            done.append(part)
            bar.update(len(part))
        bar.close()
        floats = np.concatenate(done)
        pictures = to_uint8(floats)
        how = {"solver": settings.solver, "steps": settings.steps, "grid": settings.grid}
        if extra.restoration is None:
            files.write(out, pictures, seeds, extra.labels)
        else:
            extra.restoration.write(out, floats)
        print(
            f"wrote {len(pictures)} images of step {run.step} ({settings.solver}, {settings.steps} "
            f"steps) to {out}"
        )
        if extra.restoration is not None:
            seconds = round((time.perf_counter() - start) / len(seeds), 4)
            print(
                json.dumps(
                    guided.figures(
                        extra, floats, guidance=args.guidance, **how, seconds_per_image=seconds
                    )
                )
            )
        if args.evaluate:
            print(json.dumps(distance(run.config, pictures)))
