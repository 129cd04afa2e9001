"""Samples a trained model.

    ogdm sample --workdir runs/digits --num 64 --solver heun --steps 18 --out grid.png
    ogdm sample --workdir runs/digits --seeds 0-49999 --batch 256 --out samples.npz --evaluate
    ogdm sample --workdir runs/digits --guidance dg --dg.discriminator runs/digits_dg
    ogdm sample --workdir runs/mnist_edm --guidance dsg --dsg.rate 0.2 --task inpaint
        --input DIR --steps 50 --out restored.png

    ogdm sample --workdir stable-diffusion --prompt "a cat" --guidance cfg --cfg.weight 7.5

`python sample.py` is the same. Every image depends on its seed alone, whatever the batch size, the
number of devices or the other images. With --task the images of --input are measured and restored;
figures are printed as JSON.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ogdm_jax import models, parallel, records, startup
from ogdm_jax.cli import animation, guidance, options, prompts
from ogdm_jax.cli.parsing import parser_of, step, whole
from ogdm_jax.cli.stopping import leaving
from ogdm_jax.config import ConfigError, Sample, require, suggestion
from ogdm_jax.config.groups import GRID_OPTIONS, SOLVER_OPTIONS
from ogdm_jax.data import npz, output
from ogdm_jax.data.labels import class_words, one_form
from ogdm_jax.data.pictures import save_png, sheet
from ogdm_jax.inverse import files, tasks
from ogdm_jax.inverse.measured import Restoration
from ogdm_jax.sampling import churn as churning
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.churn import Churn
from ogdm_jax.training import evaluate
from ogdm_jax.training.workdir import Path, TrainedModel, open_source

_OF_SOLVERS = sum(SOLVER_OPTIONS.values(), ())
OPTIONS = [f for f in dataclasses.fields(Sample) if f.name in {*_OF_SOLVERS, *GRID_OPTIONS}]
_ELSEWHERE = ("num", "every", "variance", *_OF_SOLVERS)
SAMPLER = [field.name for field in dataclasses.fields(Sample) if field.name not in _ELSEWHERE]
# Settings that records of before do not name, and their values there.
LATER: dict[str, Any] = {
    "--variance": "auto",
    "--shift": 1.0,
    **{f"--{name}": getattr(Sample, name) for name in GRID_OPTIONS},
    "--cfg.channels": 0,
    "--cfg.rescale": 0.0,
    "--dg.rule": "score",
    **{f"--task.{name}": getattr(tasks.Settings, name) for name in ("weights", "layers", "size")},
}
MOST = 10_000_000  # images of one command: their seeds and classes are in memory


def parser() -> argparse.ArgumentParser:
    """The words of the command; those of guidance are made from the methods' Settings."""
    made = parser_of("sample", __doc__)
    add = made.add_argument
    add("--workdir", required=True, help="training folder")
    add("--step", type=step, default=None, help="checkpoint, or best (default: the newest)")
    add("--weights", default="ema", help="ema or params")
    add("--latents", action="store_true", help="keep its latents, undecoded; --out FILE.npz")
    add(
        "--num",
        type=whole(1),
        help="images, from the seeds 0 to num - 1 (default: 64, of texts one each)",
    )
    add("--seeds", default="", help="such as 0-49999 or 1,3,10-20; replaces --num")
    add("--solver", default="", help="euler, heun, ddim, ... (default: the configuration's)")
    add("--steps", type=int, default=None, help="sampler steps (default: the configuration's)")
    add(
        "--grid",
        default="",
        help="edm, vp, ve, iddpm; of flow models: flow; of discrete models: respaced, ddim, quad, "
        "trailing, leading, linspace, pndm (the released code of --solver spndm and fpndm)",
    )
    add(
        "--eta",
        type=float,
        default=None,
        help="randomness of ddim, heun and dpmpp_2m_sde: 0 none, 1 as DDPM (default of the last)",
    )
    for field in OPTIONS:
        kind, limits = type(field.default), field.metadata["choices"]
        text = field.metadata["help"] + (f": {' or '.join(limits)}" if limits else "")
        text += " (default: the configuration's)"
        add("--" + field.name.replace("_", "-"), type=kind, default=None, help=text)
    add(
        "--clip",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="clamp x0_hat to [-1, 1] at every step, as ADM's published samples were made",
    )
    add("--variance", default="", help="of --solver ancestral: small, large, diffusion or learned")
    add("--churn", default="", help="S_churn,S_min,S_max,S_noise of EDM's stochastic sampler")
    add("--label", default="", help="class of all images, number or name (default: by each seed)")
    add("--batch", type=whole(1), help="images per device at a time (default: 64, fewer if large)")
    add("--devices", type=whole(0), default=0, help="0 = all")
    add("--out", default="samples.png", help="DIR for PNG files, FILE.npz, or FILE.png for a grid")
    add("--overwrite", action="store_true", help="replace what this command drew with other words")
    add(
        "--evaluate",
        action="store_true",
        help="draw the data's classes and print the distance to it",
    )
    add("--animate", default="", metavar="FILE.webp", help="also show how the first 16 come about")
    prompts.add_options(made)
    guidance.add_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Samples by the words of a command line; None takes those of this process."""
    words = list(sys.argv[1:] if argv is None else argv)
    with startup.one_sentence():
        options.refuse_former(words)
        args = parser().parse_args(words)
        startup.prepare()
        run(args)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command asks for, understood and checked; nothing is compiled or written yet.

    Attributes:
      request: of guidance.
      out: where images go.
      trained: the model.
      settings: of its sampler.
      churn: of its sampler, where no method brings it.
      label: the class of all images, None where each seed draws its own.
      seeds: [n] of the images.
      guided: what guidance adds.
      devices: on which images are drawn.
      batch: images at a time, on all devices.
      texts: the conditions, where they are texts.
      animate: where an animation goes, None for none.
      shared: whose labels images have, where they are those of the data (--evaluate).
      measure: what --evaluate measures with, None without.
    """

    request: guidance.Request
    out: epath.Path
    trained: TrainedModel
    settings: Sample
    churn: Churn | None
    label: int | None
    seeds: np.ndarray
    guided: guidance.Guided
    devices: Sequence[Any]
    batch: int
    texts: prompts.Texts
    animate: epath.Path | None = None
    shared: dict[str, str] = dataclasses.field(default_factory=dict)
    measure: Callable[..., dict[str, Any]] | None = None


