"""Makes models of averages of any length from the snapshots of a run (post-hoc EMA, 2312.02696).

    ogdm train --workdir DIR --config.ema.stds=0.05,0.1        keeps the snapshots
    ogdm ema --workdir DIR --std 0.1                           writes DIR/ema-0.1
    ogdm ema --workdir DIR --std 0.03,0.075,0.15 --step 20000 --out OUT
    ogdm sample --workdir DIR/ema-0.1

A std is the width of the average relative to the length of the training so far: 0.1 looks back over
about its last tenth. Each becomes a training folder OUT/ema-STD with one checkpoint, which sample,
evaluate, export and report open. In Python: open_workdir(DIR, ema_std=0.1).
"""

import argparse
from collections.abc import Sequence

import jax

from ogdm_jax import config as configs
from ogdm_jax import models, places, startup
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.training import checkpoint, convert, resume, snapshots, steps


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the models; exits with 1 after one sentence on bad input."""
    parser = parser_of("ema", __doc__)
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="training folder with snapshots")
    add("--std", required=True, metavar="STD,...", help="relative widths, such as 0.1")
    add(
        "--step",
        type=whole(1),
        default=None,
        help="where the averages end: a step with a snapshot (default: the last)",
    )
    add("--out", default="", metavar="OUT", help="folder of the models' (default: DIR)")
    args = parser.parse_args(argv)
    with startup.command():
        _write(args, _widths(args.std))


def _widths(text: str) -> dict[str, float]:
    """{word: width}. Raises ConfigError where a word is no number."""
    try:
        found = {f"{float(word):g}": float(word) for word in text.split(",") if word.strip()}
    except ValueError:
        found = {}
    configs.require(bool(found), "--std", text, "numbers such as 0.05,0.1")
    return found


def _write(args: argparse.Namespace, widths: dict[str, float]) -> None:
    out = places.workdir(args.out or args.workdir, "--out" if args.out else "--workdir")
    for word in widths:
        if steps.present(out / f"ema-{word}"):
            raise configs.ConfigError(
                f"--out: {str(out / f'ema-{word}')!r} already holds checkpoints; expected another "
                "--out, or that folder removed"
            )
    found = checkpoint.find(args.workdir)
    places.writable(out, "--out" if args.out else "--workdir")
    model = models.build(found.config, found.image_shape, found.num_classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params, buffers = checkpoint.load_weights(found, *shapes)
    tracked, stds = found.config.ema.stds, list(widths.values())
    averages, step, errors = snapshots.reconstruct(
        args.workdir, tracked, stds, params, args.step, "--workdir"
    )
    number = sum(one <= step for one in snapshots.present(args.workdir))
    config = configs.replace(found.config, {"ema.stds": ()})
    about = checkpoint.describe(config, found.image_shape, found.num_classes, found.data_set)
    for word, average, error in zip(widths, averages, errors):
        folder = out / f"ema-{word}"
        variables = {"params": average, "buffers": buffers}
        convert.write_folder(folder, config, variables, about, step)
        origin = {"source": str(args.workdir), "std": widths[word], "snapshots": number}
        resume.note(folder, step, "ema", **origin, error=float(error))
        print(
            f"wrote {folder}: std {word} at step {step}, from {number} snapshots of "
            f"{', '.join(map(str, tracked))}; its profile is met to {100 * error:.2g} %"
        )
