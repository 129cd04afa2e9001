"""How long an evaluation takes, and what share of it is spent outside the feature network.

python sample.py --workdir runs/digits --seeds 0-19999 --solver euler --steps 5 --out FILE.npz
python benchmarks/evaluation.py --source npz:FILE.npz --features lite0 --num 10000

The first --num images are taken for samples and the next --num for the reference: all pass through
the network, and every distance (Frechet with its floor, KID, precision, recall, density, coverage)
is taken in full. Seconds of wall clock and of this process on all its cores; the second are the
ones to trust on a busy machine.
"""

import argparse
import json
import time

import numpy as np

from ogdm_jax import startup


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


class Timed:
    """A feature space that adds up what it spends."""

    def __init__(self, space):
        self._space, self.name, self.dim, self.spent = space, space.name, space.dim, np.zeros(2)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        start = clocks()
        values = self._space(images)
        self.spent += clocks() - start
        return values


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="at least 2 * --num images")
    parser.add_argument(
        "--features", default="lite0", help="lite0, inception, or a labelled source"
    )
    parser.add_argument("--weights", default=None)
    parser.add_argument("--num", type=int, default=10_000)
    args = parser.parse_args()
    startup.prepare()

    from ogdm_jax.data import open_source
    from ogdm_jax.metrics import distance_report, feature_space

    source = open_source(args.source)
    if len(source) < 2 * args.num:
        parser.error(
            f"--source: {args.source} has {len(source)} images; expected {2 * args.num}, twice "
            "--num"
        )
    space = Timed(feature_space(args.features, args.weights))
    samples, reference = (
        source.take(np.arange(k * args.num, (k + 1) * args.num))["image"] for k in range(2)
    )
    start = clocks()
    report = distance_report(space, samples, reference)
    whole = clocks() - start
    result = {"features": space.name, "dim": space.dim, "n": report["n"]}
    for i, clock in enumerate(("wall", "cpu")):
        outside = whole[i] - space.spent[i]
        result |= {
            f"{clock}_s": whole[i],
            f"outside_{clock}_s": outside,
            f"outside_{clock}_share": outside / whole[i],
        }
    print(
        json.dumps(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, indent=1
        )
    )


if __name__ == "__main__":
    main()