def run(args: argparse.Namespace) -> None:
    """Opens the model, draws what is not on disk yet, and prints what was done.

    Raises:
      ValueError: words that do not fit the model or each other, before anything is compiled.
      OutputError: images cannot be written, or some are not finite.
    """
    plan = read(args)
    task = plan.guided.restoration
    how = {"floats": task is not None or args.latents, "overwrite": args.overwrite}
    how["readable"] = task is None
    with output.Output(plan.out, origin(plan, args), plan.seeds, **how).opened() as out:
        with leaving(out.safe):
            counts: list[np.ndarray] = []
            start, count = time.perf_counter(), _draw(plan, out, counts)
            seconds = (time.perf_counter() - start) / max(1, count)
            figures = None
            if task is None:
                out.finish(lambda path: _write(path, out, plan))
            else:
                figures = _restored(plan, task, out, seconds)
            print(
                f"wrote {out.good.sum():,} images of step {plan.trained.step} "
                f"({evaluate.words_of(plan.settings, counts)}{_class_of(plan)}) to {plan.out}"
            )
            if plan.animate is not None:
                frames = animation.write(plan.animate, _path(plan))
                print(f"wrote {frames} frames to {plan.animate}")
            if figures is not None:
                print(records.dumps(figures))
            if plan.measure is not None:
                report = plan.measure(out.uint8())
                how = evaluate.describe_sampler(plan.settings, counts) if counts else {}
                print(records.dumps(report | how | plan.shared | _lost(out)))
    if len(out.not_finite):
        raise output.OutputError(out.missing())


def _path(plan: Plan) -> Path:
    """How the first images of a command come about."""
    first = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[: animation.MOST], tree)
    methods = [dataclasses.replace(g, rows=first(g.rows)) for g in plan.guided.guidance]
    how = {"labels": first(plan.guided.labels), "guidance": methods, "churn": plan.churn}
    return plan.trained.path(plan.seeds[: animation.MOST], plan.settings, **how)


def _check_latents(args: argparse.Namespace, trained: TrainedModel, task: str) -> None:
    """Raises ConfigError for --latents where it cannot be."""
    if not args.latents:
        return
    for option, given, expected in (
        ("--latents", trained.model.latents is None, "it with a model of latents"),
        ("--vae", args.vae, "one of --vae and --latents"),
        ("--task", task, "decoded images, without --latents"),
        ("--evaluate", args.evaluate, "decoded images, without --latents"),
        ("--animate", args.animate, "decoded images, without --latents"),
        ("--out", not args.out.endswith(".npz"), "FILE.npz with --latents"),
    ):
        if given:
            said = f"{args.out!r} given" if option == "--out" else "given"
            raise ConfigError(f"{option}: {said}; expected {expected}")


