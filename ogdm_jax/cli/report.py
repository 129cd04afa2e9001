"""Writes one HTML page that opens without a network: distance against network evaluations, samples
beside real images and their nearest training images, trajectories, the curves of training, the
configuration.

    ogdm report --workdir DIR
    ogdm report --workdir DIR --solvers heun,dpmpp_2m --steps 5,9,18 --num 10000 --out report.html
"""

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np

from ogdm_jax import places, records, startup
from ogdm_jax.cli import measuring
from ogdm_jax.cli.parsing import listed, numbers, parser_of, whole
from ogdm_jax.config import Sample
from ogdm_jax.report import findings, html, inputs
from ogdm_jax.training import evaluations
from ogdm_jax.training.evaluate import (
    check_number,
    compared,
    conditions,
    measure_samplers,
    reference_part,
    references,
)
from ogdm_jax.training.workdir import TrainedModel


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = parser_of("report", __doc__)
    measuring.add_model_options(parser)
    add = parser.add_argument
    most = f"images of a distance (default: the data's, at most {measuring.MOST})"
    add("--num", type=whole(0), default=0, help=most)
    add("--solvers", default="euler,heun", help='for distance against NFE; "" for none')
    add("--steps", default="3,5,9,18", help="sampler steps for distance against NFE")
    add("--distances", default="", metavar="FILE.json", help="show these; a report writes them")
    add("--reference", default="", help="another source")
    add("--out", default="", metavar="FILE.html", help="default: DIR/report.html")
    measuring.add_space_options(parser, "default: the configuration's")
    return measuring.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    args = parse(argv)
    with startup.command():
        check_number(args.num, "--num")
        distances = inputs.distances(args.distances) if args.distances else None
        other = inputs.printable(args.reference) if args.reference else ""
        folder = places.workdir(args.workdir)
        out = places.place(args.out, "--out") if args.out else folder / "report.html"
        if args.out or folder.is_dir():  # a missing training folder has a sentence of its own
            places.writable(out, "--out" if args.out else "--workdir", file=True)
        trained = measuring.open_model(args)
        choices = sampler_choices(args, trained) if distances is None else []
        source = measuring.open_model_data(args, trained)
        draw = measuring.drawing(args, trained, reference=source)
        space = measuring.open_model_space(args, trained, source)
        real = references(source)
        features = space(real)
        against = ", ".join(filter(None, [other, *reference_part(source).values()]))
        if distances is None:
            num = args.num or min(len(real), measuring.MOST)
            measured = measure_samplers(trained, choices, space, features, range(num), draw)
            about = compared(source, trained.model, trained.class_names)
            about |= {"reference": against} if against else {}
            distances = [report | about for report in measured]
            if distances:
                records.write(folder / evaluations.MEASURED, distances, indent=1)
        seeds = range(findings.SHOWN)
        samples = np.concatenate(list(draw(trained.settings(), seeds, "samples")))
        labels = conditions(source, trained.model, seeds[: findings.TRACED], trained.class_names)
        shown = (samples, real, space, features, distances, labels)
        found = findings.collect(trained, args.workdir, *shown)
        changed = [f"{option} {how}" for option, how in args.resized.items()]
        those = filter(None, dict.fromkeys([against, *(r.get("reference") for r in distances)]))
        notes = [*(f"compared with {words}" for words in those), *changed, *found.notes]
        found = dataclasses.replace(found, notes=notes, reference=other)
        page = html.page(found).encode()
        with places.written(out) as new:
            new.write_bytes(page)
        print(f"wrote {out} ({len(page) / 1000:.0f} kB)")
    return 0


def sampler_choices(args: argparse.Namespace, trained: TrainedModel) -> list[Sample]:
    """The settings of every solver of --solvers at every number of --steps.

    Raises:
      ConfigError: --steps are no numbers, or a setting is out of range.
    """
    steps, solvers = numbers("--steps", args.steps), listed(args.solvers)
    return [trained.settings(solver=solver, steps=n) for solver in solvers for n in steps]
