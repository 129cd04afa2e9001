"""Measures the likelihood of real images by the probability-flow ODE (Song et al., arXiv
2011.13456) and prints one JSON object: bits a dimension of uniformly dequantised images of 256
levels, their mean and its standard error, and the network evaluations of an image. The images are
spread evenly over the data, those that were trained on unless --reference names others.

    ogdm evaluate --likelihood --workdir DIR --num 1000
    ogdm evaluate --likelihood --workdir DIR --reference tfds:cifar10/test --num 10000
        --out nll.json
    ogdm evaluate --likelihood --workdir DIR --guidance cfg --cfg.weight 1.5
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ogdm_jax import parallel, places, platforms, randomness, startup
from ogdm_jax.cli import guidance, measuring
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.config import ConfigError
from ogdm_jax.data import Source, spread
from ogdm_jax.diffusion import grids
from ogdm_jax.sampling import adaptive, generate, likelihood
from ogdm_jax.sampling.guidance import Guidance
from ogdm_jax.training.evaluate import evaluations_of
from ogdm_jax.training.workdir import TrainedModel
from ogdm_jax.typing import Array, PyTree


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = parser_of("evaluate", __doc__)
    measuring.add_model_options(parser)
    add = parser.add_argument
    add("--likelihood", action="store_true", required=True, help="this command")
    add("--reference", default="", metavar="Y", help="source of the images (default: the model's)")
    add("--resize", action="store_true", help="crop and resize --reference to the model's size")
    add("--data-dir", default="", metavar="DIR", help="folder of prepared tfds sets")
    add("--num", type=whole(1), default=1000, help="images, spread over the source")
    add("--seed", type=whole(0), default=0, help="of probes and dequantisation")
    add("--probes", type=whole(1), default=1, help="random vectors of an image's trace")
    kinds = ", ".join(likelihood.PROBES)
    add("--probe", default="rademacher", choices=likelihood.PROBES, metavar="KIND", help=kinds)
    known = ", ".join(adaptive.VARIABLES)
    about = f"what is integrated: {known} (default: vp or ve with that grid, else angle)"
    add("--variable", default="", choices=list(adaptive.VARIABLES), metavar="NAME", help=about)
    measuring.add_tolerance_options(parser)
    add("--out", default="", metavar="FILE.json", help="also write the JSON here")
    guidance.add_options(parser)
    args = measuring.parse(parser, argv)
    # What the sampler's words would be: guidance is built for a sampler.
    vars(args).update(seeds="", solver=adaptive.NAME, eta=None, churn="")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0."""
    args = parse(sys.argv[1:] if argv is None else argv)
    with startup.command():
        request = guidance.read(args)
        if request.task:
            raise ConfigError("--task: given with --likelihood; expected guidance without a task")
        if args.probe == "exact" and args.probes != 1:
            raise ConfigError("--probes: given with --probe exact, which has none; expected one")
        if args.out:
            places.writable(places.place(args.out, "--out"), "--out", file=True)
        trained = measuring.open_model(args)
        if trained.model.autoencoder is not None:
            raise ConfigError(
                f"--likelihood: {args.workdir} models latents, whose likelihood is not that of "
                "images; expected a model of pixels"
            )
        settings = trained.settings(solver=adaptive.NAME, rtol=args.rtol, atol=args.atol)
        source = measuring.open_model_data(args, trained)
        if args.num > len(source):
            raise ConfigError(f"--num: {args.num} given; {source.name} has {len(source)} images")
        classes = _model_classes(source, trained, args.num) if args.reference else None
        built = guidance.build(request, trained, settings, np.arange(args.num)).guidance
        low, high = grids.clip_range(trained.denoiser, settings.sigma_min, settings.sigma_max)
        control = adaptive.Control(
            settings.rtol, settings.atol, args.variable or adaptive.variable_of(settings.grid)
        )
        how = {"probe": args.probe, "probes": args.probes, "sigma_min": low, "sigma_max": high}
        about = {"workdir": str(args.workdir), "step": trained.step, "data": source.name}
        about |= {"guidance": ",".join(request.settings), "dequantisation": "uniform"}
        about |= how | control._asdict() | {"seed": args.seed}
        found = _measure(args, trained, source, classes, built, how | {"control": control})
        measuring.print_json(about | found | measuring.resized(args), args.out)
    return 0


