"""Draws 50,000 images three times, measures each set while it is drawn, and prints the smallest
distance to the whole data as one JSON object (Karras et al., arXiv 2206.00364, appendix F.1).
With --out, sets that were measured are kept beside it while others are drawn, and the same command
goes on with the rest.

    ogdm evaluate protocol --workdir DIR --num 10000 --ranges 1
    ogdm evaluate protocol --workdir DIR --features inception --weights FILE
        --reference STATISTICS.npz
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ogdm_jax import models, places, records, startup
from ogdm_jax.cli import measuring
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.cli.stopping import leaving
from ogdm_jax.config import ConfigError, Sample
from ogdm_jax.data import output
from ogdm_jax.metrics import protocol
from ogdm_jax.metrics.features import weights_of
from ogdm_jax.metrics.statistics import FeatureSpace, is_statistics, load_statistics, trained_on
from ogdm_jax.sampling import churn as churning
from ogdm_jax.sampling import generate
from ogdm_jax.training.evaluate import describe_sampler, evaluations_of, shared_conditions
from ogdm_jax.training.workdir import TrainedModel

_SPACE = "features trained on"  # in the record of the sets


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = parser_of("evaluate", __doc__)
    measuring.add_model_options(parser)
    add = parser.add_argument
    add("--num", type=whole(1), default=50_000, help="images of each set")
    add("--ranges", type=whole(1), default=3, help="sets, from consecutive seeds")
    add("--first", type=whole(0, 2**32 - 1), default=0, help="the first seed")
    add("--solver", default="", help="default: the configuration's")
    add("--steps", type=int, default=None, help="default: the configuration's")
    add("--eta", type=float, default=None, help="randomness of ddim and heun, 0 to 1")
    measuring.add_tolerance_options(parser)
    add("--churn", default="", help="S_churn,S_min,S_max,S_noise of EDM's stochastic Heun sampler")
    add("--reference", default="", help="another source, or mu and sigma (npz)")
    add("--out", default="", metavar="FILE.json", help="also write the JSON here")
    measuring.add_space_options(parser, "default: the configuration's")
    return measuring.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    args = parse(argv)
    with startup.command():
        ranges = protocol.seed_ranges(args.num, args.ranges, args.first)
        if args.out:
            places.writable(places.place(args.out, "--out"), "--out", file=True)
        trained = measuring.open_model(args)
        names = ("solver", "steps", "num", "eta", "rtol", "atol")
        settings = trained.settings(**{name: getattr(args, name) for name in names})
        churn = churning.parse(args.churn)
        generate.check_guidance(settings, (), churn)
        counts: list[np.ndarray] = []
        statistics = args.reference.endswith(".npz") and is_statistics(args.reference)
        source = None if statistics else measuring.open_model_data(args, trained)
        draw = measuring.drawing(args, trained, churn, source)
        draw = functools.partial(draw, settings, counts=counts)
        if source is None:
            published = load_statistics(args.reference)
            space = measuring.open_model_space(args, trained, published)
            reference = protocol.of_statistics(space, published)
        else:
            space = measuring.open_model_space(args, trained, source)
            reference = protocol.of_source(space, source, args.num)
        tell = functools.partial(print, file=sys.stderr)
        how = describe_sampler(settings) | {"step": trained.step, "workdir": str(args.workdir)}
        how |= weights_of(space) | measuring.resized(args)
        if source is not None:
            how |= shared_conditions(source, trained.model, trained.class_names)
        sets = Sets(args, how | _origin(args, trained, settings, space), counts)
        with leaving(lambda: sets.safe(len(ranges))):
            result = protocol.score_ranges(
                space, reference, ranges, draw, tell, sets.finished, sets.keep
            )
        typed = {name: getattr(args, name) for name in ("reference", "eta", "churn")}
        how |= {name: value for name, value in typed.items() if value not in ("", None)}
        measuring.print_json(result | how, args.out)
        sets.clear()
    return 0


def _origin(
    args: argparse.Namespace, trained: TrainedModel, settings: Sample, space: FeatureSpace
) -> dict[str, Any]:
    """What else than the seeds changes a distance: {option: value}."""
    names = ("num", "ranges", "first", "churn", "reference", "data_dir")
    found = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    found |= {f"sample.{name}": value for name, value in vars(settings).items() if name != "num"}
    weights = models.fingerprint((trained.params, trained.buffers)).tobytes().hex()
    return found | {"features": space.name, "weights": weights, _SPACE: trained_on(space)}


class Sets:
    """The sets that are measured, in OUT.sets until the last one is."""

    def __init__(
        self, args: argparse.Namespace, origin: dict[str, Any], counts: list[np.ndarray]
    ) -> None:
        """Reads what an earlier command of the same words measured.

        Args:
          args: of the command.
          origin: what the sets are drawn with.
          counts: receives dopri5's evaluations while a set is drawn.

        Raises:
          ConfigError: sets of other settings are there.
        """
        self._file = places.place(f"{args.out}.sets", "--out") if args.out else None
        self._counts = counts
        self._origin: dict[str, Any] = json.loads(records.dumps(origin))
        self.finished: list[dict[str, Any]] = []
        if self._file is None or not self._file.exists():
            return
        known = records.read(self._file, dict, "--out")
        before, self.finished = known.get("drawn_with"), known.get("sets", [])
        if not isinstance(before, dict):
            raise ConfigError(f"--out: '{self._file}' holds no measured sets; expected it removed")
        before.setdefault(_SPACE, self._origin.get(_SPACE))  # not said before
        if differs := output.difference(before, self._origin):
            raise ConfigError(
                f"--out: '{self._file}' holds sets of {differs}; expected the same, another name, "
                "or it removed"
            )
        print(f"{len(self.finished)} sets are in {self._file} already", file=sys.stderr)

    def keep(self, sets: Sequence[dict[str, Any]]) -> None:
        """Writes down what is measured, the newest set with its own evaluations."""
        if self._counts:
            sets[-1].update(evaluations_of(np.concatenate(self._counts)))
            self._counts.clear()
        self.finished = list(sets)
        if self._file is not None:
            records.write(self._file, {"drawn_with": self._origin, "sets": sets})

    def safe(self, total: int) -> str:
        """What is kept, and what to do."""
        if self._file is None:
            return "nothing is kept (with --out, finished sets are)"
        done = f"{len(self.finished)} of {total} sets are safe in '{self._file}'"
        return f"{done}, and the same command goes on with the rest"

    def clear(self) -> None:
        """Removes what the result holds now."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
