"""How long an evaluation takes, and what share of it is spent outside the feature network.

python benchmarks/evaluation.py --source npz:FILE --features lite0 --num 10000 --timed 512

The network is timed on --timed images of the source (its cost is linear in them); everything else (moments, Frechet
distance, floor, KID, precision, recall, density, coverage) runs in full on --num feature vectors on either side.
Seconds of wall clock and of this process on all its cores; the second are the ones to trust on a busy machine.
"""

import argparse
import json
import time

import numpy as np

from ogdm_jax import startup


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="digits")
    parser.add_argument("--features", default="auto", help="auto, lite0, inception")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--timed", type=int, default=10_000)
    args = parser.parse_args()
    startup.prepare()

    from ogdm_jax.data import open_source
    from ogdm_jax.evaluation import distance_report, feature_space

    source = open_source(args.source)
    space = feature_space(source if args.features == "auto" else args.features, args.weights)
    rng = np.random.default_rng(0)
    images = source.take(np.sort(rng.choice(len(source), args.timed)))["image"]
    space(images[:256])  # compiles
    start = clocks()
    values = space(images)
    network = (clocks() - start) / len(images) * 2 * args.num  # samples and reference

    # Any number of vectors with the spread of the measured ones: the host's work does not depend on their values.
    spread = values.std(0, keepdims=True) + 1e-3
    samples, reference = (values.mean(0) + spread * rng.normal(size=(args.num, space.dim)) for _ in range(2))
    start = clocks()
    report = distance_report(space, samples.astype(np.float32), reference.astype(np.float32))
    host = clocks() - start
    share = host / (network + host)
    result = {"features": space.name, "dim": space.dim, "num": args.num, "timed": args.timed, "n": report["n"]}
    for i, clock in enumerate(("wall", "cpu")):
        result |= {f"network_{clock}_s": network[i], f"outside_{clock}_s": host[i], f"outside_{clock}_share": share[i]}
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}, indent=1))


if __name__ == "__main__":
    main()
