"""What the commands that measure have in common: options, the feature space, the trained model."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ogdm_jax import parallel, places, records
from ogdm_jax.cli.parsing import step, whole
from ogdm_jax.config import ConfigError, Sample, replace
from ogdm_jax.config.groups import Evaluate
from ogdm_jax.data import Source, SourceError, open_source
from ogdm_jax.data.sources import source_name
from ogdm_jax.metrics.features import FeatureSpace, feature_space
from ogdm_jax.metrics.networks import NetworkFeatures
from ogdm_jax.metrics.statistics import Statistics
from ogdm_jax.metrics.trained import TrainedFeatures
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling.sampler import ChurnRule
from ogdm_jax.training import workdir
from ogdm_jax.training.evaluate import Draw, conditions
from ogdm_jax.training.workdir import TrainedModel

MOST = 5000  # samples of each distance, unless --num says otherwise
DEFAULTS = Evaluate()
AT_A_TIME = "images per device at a time (default: 256, fewer of large pictures)"
OF_TEXTS = (
    "expected another one: draw those by ogdm sample --prompts FILE --out samples.npz, and measure "
    "them by ogdm evaluate --samples samples.npz --reference IMAGES"
)


def add_space_options(parser: argparse.ArgumentParser, default: str) -> None:
    """The options that choose a feature space.

    Args:
      parser: of a command.
      default: what --features is without the option, in words.
    """
    add = parser.add_argument_group("feature space").add_argument
    words = f"auto (the reference's labels), a labelled source, lite0, inception ({default})"
    add("--features", default="", metavar="SPACE", help=words)
    add("--weights", default="", metavar="FILE", help="inception: the weights file")
    add("--route", default="tf", help="inception: tf (EDM, original FID) or pytorch_fid")
    add(
        "--size",
        type=whole(8, 4096),
        default=96,
        help="lite0: pixels a side that images are resized to",
    )
    add("--resize", action="store_true", help="crop and resize the reference to the samples' size")
    add("--data-dir", default="", metavar="DIR", help="folder of prepared tfds sets")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose a trained model, its data and its devices."""
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="training folder")
    add(
        "--step",
        type=step,
        default=None,
        help="checkpoint: a number, or best (default: the newest)",
    )
    add(
        "--vae", default="", metavar="FILE", help="decodes a model of latents (default: its data's)"
    )
    add("--batch", type=whole(1), help=AT_A_TIME)
    add("--devices", type=whole(0), default=0, help="0 = all")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. An option of the older spelling ends the program with the newer one."""
    for word in sys.argv[1:] if argv is None else argv:
        option = word.partition("=")[0]
        if option.startswith("--") and "_" in option:
            parser.error(f"unknown option {option}; expected {option.replace('_', '-')}")
    args = parser.parse_args(argv)
    args.resized = {}
    return args


def open_space(
    args: argparse.Namespace,
    reference: Source | Statistics,
    shape: tuple[int, int, int],
    settings: Evaluate = DEFAULTS,
) -> TrainedFeatures | NetworkFeatures:
    """The feature space that --features names.

    Args:
      args: with the options of `add_space_options`.
      reference: on whose labels "auto" trains a classifier.
      shape: of the images.
      settings: what --features and --weights are without these options.

    Raises:
      ValueError: "auto" without images, or a space that cannot be opened.
    """
    name = args.features or settings.features or "auto"
    for option, given, owner in (
        ("--weights", args.weights, "inception"),
        ("--route", args.route != "tf", "inception"),
        ("--size", args.size != 96, "lite0"),
    ):
        if given and name != owner:
            raise ConfigError(
                f"{option}: given, but the feature space is {name}; expected --features {owner}"
            )
    if name in ("lite0", "inception"):
        weights = args.weights or settings.weights or None
        return feature_space(name, weights, args.route, args.size)
    if name != "auto":
        return feature_space(open_images("--features", name, args, shape))
    if isinstance(reference, Statistics):
        raise ValueError(
            "--features: auto given with published statistics; expected inception, lite0 or a "
            "source"
        )
    return feature_space(reference)


def open_images(
    option: str,
    word: str,
    args: argparse.Namespace,
    shape: tuple[int, int, int],
    data_dir: str | None = None,
) -> Source:
    """A source in the shape of other images.

    One of another shape is cropped and resized with --resize only; `resized` says of it.

    Raises:
      ValueError: another shape without --resize, or one that it cannot have.
    """
    name, data_dir = source_name(word), args.data_dir or data_dir or None
    remedy = "give --resize to crop and resize them, and to have it said in the JSON"
    try:
        source = open_source(name, data_dir)
        found = _size(source.shape)
    except SourceError as error:
        reason, several, _ = str(error).partition("; crop and resize them")
        if several and not args.resize:
            raise SourceError(f"{option}: {reason}; {remedy}") from None
        if not args.resize:
            raise
        source, found = None, "several sizes"
    if source is not None and source.shape == shape:
        return source
    if args.resize:
        source = open_source(name, data_dir, shape[0], shape[2])
        if source.shape == shape:
            args.resized[option] = f"{word}: {found} to {_size(shape)}"
            return source
        remedy = "--resize makes squares only"
    raise ValueError(
        f"{option}: {word} has images of {found}, the samples {_size(shape)} (height, width, "
        f"channels); expected one shape; {remedy}"
    )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def resized(args: argparse.Namespace) -> dict[str, Any]:
    """What `open_images` resized, for the JSON; {} where it did not."""
    return {"resized": args.resized} if args.resized else {}


def open_model(args: argparse.Namespace) -> TrainedModel:
    """The model of --workdir at --step. Raises ConfigError for one of texts, which has no sampler
    without them.
    """
    trained = workdir.open_workdir(args.workdir, args.step, vae=args.vae)
    if trained.tokenizer is not None:
        raise ConfigError(f"--workdir: '{args.workdir}' makes pictures of texts; {OF_TEXTS}")
    return trained


def open_model_space(
    args: argparse.Namespace, trained: TrainedModel, reference: Source | Statistics
) -> FeatureSpace:
    """The feature space that --features names, or that the model's configuration does."""
    return open_space(args, reference, trained.model.picture_shape, trained.config.evaluate)