def _model_classes(source: Source, trained: TrainedModel, num: int) -> np.ndarray | None:
    """[classes + 1] a conditional model's class of each class of a source, by name, with -1 behind;
    None where not both have names: then numbers are the same.

    Raises:
      ConfigError: the source has other classes, or so many of its images have none, which is fine
        where the model was trained on hidden ones.
    """
    here, there = trained.model.label_dim, source.num_classes
    if not here:
        return None
    field, number = f"--reference: {source.name!r}", None
    if source.class_names and trained.class_names:
        known = {name: k for k, name in enumerate(trained.class_names)}
        if other := [name for name in source.class_names if name not in known]:
            raise ConfigError(
                f"{field} has a class {other[0]!r}, the model has none of that name; expected "
                "images with the model's classes"
            )
        number = np.array([*(known[name] for name in source.class_names), -1], np.int32)
    elif there and there != here:
        raise ConfigError(
            f"{field} has {there} classes, the model {here}; expected images with the model's "
            "classes"
        )
    hidden = not there
    if source.labels is not None and not source.label_size:
        hidden = (source.labels[spread(len(source), num)] < 0).any()
    if hidden and not trained.config.data.label_dropout:
        raise ConfigError(
            f"{field} has images without a class, and the model was trained on none such "
            "(data.label_dropout 0); expected images with its classes"
        )
    return number


def _measure(
    args: argparse.Namespace,
    trained: TrainedModel,
    source: Source,
    classes: np.ndarray | None,
    methods: Sequence[Guidance],
    how: dict[str, Any],
) -> dict[str, Any]:
    """The likelihood of images that are spread over a source: means, and what they are worth."""
    devices = parallel.make_plan("mesh", args.devices).local_devices
    size = generate.batch_size(trained.model, args.num, len(devices), args.batch)
    whole, divided = generate.shardings(devices)

    def bits(
        weights: PyTree, images: Array, labels: Array | None, numbers: Array, constants: PyTree
    ) -> tuple[Array, Array]:
        run_key = randomness.seeded(args.seed)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(run_key, numbers)
        x0 = likelihood.dequantised(images, keys)
        guided = generate.bound(methods, constants, [None] * len(methods))
        denoise = trained.model.denoiser(*weights)
        found = likelihood.log_likelihood(denoise, x0, keys, labels, guided, **how)
        return found.bits, found.nfe

    compiled = jax.jit(
        platforms.traced_for(devices[0].platform, bits),
        in_shardings=(whole, divided, divided, divided, whole),
    )
    constants, weights = generate.arrays(methods)[0], (trained.params, trained.buffers)
    each, chosen = [], spread(len(source), args.num)
    with tqdm(total=args.num, unit="image", disable=None) as bar:
        for start in range(0, args.num, size):
            at = generate.batch_rows(start, size, args.num)
            rows = source.take(chosen[at])
            labels = rows["label"] if trained.model.label_dim else None
            labels = labels if classes is None else classes[labels]
            part = compiled(weights, rows["image"], labels, at.astype(np.uint32), constants)
            each.append(np.asarray(part)[:, : args.num - start])
            bar.update(each[-1].shape[1])
    values, counts = np.concatenate(each, axis=1).astype(np.float64)
    lost = int((~np.isfinite(values)).sum())
    error = values.std(ddof=1) / np.sqrt(args.num) if args.num > 1 else float("nan")
    found = {"bits_per_dim": float(values.mean()), "standard_error": float(error)}
    found |= {"images": args.num} | evaluations_of(counts)
    return found | ({"not_finite": lost} if lost else {})
