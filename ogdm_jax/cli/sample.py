"""Samples a trained model.

    ogdm sample --workdir runs/digits --num 64 --solver heun --steps 18 --out grid.png
    ogdm sample --workdir runs/digits --seeds 0-49999 --batch 256 --out samples.npz --evaluate
    ogdm sample --workdir runs/digits --guidance dg --dg.discriminator runs/digits_dg
    ogdm sample --workdir runs/mnist_edm --guidance dsg --dsg.rate 0.2 --task inpaint
        --input DIR --steps 50 --out restored.png

`python sample.py` is the same. Every image depends on its seed alone, whatever the batch size, the
number of devices or the other images. With --task the images of --input are measured and restored;
figures are printed as JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ogdm_jax import parallel, startup
from ogdm_jax.cli import guidance
from ogdm_jax.cli.parsing import parser_of, step, whole
from ogdm_jax.config import ConfigError, Sample
from ogdm_jax.data import output
from ogdm_jax.inverse import files
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling import churn as churning
from ogdm_jax.training.evaluate import distance
from ogdm_jax.training.workdir import TrainedModel, open_workdir


def parser() -> argparse.ArgumentParser:
    """The words of the command; those of guidance are made from the methods' Settings."""
    made = parser_of("sample", __doc__)
    add = made.add_argument
    add("--workdir", required=True, help="training folder")
    add("--step", type=step, default=None, help="checkpoint, or best (default: the newest)")
    add("--weights", default="ema", help="ema or params")
    add("--num", type=whole(1), help="images, from the seeds 0 to num - 1 (default: 64)")
    add("--seeds", default="", help="FIRST-LAST, both included; replaces --num")
    add("--solver", default="", help="euler, heun, ddim, ... (default: the configuration's)")
    add(
        "--steps",
        type=int,
        default=None,
        help="sampler steps (default: the configuration's)",
    )
    add(
        "--grid",
        default="",
        help="edm, vp, ve, iddpm; of discrete models: respaced, ddim, quad, trailing, pndm (the "
        "released code of --solver spndm and fpndm)",
    )
    add(
        "--eta",
        type=float,
        default=None,
        help="randomness of ddim and heun: 0 none, 1 as DDPM",
    )
    add(
        "--clip",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="clamp x0_hat to [-1, 1] at every step, as ADM's published samples were made",
    )
    add("--churn", default="", help="S_churn,S_min,S_max,S_noise of EDM's stochastic sampler")
    add("--label", type=int, default=None, help="class of all images (default: from each seed)")
    add("--batch", type=whole(1), default=64, help="images per device at a time")
    add("--devices", type=whole(0), default=0, help="0 = all")
    add("--out", default="samples.png", help="DIR for PNG files, FILE.npz, or FILE.png for a grid")
    add("--evaluate", action="store_true", help="print the distance to the training data as JSON")
    guidance.add_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Samples by the words of a command line; None takes those of this process."""
    words = list(sys.argv[1:] if argv is None else argv)
    with startup.one_sentence():
        guidance.refuse_former(words)
        args = parser().parse_args(words)
        startup.prepare()
        run(args)


def run(args: argparse.Namespace) -> None:
    """Opens the model, samples, writes, and prints what was done.

    Raises:
      ValueError: words that do not fit the model or each other, before anything is compiled.
    """
    request = guidance.read(args)
    seeds = parse_seeds(args.seeds, 64 if args.num is None else args.num)
    out = output.check_output(args.out)
    trained = open_workdir(args.workdir, args.step, args.weights)
    settings = _sampler(args, request.sampling, trained, len(seeds))
    churn = churning.parse(args.churn)
    if churn is not None and settings.solver not in ("heun", "euler"):
        raise ConfigError(f"--churn: works with --solver heun or euler, {settings.solver!r} given")
    guided = guidance.build(request, trained, settings, seeds, label=args.label, churn=churn)
    if guided.restoration is not None:
        seeds = guided.restoration.seeds
    start, done = time.perf_counter(), []
    batches = trained.batches(
        settings,
        seeds,
        labels=guided.labels,
        guidance=guided.guidance,
        churn=churn,
        batch=args.batch,
        devices=parallel.make_plan("mesh", args.devices).local_devices,
    )
    with tqdm(total=len(seeds), unit="image", disable=not sys.stderr.isatty()) as bar:
        for part in batches:
            done.append(part)
            bar.update(len(part))
    images = np.concatenate(done)
    pictures = to_uint8(images)
    if guided.restoration is None:
        output.write(out, pictures, seeds, guided.labels)
    else:
        files.write(out, guided.restoration, images)
    print(
        f"wrote {len(images)} images of step {trained.step} ({settings.solver}, {settings.steps} "
        f"steps) to {out}"
    )
    if guided.restoration is not None:
        seconds = round((time.perf_counter() - start) / len(seeds), 4)
        names = {"task": request.task, "guidance": ",".join(request.settings)}
        names |= guided.restoration.about
        how = {name: getattr(settings, name) for name in ("solver", "steps", "grid")}
        means = {
            name: round(float(np.mean(values)), 4)
            for name, values in guided.restoration.judge(images).items()
        }
        figures = {**how, "seconds_per_image": seconds, "images": len(images), **means}
        print(json.dumps(names | figures))
    if args.evaluate:
        print(json.dumps(distance(trained.config, pictures)))


def _sampler(
    args: argparse.Namespace, published: dict[str, Any], trained: TrainedModel, num: int
) -> Sample:
    """Settings of the sampler: those of the words, else of the presets, else of the configuration.

    A preset's grid holds only for a discrete model.
    """
    grid = published.get("grid", "") if trained.model.table is not None else ""
    return trained.settings(
        num=num,
        solver=args.solver or published.get("solver", ""),
        steps=published.get("steps") if args.steps is None else args.steps,
        eta=published.get("eta") if args.eta is None else args.eta,
        grid=args.grid or grid,
        clip=args.clip,
    )


def parse_seeds(text: str, num: int) -> np.ndarray:
    """The seeds of FIRST-LAST such as 10-13, both included; of "" those from 0 to num - 1.

    Raises:
      ConfigError: anything else.
    """
    if not text:
        if num < 1:
            raise ConfigError(f"--num: {num} given; expected at least 1 image")
        return np.arange(num)
    first, dash, last = text.partition("-")
    if not (dash and first.isdigit() and last.isdigit() and int(first) <= int(last) < 2**32):
        raise ConfigError(f"--seeds: {text!r} given; expected FIRST-LAST such as 0-49999")
    return np.arange(int(first), int(last) + 1)
