"""ogdm evaluate protocol: EDM's figure of a training folder."""

import argparse
import functools
import sys
from collections.abc import Sequence

from ogdm_jax import places, startup
from ogdm_jax.cli import measuring
from ogdm_jax.cli.parsing import new_parser, whole
from ogdm_jax.metrics import protocol
from ogdm_jax.metrics.features import weights_of
from ogdm_jax.metrics.statistics import is_statistics, load_statistics
from ogdm_jax.sampling import churn as churning
from ogdm_jax.sampling import generate
from ogdm_jax.training.evaluate import describe_sampler

EXAMPLES = """\
protocol --workdir DIR --num 10000 --ranges 1
protocol --workdir DIR --features inception --weights FILE --reference STATISTICS.npz"""
ABOUT = """\
Draws 50,000 images three times, measures each set while it is drawn, and prints the smallest
distance to the whole data as one JSON object (Karras et al., arXiv 2206.00364, appendix F.1).
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = new_parser("evaluate", ABOUT, EXAMPLES)
    measuring.add_model_options(parser)
    add = parser.add_argument
    add("--num", type=whole(1), default=50_000, help="images of each set")
    add("--ranges", type=whole(1), default=3, help="sets, from consecutive seeds")
    add("--first", type=whole(0, 2**32 - 1), default=0, help="the first seed")
    add("--solver", default="", help="default: the configuration's")
    add("--steps", type=int, default=None, help="default: the configuration's")
    add("--eta", type=float, default=None, help="randomness of ddim and heun, 0 to 1")
    add("--churn", default="", help="S_churn,S_min,S_max,S_noise of EDM's stochastic Heun sampler")
    add("--reference", default="", help="another source, or mu and sigma (npz)")
    add("--out", default="", metavar="FILE.json", help="also write the JSON here")
    measuring.add_space_options(parser, "default: the configuration's")
    return measuring.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    args = parse(argv)
    with startup.one_sentence():
        startup.prepare()
        ranges = protocol.seed_ranges(args.num, args.ranges, args.first)
        if args.out:
            places.writable(places.place(args.out, "--out"), "--out", file=True)
        trained = measuring.open_model(args)
        settings = trained.settings(
            solver=args.solver, steps=args.steps, num=args.num, eta=args.eta
        )
        churn = churning.parse(args.churn)
        generate.check_guidance(settings, (), churn)
        draw = functools.partial(measuring.drawing(args, trained, churn), settings)
        if args.reference.endswith(".npz") and is_statistics(args.reference):
            published = load_statistics(args.reference)
            space = measuring.open_model_space(args, trained, published)
            reference = protocol.of_statistics(space, published)
        else:
            source = measuring.open_model_data(args, trained)
            space = measuring.open_model_space(args, trained, source)
            reference = protocol.of_source(space, source, args.num)
        tell = functools.partial(print, file=sys.stderr)
        result = protocol.score_ranges(space, reference, ranges, draw, tell)
        result |= describe_sampler(settings) | {"step": trained.step, "workdir": str(args.workdir)}
        measuring.print_json(result | weights_of(space), args.out)
    return 0
