"""Trains every configuration with every seed (in DIR/NAME-seedK), measures samples of each, and
compares: mean and standard deviation over seeds, and of each configuration's difference to the
first, seed by seed, the mean with its 95 % interval, Student's paired t-test and the exact
permutation test. The same command goes on where it stopped: runs that are finished are not trained
again, nor measured twice. Writes DIR/study.json and the table, DIR/study.md.

    ogdm study --config baseline=digits --config ogdm=digits --baseline.methods= --seeds 0-4
        --steps 5,9,18 --out runs/study
    ogdm study --config a=configs/A.py --config b=configs/B.py --seeds 0,1,2
        --config.data.batch=64 --out DIR --dry-run

--config.KEY=VALUE changes all configurations, --NAME.KEY=VALUE that one; {seed} in a value is the
seed, as in --tuned.init.workdir=DIR/baseline-seed{seed}.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from ogdm_jax import cluster, models, places, startup
from ogdm_jax import config as configs
from ogdm_jax.cli import measuring
from ogdm_jax.cli.parsing import listed, numbers, parser_of, whole
from ogdm_jax.cli.sample import parse_seeds
from ogdm_jax.cli.stopping import leaving
from ogdm_jax.cli.train import read_settings
from ogdm_jax.config import ConfigError, require
from ogdm_jax.sampling import adaptive
from ogdm_jax.study import figures, runs
from ogdm_jax.training import decoding, lock
from ogdm_jax.training.evaluate import compared, references
from ogdm_jax.training.workdir import open_pixels, open_source


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what they leave over: --config.KEY=VALUE and --NAME.KEY=VALUE."""
    parser = parser_of("study", __doc__)
    add = parser.add_argument
    form = "a configuration under a name; the first is what others are compared with"
    add("--config", action="append", required=True, metavar="NAME=FILE", help=form)
    add("--seeds", required=True, help="of the training: such as 0-4 or 0,1,7")
    add("--out", required=True, metavar="DIR", help="where all of it goes")
    add("--solvers", default="", help="such as euler,heun (default: the first configuration's)")
    add("--steps", default="", help="sampler steps, such as 5,9,18 (default: likewise)")
    averages = f"averages: {runs.PLAIN} (default, training's), or widths 0.05,0.1 (see ogdm ema)"
    add("--ema", default=runs.PLAIN, help=averages)
    add("--step", default="newest", help="checkpoints: steps, newest or best (default: newest)")
    most = f"images of a distance (default: the data's, at most {measuring.MOST})"
    add("--num", type=whole(6), help=most)
    add("--metric", default="fd", choices=figures.METRICS, help="that is compared (default: fd)")
    add("--reference", default="", help="another source than the one that was trained on")
    add("--vae", default="", metavar="FILE", help="decodes runs on latents (default: their data's)")
    add("--batch", type=whole(1), help=measuring.AT_A_TIME)
    add("--devices", type=whole(0), default=0, help="0 = all")
    add("--dry-run", action="store_true", help="say what there is and what would be done")
    measuring.add_space_options(parser, "default: the first configuration's")
    args, rest = parser.parse_known_args(argv)
    args.resized = {}
    return args, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    args, rest = parse(argv)
    try:
        with startup.command():
            run(args, rest)
    except cluster.Stopped:
        startup.end_on_interrupt()
    return 0


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """What `main` does after parsing."""
    seeds = [int(seed) for seed in parse_seeds(args.seeds, 0)]
    last = max(seeds)
    few = last * runs.APART + (args.num or measuring.MOST) < 2**32  # seeds of images have 32 bits
    require(few, "--seeds", last, "numbers below 4000")
    arms = read_arms(args.config, rest, seeds)
    out = places.place(args.out, "--out")
    ways = read_ways(args, arms, seeds[0])
    results = runs.Results(out)
    done = {(arm.name, seed): runs.state(arm, out, seed) for seed in seeds for arm in arms}
    if args.dry_run:
        print(describe(arms, seeds, ways, out, done))
        return
    with lock.hold(out, print, "--out"):
        ruler = open_ruler(args, arms, seeds, ways)
        results.head = {
            "configurations": dict(word.split("=", 1) for word in args.config),
            "changes": rest,
            "seeds": seeds,
        }
        for seed in seeds:
            for arm in arms:
                if runs.train(arm, out, seed, print):
                    results.forget(arm.name, seed)
        asked = []
        with leaving(lambda: f"{len(results.reports)} measurements are in {out / runs.NAME}"):
            for seed in seeds:
                for arm in arms:
                    for report, new in runs.measure(arm, out, seed, ways, ruler, results):
                        asked.append(report)
                        if new:
                            print(spelled(report, args.metric), flush=True)
        _finish(args, asked, [arm.name for arm in arms], results, out)


