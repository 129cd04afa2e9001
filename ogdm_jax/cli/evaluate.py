"""Scores samples and prints one JSON object. Samples are an npz, a folder or a zip of images;
several are scored one by one, with the minimum (EDM's protocol: three sets of 50,000 images from
seeds 0-49999, 50000-99999 and 100000-149999). The reference is the same, any source name of the
data package, or an npz of published mu and sigma.

    ogdm evaluate --samples samples.npz --reference digits
    ogdm evaluate --samples a.npz b.npz c.npz --reference STATISTICS.npz
        --features inception --weights FILE
    ogdm evaluate protocol --workdir DIR          (see protocol --help)
    ogdm evaluate --likelihood --workdir DIR      (see --likelihood --help)
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence

import numpy as np

from ogdm_jax import places, startup
from ogdm_jax.cli import likelihood, measuring
from ogdm_jax.cli import protocol as protocol_command
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.data import Source, open_source
from ogdm_jax.data.sources import source_name
from ogdm_jax.metrics import protocol
from ogdm_jax.metrics.features import weights_of
from ogdm_jax.metrics.statistics import (
    Statistics,
    is_statistics,
    load_statistics,
    save_statistics,
    trained_on,
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = parser_of("evaluate", __doc__)
    add = parser.add_argument
    add("--samples", required=True, nargs="+", metavar="X", help="npz, folder or zip of images")
    images = "images, a source name, or mu and sigma (npz)"
    add("--reference", required=True, metavar="Y", help=images)
    add("--num", type=whole(1), help="take a random subset of so many samples")
    add("--k", type=whole(1), default=5, help="neighbours of precision, recall, density, coverage")
    add("--seed", type=whole(0), default=0, help="of subsets and splits")
    add("--paired", action="store_true", help="also PSNR and SSIM, image i against image i")
    moments = "write mu and sigma of the (last) samples"
    add("--save-statistics", default="", metavar="FILE.npz", help=moments)
    add("--out", default="", metavar="FILE.json", help="also write the JSON here")
    measuring.add_space_options(parser, "default: auto")
    return measuring.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    words = sys.argv[1:] if argv is None else argv
    if list(words[:1]) == ["protocol"]:
        return protocol_command.main(words[1:])
    if "--likelihood" in words:
        return likelihood.main(words)
    args = parse(argv)
    with startup.command():
        for option, file in (("--out", args.out), ("--save-statistics", args.save_statistics)):
            if file:
                places.writable(places.place(file, option), option, file=True)
        sets = [open_source(source_name(word), args.data_dir or None) for word in args.samples]
        shape = sets[0].shape
        if any(other.shape != shape for other in sets):
            shapes = [other.shape for other in sets]
            raise ValueError(f"--samples: shapes {shapes}; expected one shape")
        rows = [_rows(source, args.num, args.seed) for source in sets]
        reference = _open_reference(args, shape)
        if args.paired:
            _check_pairs(args, sets, reference)
        space = measuring.open_space(args, reference, shape)
        if isinstance(reference, Statistics):
            reference.require(space, "--reference")
            real, against = None, reference
        else:
            real = reference.take(np.arange(len(reference)))["image"]
            against = space(real)
        results, seen = [], {}
        for word, source, chosen in zip(args.samples, sets, rows, strict=True):
            samples = source.take(chosen)
            result, moments = protocol.score_set(
                space, samples, against, args.k, args.seed, source.class_names
            )
            if args.save_statistics:
                of = space.name, trained_on(space)
                save_statistics(args.save_statistics, moments, *of)
            if args.paired and real is not None:
                result |= protocol.paired(samples["image"], real)
            content = hashlib.sha256(samples["image"].tobytes()).digest()
            if content in seen:
                result["same_images_as"] = seen[content]
            seen.setdefault(content, word)
            result |= protocol.repeats(samples["image"], real) | weights_of(space)
            names = {"samples": word, "reference": args.reference}
            results.append(names | result | measuring.resized(args))
        measuring.print_json(
            results[0] if len(results) == 1 else protocol.smallest(space, results), args.out
        )
    return 0


def _check_pairs(
    args: argparse.Namespace, sets: Sequence[Source], reference: Source | Statistics
) -> None:
    """Raises ValueError where image i of the samples has no image i of the reference."""
    if isinstance(reference, Statistics):
        raise ValueError("--paired: the reference is mu and sigma; expected images")
    if args.num is not None:
        raise ValueError(
            f"--num: {args.num} given with --paired, which compares image i with image i; expected "
            "one of them"
        )
    for word, source in zip(args.samples, sets, strict=True):
        if len(source) != len(reference):
            raise ValueError(
                f"--paired: {word} has {len(source)} images, {args.reference} {len(reference)}; "
                "expected as many"
            )


def _rows(source: Source, num: int | None, seed: int) -> np.ndarray:
    """Indices of all images of a source, or of a random subset of num."""
    rows = np.arange(len(source))
    if num is not None:
        if not 1 <= num <= len(source):
            raise ValueError(f"--num: {num} given; {source.name} has {len(source)} images")
        rows = np.sort(np.random.default_rng(seed).choice(len(source), num, replace=False))
    return rows


def _open_reference(args: argparse.Namespace, shape: tuple[int, int, int]) -> Source | Statistics:
    """Moments, or a source in the size of the samples."""
    word = args.reference
    if word.endswith(".npz") and is_statistics(word):
        return load_statistics(word)
    return measuring.open_images("--reference", word, args, shape)
