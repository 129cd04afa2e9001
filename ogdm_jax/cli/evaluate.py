"""Scores samples on the command line: python -m ogdm_jax evaluation --samples X --reference Y
[--features SPACE]

Prints one JSON object. X: an npz, a folder or a zip of images; several are scored one by one, with
the minimum (EDM's
protocol: three sets of 50,000 images from seeds 0-49999, 50000-99999 and 100000-149999). Y: the
  same, any source name
of the data package, or an npz of published mu and sigma. SPACE: auto (the default: a classifier
trained on Y's labels), a labelled source, lite0, or inception with --weights.

From a training folder, see `protocol --help` (EDM's three times 50,000 images, the minimum) and
`report --help` (one HTML page: samples, curves, distance against network evaluations,
trajectories).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ogdm_jax import places, startup
from ogdm_jax.data import Source, open_source
from ogdm_jax.data.output import print_json, source_name, weights_of
from ogdm_jax.metrics import distances as metrics
from ogdm_jax.metrics import features as spaces
from ogdm_jax.metrics import protocol
from ogdm_jax.metrics.statistics import Statistics, is_statistics, load_statistics, save_statistics


def _images(source: Source, num: int | None, seed: int) -> dict[str, np.ndarray]:
    rows = np.arange(len(source))
    if num is not None:
        if not 1 <= num <= len(source):
            raise ValueError(f"--num: {num} given; {source.name} has {len(source)} images")
        rows = np.sort(np.random.default_rng(seed).choice(len(source), num, replace=False))
    return source.take(rows)


def _open_reference(
    word: str, data_dir: str | None, shape: tuple[int, int, int]
) -> Source | Statistics:
    if word.endswith(".npz") and is_statistics(word):
        return load_statistics(word)
    source = open_source(source_name(word), data_dir)
    if source.shape == shape:
        return source
    fitted = open_source(
        source_name(word), data_dir, shape[0], shape[2]
    )  # trained at another size than stored
    if fitted.shape != shape:
        raise ValueError(
            f"--reference: {word} has images {source.shape}, the samples {shape}; expected one "
            "shape"
        )
    return fitted


def _space(
    args: argparse.Namespace, reference: Source | Statistics, shape: tuple[int, int, int]
) -> Any:
    if args.features in ("lite0", "inception"):
        return spaces.feature_space(args.features, args.weights, args.route, args.size)
    if args.features == "auto":
        if isinstance(reference, Statistics):
            raise ValueError(
                "--features: auto given with published statistics; expected inception, lite0 or a "
                "source"
            )
        return spaces.feature_space(reference)
    return spaces.feature_space(
        open_source(source_name(args.features), args.data_dir, shape[0], shape[2])
    )


def score(
    samples: dict[str, np.ndarray], space: Any, reference: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """One set's report. reference: Statistics, or the reference's features [n, dim]."""
    values, probabilities = space.both(samples["image"])
    if isinstance(reference, Statistics):
        result = spaces.statistics_report(space, values, reference)
    else:
        result = spaces.distance_report(space, values, reference, args.k, seed=args.seed)
    if args.features == "inception":
        mean, spread = metrics.inception_score(probabilities, min(10, len(values)))
        result |= {"inception_score": mean, "inception_score_std": spread}
    labels = samples["label"]
    if args.features not in ("lite0", "inception") and labels.ndim == 1 and (labels >= 0).all():
        result["label_agreement"] = float((probabilities.argmax(1) == labels).mean())
    if args.save_statistics:
        save_statistics(args.save_statistics, metrics.Moments().update(values), space.name)
    return result


def paired(samples: np.ndarray, reference: np.ndarray) -> dict[str, float | int | None]:
    """Mean PSNR and SSIM of image i against image i.

    JSON has no infinity, which is the PSNR of equal images: they are left out of the mean (None
    without any other) and counted as "identical".
    """
    if samples.shape != reference.shape:
        raise ValueError(
            f"--paired: {samples.shape} samples, {reference.shape} references; expected equal "
            "shapes"
        )
    psnr = metrics.psnr(samples, reference, 255)
    finite = psnr[np.isfinite(psnr)]
    return {
        "psnr": float(finite.mean()) if finite.size else None,
        "identical": len(psnr) - len(finite),
        "ssim": float(metrics.ssim(samples, reference, 255).mean()),
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ogdm_jax evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--samples", required=True, nargs="+", metavar="X", help="npz, folder or zip of images"
    )
    parser.add_argument(
        "--reference",
        required=True,
        metavar="Y",
        help="images, a source name, or mu and sigma (npz)",
    )
    parser.add_argument(
        "--features",
        default="auto",
        metavar="SPACE",
        help="auto, a labelled source, lite0, inception",
    )
    parser.add_argument(
        "--weights", help="inception: the weights file (without it, a message says where it is)"
    )
    parser.add_argument(
        "--route", default="tf", help="inception: tf (EDM, original FID) or pytorch_fid"
    )
    parser.add_argument(
        "--size", type=int, default=96, help="lite0: pixels a side that images are resized to"
    )
    parser.add_argument("--num", type=int, help="take a random subset of so many samples")
    parser.add_argument(
        "--k", type=int, default=5, help="neighbours of precision, recall, density, coverage"
    )
    parser.add_argument("--seed", type=int, default=0, help="of subsets and splits")
    parser.add_argument("--data_dir", help="folder of prepared tfds sets")
    parser.add_argument(
        "--paired", action="store_true", help="also PSNR and SSIM, image i against image i"
    )
    parser.add_argument(
        "--save_statistics", metavar="FILE.npz", help="write mu and sigma of the (last) samples"
    )
    parser.add_argument("--out", metavar="FILE.json", help="also write the JSON here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in ("protocol", "report"):
        from ogdm_jax.cli import (
            evaluation as commands,  # only here: scoring files needs nothing of training
        )

        return commands.main(words)
    args = parse(argv)
    with startup.one_sentence():
        startup.prepare()
        for option, file in (("--out", args.out), ("--save_statistics", args.save_statistics)):
            if file:
                places.writable(places.place(file, option), option, file=True)
        sets = [open_source(source_name(word), args.data_dir) for word in args.samples]
        shape = sets[0].shape
        if any(other.shape != shape for other in sets):
            raise ValueError(
                f"--samples: shapes {[other.shape for other in sets]}; expected one shape"
            )
        reference = _open_reference(args.reference, args.data_dir, shape)
        space = _space(args, reference, shape)
        against, pictures = reference, None
        if not isinstance(reference, Statistics):
            pictures = reference.take(np.arange(len(reference)))["image"]
            against = space(pictures)
        results = []
        for word, source in zip(args.samples, sets, strict=True):
            samples = _images(source, args.num, args.seed)
            result = {"samples": word, "reference": args.reference} | score(
                samples, space, against, args
            )
            result |= weights_of(space)
            if args.paired:
                if pictures is None:
                    raise ValueError("--paired: the reference is mu and sigma; expected images")
                result |= paired(samples["image"], pictures)
            results.append(result)
        print_json(results[0] if len(results) == 1 else protocol.smallest(space, results), args.out)


if __name__ == "__main__":
    sys.exit(main())