def _class_of(plan: Plan) -> str:
    """Which class all images have, if they have one, for people."""
    label = plan.label
    if label is None or label < 0:
        return "" if label is None else ", no class"
    (word,) = class_words(np.array([label]), plan.trained.class_names)
    return f", class {label}" + (f" ({word})" if word != str(label) else "")


def read(args: argparse.Namespace) -> Plan:
    """The plan of a command line.

    Raises:
      ValueError: words that do not fit the model or each other.
    """
    request = guidance.read(args)
    texts = prompts.Texts(prompts.read(args), args.negative)
    seeds = parse_seeds(args.seeds, args.num or len(texts.texts) or 64)
    churn = churning.parse(args.churn)
    out = output.check_output(args.out, len(seeds))
    devices = parallel.make_plan("mesh", args.devices).local_devices
    trained = prompts.open_model(args, texts.texts)
    _check_latents(args, trained, request.task)
    request = guidance.unclipped(request, trained.model)
    settings = _sampler(args, request.sampling, trained, len(seeds))
    if churn is not None and settings.solver not in ("heun", "euler"):
        raise ConfigError(f"--churn: works with --solver heun or euler, {settings.solver!r} given")
    label = parse_label(args.label, trained.model.label_dim, trained.class_names)
    guidance.check_effect(request, trained, settings, churn)
    for text in texts.cut(trained):
        print(f"--prompt: too long, its end is left out: {text!r}", file=sys.stderr)
    rows, shared, measure = texts.rows(trained, len(seeds)) if texts.texts else None, {}, None
    if args.evaluate:
        source, names = open_source(trained.config), trained.class_names
        measure = evaluate.ruler(trained.config, len(seeds), args.vae, source)
        if label is None and trained.model.label_dim and not request.task:
            rows = evaluate.conditions(source, trained.model, seeds, names)
            shared = evaluate.shared_conditions(source, trained.model, names)
    guided = guidance.build(request, trained, settings, seeds, label=label, churn=churn, texts=rows)
    if guided.restoration is not None:
        seeds = guided.restoration.seeds
    batch = generate.batch_size(trained.model, len(seeds), len(devices), args.batch, most=64)
    animate = animation.check(args.animate, trained, settings)
    plan = (request, out, trained, settings, churn, label, seeds, guided, devices, batch)
    return Plan(*plan, texts, animate, shared, measure)


def origin(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """Every choice that changes an image: {option: value}, and digests of weights and inputs."""
    trained, settings = plan.trained, plan.settings
    found: dict[str, Any] = {"--step": trained.step, "--weights": args.weights}
    if args.latents:
        found["--latents"] = True
    found["weights"] = models.fingerprint((trained.params, trained.buffers)).tobytes().hex()
    found |= {f"--{name}": value for name, value in vars(settings).items() if name in SAMPLER}
    found |= {f"--{name}": value for name, value in settings.options.items()}
    if plan.texts.texts:
        found |= {**plan.texts.origin, "--size": trained.model.picture_shape[0]}
    label = plan.shared.get("conditions", plan.label)
    found |= {"--churn": args.churn, "--label": label, "--variance": settings.variance}
    found["--guidance"] = ",".join(plan.request.settings)
    for name, chosen in plan.request.settings.items():
        found |= {f"--{name}.{field}": value for field, value in vars(chosen).items()}
    constants = generate.arrays(plan.guided.guidance)[0]
    found["guidance's weights"] = models.fingerprint(constants).tobytes().hex()
    task = plan.guided.restoration
    if task is not None:
        inputs = (task.images, task.y, task.drawn, plan.guided.labels)
        found |= {"--task": plan.request.task}
        found |= {f"--task.{field}": v for field, v in vars(plan.request.task_settings).items()}
        found["--input"] = models.fingerprint(inputs).tobytes().hex()
    return {name: value for name, value in found.items() if LATER.get(name, ...) != value}


def _draw(plan: Plan, out: output.Output, counts: list[np.ndarray]) -> int:
    """Draws and writes what is not on disk yet; returns how many images that were, and appends
    dopri5's evaluations to counts, unless they are those of a part.
    """
    before, done, count = int(out.done.sum()), out.done.copy(), 0
    starts = generate.pending(done, plan.batch)
    if before:
        print(f"{before:,} of {len(done):,} images are in {out.where} already", file=sys.stderr)
    if starts:
        how = "Ctrl-C stops, and the same command goes on"
        print(f"drawing into {out.folder}; {how}", file=sys.stderr)
    drawn = plan.trained.batches(
        plan.settings,
        plan.seeds,
        labels=plan.guided.labels,
        guidance=plan.guided.guidance,
        churn=plan.churn,
        batch=plan.batch // len(plan.devices),
        devices=plan.devices,
        done=done,
        counts=None if before else counts,
    )
    with tqdm(total=len(done), initial=before, unit="image", disable=None) as bar:
        for start, images in zip(starts, drawn, strict=True):
            out.add(start, images)
            count += len(images)
            bar.update(int(out.done.sum()) - bar.n)
    return count


def _write(path: epath.Path, out: output.Output, plan: Plan) -> None:
    """The output of samples: an npz or a sheet of what was drawn; a folder is complete already."""
    labels = None if plan.texts.texts else plan.guided.labels
    if path.suffix == ".npz":
        columns = out.columns()
        if labels is not None:
            columns["labels"] = npz.column(labels[out.good])
        npz.write(path, columns)
    elif path.suffix == ".png":
        classes = class_words(
            None if labels is None else labels[out.good], plan.trained.class_names
        )
        save_png(path, sheet(np.concatenate(list(out.images())), captions=classes))


def _restored(plan: Plan, task: Restoration, out: output.Output, seconds: float) -> dict[str, Any]:
    """Writes restored images beside their inputs; returns their figures."""
    images = np.concatenate(list(out.images()))
    task = task.take(np.flatnonzero(out.good))
    figures = task.judge(images)
    out.finish(lambda path: files.write(path, task, images, figures))
    names = {"task": plan.request.task, "guidance": ",".join(plan.request.settings), **task.about}
    how = {name: getattr(plan.settings, name) for name in ("solver", "steps", "grid")}
    means = {name: round(float(np.mean(values)), 4) for name, values in figures.items()}
    count = {"seconds_per_image": round(seconds, 4), "images": len(images)}
    return {**names, **how, **count, **means, **_lost(out)}


def _lost(out: output.Output) -> dict[str, int]:
    """How many images a report is not of, if there are such."""
    return {"not_finite": len(out.not_finite)} if len(out.not_finite) else {}


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
        clip=published.get("clip") if args.clip is None else args.clip,
        variance=args.variance,
        **{field.name: getattr(args, field.name) for field in OPTIONS},
    )