def open_model_data(args: argparse.Namespace, trained: TrainedModel) -> Source:
    """The source that --reference names, in the model's size, or the one that was trained on."""
    config = trained.config
    if args.data_dir:
        config = replace(config, {"data.data_dir": args.data_dir})
    if not args.reference:
        return workdir.open_pixels(config, args.vae)
    shape = trained.model.picture_shape
    return open_images("--reference", args.reference, args, shape, config.data.data_dir)


def drawing(
    args: argparse.Namespace,
    trained: TrainedModel,
    churn: ChurnRule | None = None,
    reference: Source | None = None,
) -> Draw:
    """A function (settings, seeds, title, counts=None) -> batches of uint8 images, with a progress
    bar; counts as in `TrainedModel.batches`.

    Args:
      args: with the options of `add_model_options`.
      trained: the model.
      churn: EDM's stochasticity, see `sampling.sample`.
      reference: the images that samples are compared with, whose labels they have
        (`training.evaluate.conditions`); None: classes are uniform.

    Raises:
      ConfigError: there are not so many --devices.
    """
    how = {"batch": args.batch, "devices": parallel.make_plan("mesh", args.devices).local_devices}

    def draw(
        settings: Sample, seeds: Sequence[int], title: str, counts: list[np.ndarray] | None = None
    ) -> Iterator[np.ndarray]:
        drawn, labels = 0, None
        if reference is not None:
            labels = conditions(reference, trained.model, seeds, trained.class_names)
        with tqdm(total=len(seeds), unit="image", desc=title, disable=None) as bar:
            words = {"labels": labels, "churn": churn, "counts": counts}
            for part in trained.batches(settings, seeds, **words, **how):
                bad = np.flatnonzero(~np.isfinite(part).all(axis=(1, 2, 3)))
                if len(bad):
                    raise ConfigError(
                        f"--workdir: the image of seed {seeds[drawn + bad[0]]} (and of "
                        f"{len(bad) - 1} more in its batch) holds NaN or infinity; expected a "
                        "model that draws finite images: try another --step"
                    )
                yield to_uint8(part)
                drawn += len(part)
                bar.update(len(part))

    return draw


def add_tolerance_options(parser: argparse.ArgumentParser) -> None:
    """The options of the solver that chooses its steps."""
    for name, what in (("rtol", "relative"), ("atol", "absolute")):
        about = f"dopri5: {what} tolerance of an image (default: the configuration's, 1e-5)"
        parser.add_argument(f"--{name}", type=float, default=None, help=about)


def print_json(result: dict[str, Any], out: str | None) -> None:
    """Prints a result and, where a file is named, writes it there, too."""
    if out:
        records.write(places.place(out, "--out"), result, indent=1)
    print(records.dumps(result, indent=1))
