"""The commands that start from a training folder: `protocol` (EDM's figure) and `report` (one HTML
page).

python -m ogdm_jax evaluation protocol --workdir DIR --num 50000 --ranges 3 [--features inception
--weights FILE] python -m ogdm_jax evaluation report --workdir DIR [--solvers euler,heun --steps
3,5,9,18] [--out report.html]
"""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from ogdm_jax import config as configs
from ogdm_jax import data, models, parallel, places, randomness, startup
from ogdm_jax.data import Source
from ogdm_jax.data.output import print_json, source_name, weights_of
from ogdm_jax.metrics import protocol
from ogdm_jax.metrics.features import FeatureSpace, distance_report, feature_space
from ogdm_jax.metrics.statistics import is_statistics, load_statistics
from ogdm_jax.pixels import to_uint8
from ogdm_jax.report import html
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.sampler import nfe, sample
from ogdm_jax.training import checkpoint
from ogdm_jax.training import workdir as finish

SHOWN, TRACED, NEIGHBOURS = (
    64,
    3,
    5,
)  # images of the grid, seeds of the trajectories, nearest images of each sample
_DISTANCES = "expected distances.json, which report writes into the training folder"
MOST = 5000  # samples for each distance of a report, unless --num says otherwise


def main(argv: Sequence[str]) -> None:
    """argv[0] is "protocol" or "report"."""
    args = parse(argv)
    with startup.one_sentence():
        startup.prepare()
        (run_protocol if argv[0] == "protocol" else run_report)(args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    name = argv[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m ogdm_jax evaluation {name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="training folder")
    parser.add_argument(
        "--step", default="", help="checkpoint: a number, or best (default: the newest)"
    )
    parser.add_argument(
        "--features",
        default="",
        help="auto, a labelled source, lite0, inception (default: the run's)",
    )
    parser.add_argument("--weights", default="", help="inception: the weights file")
    parser.add_argument(
        "--route", default="tf", help="inception: tf (EDM, original FID) or pytorch_fid"
    )
    parser.add_argument(
        "--size", type=int, default=96, help="lite0: pixels a side that images are resized to"
    )
    parser.add_argument(
        "--reference", default="", help="another source; for protocol also mu and sigma (npz)"
    )
    parser.add_argument("--data_dir", default="", help="folder of prepared tfds sets")
    parser.add_argument("--batch", type=int, default=256, help="images per device at a time")
    parser.add_argument("--devices", type=int, default=0, help="0 = all")
    if name == "protocol":
        parser.add_argument("--num", type=int, default=50_000, help="images of each set")
        parser.add_argument("--ranges", type=int, default=3, help="sets, from consecutive seeds")
        parser.add_argument("--first", type=int, default=0, help="the first seed")
        parser.add_argument("--solver", default="", help="default: the configuration's")
        parser.add_argument("--steps", type=int, default=None, help="default: the configuration's")
        parser.add_argument("--eta", type=float, default=None)
        parser.add_argument(
            "--churn",
            default="",
            help="S_churn,S_min,S_max,S_noise of EDM's stochastic Heun sampler",
        )
        parser.add_argument(
            "--out", default="", metavar="FILE.json", help="also write the JSON here"
        )
        return parser.parse_args(argv[1:])
    parser.add_argument(
        "--num",
        type=int,
        default=0,
        help=f"images of a distance (default: the data's, at most {MOST})",
    )
    parser.add_argument(
        "--solvers", default="euler,heun", help='for distance against NFE; "" for none'
    )
    parser.add_argument(
        "--steps", default="3,5,9,18", help="sampler steps for distance against NFE"
    )
    parser.add_argument(
        "--distances", default="", metavar="FILE.json", help="show these; a report writes them"
    )
    parser.add_argument("--out", default="", metavar="FILE.html", help="default: DIR/report.html")
    return parser.parse_args(argv[1:])


def open_run(args: argparse.Namespace) -> finish.TrainedModel:
    step = args.step or None
    if step not in (None, "best"):
        configs.require(step.isdigit(), "--step", step, "a number or best")
        step = int(step)
    return finish.open_workdir(args.workdir, step)


def open_reference(args: argparse.Namespace, trained: finish.TrainedModel) -> Source:
    """The source that --reference names, in the model's size, or the one that was trained on."""
    config = ConfigDict(trained.config)
    if args.data_dir:
        config.data.data_dir = args.data_dir
    if not args.reference:
        return finish.open_source(config)
    height, _, channels = trained.model.image_shape
    return data.open_source(
        source_name(args.reference), config.data.data_dir or None, height, channels
    )


def open_space(
    args: argparse.Namespace, trained: finish.TrainedModel, source: Source | None
) -> FeatureSpace:
    settings = trained.config.evaluate
    name = args.features or settings.features or "auto"
    if name in ("lite0", "inception"):
        return feature_space(
            name, args.weights or settings.get("weights") or None, args.route, args.size
        )
    if name != "auto":
        height, _, channels = trained.model.image_shape
        return feature_space(
            data.open_source(source_name(name), args.data_dir or None, height, channels)
        )
    if source is None:
        raise ValueError(
            "--features: auto given with published statistics; expected inception, lite0 or a "
            "source"
        )
    return feature_space(source)


def stream(
    args: argparse.Namespace,
    trained: finish.TrainedModel,
    settings: ConfigDict,
    seeds: Sequence[int],
    churn: Any = None,
) -> Iterator[np.ndarray]:
    """uint8 images of the seeds, batch by batch, over the devices."""
    devices = parallel.make_plan("mesh", args.devices).local_devices
    configs.require(args.batch >= 1, "--batch", args.batch, "at least 1")
    batch = len(devices) * min(args.batch, -(-len(seeds) // len(devices)))
    images = generate.sampler(trained.model, settings, devices, churn=churn)
    seeds = np.asarray(seeds)
    labels = generate.labels_for(seeds, trained.model.label_dim, None)
    for part in generate.generate(images, trained.params, trained.buffers, seeds, labels, batch):
        yield to_uint8(part)


def _bar(total: int, about: str) -> tqdm:
    return tqdm(total=total, unit="image", desc=about, disable=not sys.stderr.isatty())


def run_protocol(args: argparse.Namespace) -> dict[str, Any]:
    """Samples every range of seeds, measures it while it is sampled, prints the JSON."""
    ranges = protocol.seed_ranges(args.num, args.ranges, args.first)
    if args.out:
        places.writable(places.place(args.out, "--out"), "--out", file=True)
    trained = open_run(args)
    settings = trained.settings(
        solver=args.solver, steps=args.steps, num=args.num, eta=args.eta
    )
    churn = generate.parse_churn(args.churn, settings.solver)
    if args.reference.endswith(".npz") and is_statistics(args.reference):
        space = open_space(args, trained, None)
        reference = protocol.of_statistics(space, load_statistics(args.reference))
    else:
        source = open_reference(args, trained)
        space = open_space(args, trained, source)
        reference = protocol.of_source(space, source, args.num)
    sets = []
    for seeds in ranges:
        name = f"{seeds[0]}-{seeds[-1]}"
        with _bar(len(seeds), f"seeds {name}") as bar:
            batches = (
                bar.update(len(part)) and part or part
                for part in stream(args, trained, settings, seeds, churn)
            )
            sets.append({"seeds": name} | protocol.score(space, batches, reference))
        if len(ranges) > 1:
            print(f"seeds {name}: {space.name} {sets[-1]['fd_all']:.4f}", file=sys.stderr)
    evaluations = nfe(settings.solver, settings.steps)
    how = {
        "solver": settings.solver,
        "steps": settings.steps,
        "nfe": evaluations,
        "step": trained.step,
    }
    result = protocol.smallest(space, sets) | how | {"workdir": str(args.workdir)}
    result |= weights_of(space)
    print_json(result, args.out)
    return result


def run_report(args: argparse.Namespace) -> epath.Path:
    """Collects what the page shows, writes it, prints where."""
    reports = read_distances(args.distances) if args.distances else None
    out = (
        places.place(args.out, "--out")
        if args.out
        else places.workdir(args.workdir) / "report.html"
    )
    if (
        args.out or out.parent.is_dir()
    ):  # a training folder that is not there has a sentence of its own
        places.writable(out, "--out" if args.out else "--workdir", file=True)
    trained = open_run(args)
    source = open_reference(args, trained)
    space = open_space(args, trained, source)
    real = source.take(np.arange(min(len(source), 50_000)))["image"]
    values = space(real)
    settings = trained.settings()
    if reports is None:
        reports = measure(args, trained, space, values)
        if reports:
            with places.written(places.place(args.workdir) / "distances.json") as new:
                new.write_text(json.dumps(reports, indent=1) + "\n")
    samples = np.concatenate(list(stream(args, trained, settings, range(SHOWN))))
    found = html.Findings(
        title=(
            f"{_name(args.workdir)}: {' + '.join(trained.config.methods) or 'plain'} on "
            f"{source.name}"
        ),
        facts=facts(trained, settings),
        distances=reports,
        metrics=_metrics(args.workdir),
        best=next(
            iter(checkpoint.ranked(checkpoint.evaluations(args.workdir), _steps(args.workdir))),
            None,
        ),
        samples=samples,
        real=real[np.random.default_rng(0).permutation(len(real))[:SHOWN]],
        made=(
            f"{settings.solver}, {settings.steps} steps, {nfe(settings.solver, settings.steps)} "
            "network evaluations"
        ),
        nearest=nearest(space, samples[:8], real, values),
        progress=_progress(args.workdir),
        trajectory=trajectory(trained, settings, np.arange(TRACED)),
        config=configs.flatten(trained.config),
    )
    page = html.page(found).encode()
    with places.written(out) as new:
        new.write_bytes(page)
    print(f"wrote {out} ({len(page) / 1000:.0f} kB)")
    return out


def _name(workdir: str) -> str:
    return (
        pathlib.Path(workdir).resolve() if places.is_local(workdir) else places.place(workdir)
    ).name


def measure(
    args: argparse.Namespace,
    trained: finish.TrainedModel,
    space: FeatureSpace,
    reference: np.ndarray,
) -> list[dict[str, Any]]:
    """The distance report of every solver at every number of steps. reference: features [n, dim] of
    the real images.
    """
    try:
        steps = [int(word) for word in args.steps.split(",") if word]
    except ValueError:
        raise ValueError(
            f"--steps: {args.steps!r} given; expected numbers such as 3,5,9,18"
        ) from None
    plans = [
        trained.settings(solver=solver, steps=n) for solver in args.solvers.split(",") if solver for n in steps
    ]
    num = args.num or min(len(reference), MOST)
    reports = []
    for settings in plans:
        values = []
        with _bar(num, f"{settings.solver} {settings.steps}") as bar:
            for part in stream(args, trained, settings, range(num)):
                values.append(space(part))
                bar.update(len(part))
        report = distance_report(space, np.concatenate(values), reference)
        how = {
            "solver": settings.solver,
            "steps": settings.steps,
            "nfe": nfe(settings.solver, settings.steps),
        }
        reports.append({"step": trained.step} | how | report)
    return reports


def facts(trained: finish.TrainedModel, settings: ConfigDict) -> list[tuple[str, str, str]]:
    seen = trained.step * trained.config.data.batch
    height, width, channels = trained.model.image_shape
    classes = f"{trained.model.label_dim} classes" if trained.model.label_dim else "no labels"
    count = models.parameter_count(trained.params)
    evaluations = f"{nfe(settings.solver, settings.steps)} evaluations an image"
    return [
        ("checkpoint", f"step {trained.step:,}", f"{seen:,} images seen"),
        ("network", f"{count:,}", f"parameters; {height} x {width} x {channels}, {classes}"),
        ("sampler", f"{settings.solver}, {settings.steps}", evaluations),
    ]


def nearest(
    space: FeatureSpace, samples: np.ndarray, real: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(samples [k,...], the closest real images [k,m,...], their distances [k,m]). values: the real
    ones' features.
    """
    mine = space(samples).astype(np.float64)
    far = np.stack([np.linalg.norm(values - row[None], axis=1) for row in mine])
    rows = np.argsort(far, axis=1)[:, :NEIGHBOURS]
    return samples, real[rows], np.take_along_axis(far, rows, axis=1)


def trajectory(
    trained: finish.TrainedModel, settings: ConfigDict, seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sigmas [N+1], states, x0_hats) of the images of these seeds; states are scaled to the spread
    of clean images.
    """
    labels = generate.labels_for(seeds, trained.model.label_dim, None)

    @jax.jit
    def run(params, buffers, seeds, labels):
        keys = generate.seed_keys(seeds)
        latents = randomness.normal(
            randomness.fold_in_each(keys, "latent"), trained.model.image_shape
        )
        denoise = trained.model.denoiser(params, buffers)
        sigmas = generate.noise_levels(trained.model, settings)
        steps = randomness.fold_in_each(keys, "steps")
        more = {"label": labels, "eta": settings.eta, "trajectory": True}
        return sigmas, sample(denoise, latents, sigmas, solver=settings.solver, key=steps, **more)[
            1
        ]

    sigmas, path = jax.device_get(
        run(trained.params, trained.buffers, np.asarray(seeds, np.uint32), labels)
    )
    clean = trained.config.precondition.sigma_data
    scale = clean / np.sqrt(sigmas**2 + clean**2)
    return sigmas, path.states * scale[:, None, None, None, None], path.x0_hats


def _metrics(workdir: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without those that a killed run cut short (the next run's first
    may hang on one).
    """
    path, found = places.place(workdir) / "metrics.jsonl", []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "step" in line]


def read_distances(path: str) -> list[dict[str, Any]]:
    """A file of distances as `report` writes it. Raises ValueError where it is missing or another
    file.
    """
    texts = ("features", "solver")
    numbers = (
        "steps",
        "nfe",
        "n",
        "fd",
        "floor",
        "fd_over_floor",
        "fd_all",
        "n_samples",
        "n_reference",
    )
    try:
        reports = json.loads(places.place(path, "--distances").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--distances: {path} cannot be read ({type(error).__name__}); {_DISTANCES}"
        ) from None
    for report in reports if isinstance(reports, list) else [None]:
        if not isinstance(report, dict):
            raise ValueError(f"--distances: {path} is no list of distances; {_DISTANCES}")
        for names, kind in ((texts, str), (numbers, float | int)):
            wrong = next((name for name in names if not isinstance(report.get(name), kind)), None)
            if wrong:
                raise ValueError(
                    f"--distances: {path} has no {wrong} of the right type; {_DISTANCES}"
                )
    return reports


def _steps(workdir: str) -> list[int]:
    return checkpoint.complete(workdir)


def _progress(workdir: str, most: int = 4) -> list[tuple[int, bytes]]:
    """At most so many of the grids that training wrote, evenly over the steps."""
    paths = sorted((places.place(workdir) / "samples").glob("*.png"))
    chosen = (
        np.unique(np.linspace(0, len(paths) - 1, min(len(paths), most)).round().astype(int))
        if paths
        else []
    )
    return [(int(paths[i].stem), paths[i].read_bytes()) for i in chosen if paths[i].stem.isdigit()]