def _finish(
    args: argparse.Namespace,
    asked: Sequence[dict[str, Any]],
    names: Sequence[str],
    results: runs.Results,
    out: epath.Path,
) -> None:
    """Writes and prints what was found."""
    found = figures.summary(asked, names, args.metric)
    results.write(summary=found)
    of = {"fd": "n", "fd_all": "n_samples", "kid": "n_samples"}.get(args.metric, "n_neighbours")
    n = asked[0][of]
    against = f" against {args.reference}" if args.reference else ""
    title = (
        f"{asked[0]['features']}{against}, {args.metric} (n = {n}): mean ± standard deviation "
        f"over the seeds {args.seeds}\n\n"
    )
    with places.written(out / "study.md") as new:
        new.write_text(title + figures.markdown(found))
    print(f"\n{title}{figures.markdown(found)}\nwrote {out / runs.NAME} and {out / 'study.md'}")


def read_arms(words: Sequence[str], rest: Sequence[str], seeds: Sequence[int]) -> list[runs.Arm]:
    """The configurations of --config NAME=FILE with the changes that follow.

    Raises:
      ConfigError, ValueError: a name twice or none, a setting that cannot be.
    """
    files: dict[str, str] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name == "config":
            raise ConfigError(
                f"--config: {word!r} given; expected NAME=FILE, such as ogdm=configs/digits.py, "
                "NAME of letters, digits, - and _"
            )
        if name in files:
            raise ConfigError(f"--config: the name {name!r} given twice; expected each once")
        files[name] = file
    typed: dict[str, list[str]] = {name: [] for name in files}
    for name, group in _groups(rest):
        if name not in (*files, "config"):
            near = configs.suggestion(name, files)
            raise ConfigError(
                f"--{name}: names no configuration{near}; expected --config.KEY=VALUE for all, or "
                f"one of {', '.join(files)} in place of config"
            )
        texts = startup.split_overrides(group)
        if any(text.startswith("seed=") for text in texts):
            raise ConfigError(f"--{name}.seed: given; expected --seeds, which are those of all")
        for arm in [name] if name in files else files:
            typed[arm] += texts
    arms = []
    for name, file in files.items():
        of_seed, vain = {}, ""
        for seed in seeds:
            texts = [text.replace("{seed}", str(seed)) for text in (*typed[name], f"seed={seed}")]
            _, of_seed[seed], vain = read_settings(file, texts)
        if vain:
            print(f"{name}: {vain}")
        if of_seed[seeds[0]].task != "denoiser":
            raise ConfigError(f"--config: {name}={file} trains no denoiser; expected one")
        if of_seed[seeds[0]].network.kind == "sd":
            raise ConfigError(
                f"--config: {name}={file} makes pictures of texts; {measuring.OF_TEXTS}"
            )
        arms.append(runs.Arm(name, of_seed))
    return arms