def parse_seeds(text: str, num: int) -> np.ndarray:
    """The seeds of 5, 0-49999 or 1,3,10-20 (both ends included); of "" those from 0 to num - 1.

    Raises:
      ConfigError: anything else, a seed twice, or more than MOST images.
    """
    if not text:
        require(1 <= num <= MOST, "--num", num, f"1 to {MOST:,} images (further ones by --seeds)")
        return np.arange(num)
    bounds, count = [], 0
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        last = last if dash else first
        numbers = first.isdecimal() and last.isdecimal() and max(len(first), len(last)) <= 10
        if not (numbers and int(first) <= int(last) < 2**32):
            raise ConfigError(
                f"--seeds: {text[:80]!r} given; expected numbers below 2^32 and FIRST-LAST such as "
                f"0-49999 or 1,3,10-20, not {part.strip()!r}"
            )
        bounds.append((int(first), int(last) + 1))
        count += int(last) + 1 - int(first)
    for (_, stop), (start, _) in zip(sorted(bounds), sorted(bounds)[1:]):
        if start < stop:
            raise ConfigError(f"--seeds: {text[:80]!r} holds {start} twice; expected each once")
    if count > MOST:
        raise ConfigError(
            f"--seeds: {text[:80]!r} given, {count:,} images; expected at most {MOST:,} (further "
            "ones by another command into the same folder)"
        )
    return np.concatenate([np.arange(start, stop) for start, stop in bounds])


def parse_label(text: str, num_classes: int, names: Sequence[str]) -> int | None:
    """The class that a word means: a number, or a name; None of "".

    Args:
      text: of --label. What is both, such as the name of another class, is the number.
      num_classes: of the model.
      names: of its classes, where the checkpoint knows them.

    Raises:
      ConfigError: no such class.
    """
    if not text:
        return None
    text, *names = one_form([text, *names])
    if text.removeprefix("-").isdecimal() and len(text) < 10:
        number = int(text)
        if -1 <= number < num_classes or text not in names:
            return number  # `labels_for` says whether it can be
    if not num_classes:
        raise ConfigError(
            f"--label: {text!r} given, but the model is unconditional; leave the option out"
        )
    if text in names:
        return names.index(text)
    if not names:
        raise ConfigError(
            f"--label: {text!r} given, but the checkpoint does not say what its classes are "
            f"called; expected a number from 0 to {num_classes - 1}"
        )
    known = ", ".join(names[:20]) + (f", ... ({len(names)} of them)" if len(names) > 20 else "")
    known += suggestion(text, names)
    raise ConfigError(f"--label: no class is called {text[:80]!r}; expected one of {known}")