def _groups(rest: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(NAME or "config", words for split_overrides) of each --NAME.KEY=VALUE or --NAME.KEY VALUE;
    the names are not checked.
    """
    found: list[tuple[str, list[str]]] = []
    for word in rest:
        name, dot, key = word.removeprefix("--").partition(".")
        if word.startswith("--") and dot and "=" not in name:
            found.append((name, [f"--config.{key}"]))
        elif found:
            found[-1][1].append(word)
        else:
            found.append(("config", [word]))
    return found


def read_ways(args: argparse.Namespace, arms: Sequence[runs.Arm], seed: int) -> list[runs.Way]:
    """Every checkpoint, moving average, solver and number of steps with every other.

    Raises:
      ConfigError: one that cannot be.
    """
    default = arms[0].configs[seed].sample
    steps = numbers("--steps", args.steps) or [default.steps]
    solvers = listed(args.solvers) or [default.solver]
    checkpoints = listed(args.step)
    for word in checkpoints:
        if not (word in ("newest", "best") or word.isdecimal() and len(word) < 10):
            raise ConfigError(f"--step: {word!r} given; expected numbers, newest or best")
    averages = listed(args.ema)
    for word in averages:
        width = float(word) if re.fullmatch(r"0?\.\d{1,6}", word) else 0.0
        need = f"{runs.PLAIN}, or relative widths above 0 and below 0.2886, such as 0.1"
        require(word == runs.PLAIN or 0 < width < 0.2886, "--ema", word, need)
        for arm in arms if word != runs.PLAIN else ():
            if not arm.configs[seed].ema.stds:
                raise ConfigError(
                    f"--ema: {word} given, but {arm.name} keeps no snapshots; expected "
                    f"--{arm.name}.ema.stds=0.05,0.1"
                )
    samplers: list[dict[str, Any]] = [{"solver": s, "steps": n} for s in solvers for n in steps]
    if adaptive.NAME in solvers:
        raise ConfigError(
            f"--solvers: {adaptive.NAME} given or configured, which chooses the steps of each "
            "image; expected solvers of fixed steps, such as heun"
        )
    for arm in arms:
        for words in samplers:
            runs.check_sampler(arm.configs[seed].sample, words)
    return [runs.Way(at, ema, w) for at in checkpoints for ema in averages for w in samplers]


def describe(
    arms: Sequence[runs.Arm],
    seeds: Sequence[int],
    ways: Sequence[runs.Way],
    out: epath.Path,
    done: dict[tuple[str, int], int],
) -> str:
    """What a study would do, a line a run."""
    lines = []
    for seed in seeds:
        for arm in arms:
            total, at = runs.length(arm.configs[seed]), done[arm.name, seed]
            said = "to train" if at == 0 else f"goes on from step {at:,}"
            said = "trained" if at >= total else f"{said}, {total:,} steps"
            lines.append(f"{arm.folder(out, seed)}: {said}")
    said = [f"{w.sampler['solver']} {w.sampler['steps']} ({w.ema}, {w.checkpoint})" for w in ways]
    return "\n".join([*lines, f"each measured with {'; '.join(said)}"])


def open_ruler(
    args: argparse.Namespace,
    arms: Sequence[runs.Arm],
    seeds: Sequence[int],
    ways: Sequence[runs.Way],
) -> runs.Ruler:
    """The reference and the feature space of the study.

    Raises:
      ConfigError: configurations of different data; a sampler that one of their models cannot have.
    """
    seed = seeds[0]
    config = arms[0].configs[seed]
    keys = ("source", "resolution", "channels")
    for arm in arms[1:]:
        for key in keys:
            there, here = getattr(config.data, key), getattr(arm.configs[seed].data, key)
            if there != here:
                raise ConfigError(
                    f"--config: data.{key} is {there!r} of {arms[0].name} and {here!r} of "
                    f"{arm.name}; expected the same data, which samples are compared with"
                )
    source = open_source(config)
    for arm in arms:
        model = models.build(arm.configs[seed], source.shape, source.num_classes, source.latents)
        for way in ways:
            runs.check_sampler(arm.configs[seed].sample, way.sampler, model)
    name, decoder = config.data.source, ""
    if source.latents is not None:  # opened before any is trained
        own = source.latents.vae.get("sha256")
        found = decoding.open_decoder(config, source.latents, args.vae, "--vae").sha256
        decoder = "" if own in (None, found) else found
        source = open_pixels(config, args.vae, source)
    if args.reference:
        name = args.reference
        source = measuring.open_images("--reference", name, args, source.shape)
    space = measuring.open_space(args, source, source.shape, config.evaluate)
    real = references(source)
    num = args.num or min(len(real), measuring.MOST)
    drawing = lambda model: measuring.drawing(args, model, reference=source)
    about = lambda model: compared(source, model.model, model.class_names)
    return runs.Ruler(space, space(real), name, num, drawing, about, args.vae, decoder)


def spelled(report: dict[str, Any], metric: str) -> str:
    """A measurement in one line."""
    return (
        f"{report['arm']}, seed {report['seed']}, {report['ema']}, {report['solver']} "
        f"{report['steps']}: {metric} {report[metric]:.4g}"
    )
