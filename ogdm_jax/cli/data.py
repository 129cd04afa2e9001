"""python -m ogdm_jax data describe SOURCE | prepare SOURCE --out DIR|FILE.zip"""

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np

from ogdm_jax.data.pipeline import in_order
from ogdm_jax.data.sources import KINDS, Source, SourceError, open_source

SAMPLE = 20_000  # images that describe reads of a set that is not in memory


def describe(source: Source) -> dict:
    """What a training run needs to know of a set, measured on images in [-1, 1].

    Returns:
      name, images, height, width, channels, classes, class_names, class_counts (of the images
      read), measured (how many images were read), mean and std per channel, and sigma_data: the
      root of the mean of the channels' variances, the value at which EDM's preconditioning (arXiv
      2206.00364, table 1) gives the network inputs of unit variance.
    """
    height, width, channels = source.shape
    rows = None
    if not source.in_memory and len(source) > SAMPLE:
        rows = np.linspace(0, len(source) - 1, SAMPLE).astype(np.int64)
    count, total, square, labels = 0, np.zeros(channels), np.zeros(channels), []
    parts = (
        in_order(source, 512)
        if rows is None
        else (source.take(part) for part in np.array_split(rows, SAMPLE // 512))
    )
    for part in parts:
        pixels = part["image"].reshape(-1, channels).astype(np.float64)
        count, total, square = (
            count + len(part["image"]),
            total + pixels.sum(0),
            square + (pixels**2).sum(0),
        )
        labels.append(part["label"])
    mean = total / (count * height * width)
    variance = np.maximum(square / (count * height * width) - mean**2, 0.0)
    labels = np.concatenate(labels)
    known = labels[labels >= 0] if labels.ndim == 1 else labels[:0, 0].astype(int)
    return {
        "name": source.name,
        "images": len(source),
        "height": height,
        "width": width,
        "channels": channels,
        "classes": source.num_classes,
        "class_names": list(source.class_names),
        "class_counts": np.bincount(known, minlength=source.num_classes).tolist()
        if labels.ndim == 1
        else [],
        "measured": count,
        "mean": (mean / 127.5 - 1).tolist(),
        "std": (np.sqrt(variance) / 127.5).tolist(),
        "sigma_data": float(np.sqrt(variance.mean()) / 127.5),
    }


def _text(facts: dict) -> str:
    def numbers(values):
        return "  ".join(f"{value:.4f}" for value in values)

    names = facts["class_names"] or [str(i) for i in range(len(facts["class_counts"]))]
    counts = ", ".join(f"{name}: {n}" for name, n in list(zip(names, facts["class_counts"]))[:20])
    more = ", ..." if len(names) > 20 else ""
    partly = (
        ""
        if facts["measured"] == facts["images"]
        else f" (measured on {facts['measured']} of them)"
    )
    return "\n".join(
        [
            f"source      {facts['name']}",
            f"images      {facts['images']}{partly}",
            f"size        {facts['width']} x {facts['height']}, {facts['channels']} channel(s)",
            f"classes     {facts['classes']}" + (f"  ({counts}{more})" if counts else ""),
            f"mean        {numbers(facts['mean'])}   in [-1, 1], per channel",
            f"std         {numbers(facts['std'])}",
            f"sigma_data  {facts['sigma_data']:.2f}   suggested",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ogdm_jax data", description="Looks at image sets and prepares them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("describe", "print number, size, classes, mean, std and the suggested sigma_data"),
        (
            "prepare",
            "write a set as array_record (read without TensorFlow) or as EDM's zip; run again to "
            "continue",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", metavar="SOURCE", help=", ".join(KINDS).replace("%", "%%"))
        command.add_argument(
            "--data_dir", help="folder of prepared tfds sets, and of relative paths"
        )
        command.add_argument(
            "--resolution", type=int, help="centre-crop and resize to this many pixels a side"
        )
        command.add_argument(
            "--channels", type=int, help="3 turns grey images of a mixed set into RGB"
        )
        if name == "describe":
            command.add_argument("--json", action="store_true", help="print JSON")
        else:
            command.add_argument(
                "--out", required=True, metavar="DIR|FILE.zip", help="what to write"
            )
            command.add_argument("--name", help="name of the tfds set in DIR")
    args = parser.parse_args(argv)
    try:
        # prepare passes over the set once: there is no use in holding it in memory first.
        limit = {} if args.command == "describe" else {"memory_limit": 0}
        source = open_source(args.source, args.data_dir, args.resolution, args.channels, **limit)
        if args.command == "describe":
            facts = describe(source)
            print(json.dumps(facts) if args.json else _text(facts))
        else:
            from ogdm_jax.data.prepare import prepare

            name = prepare(source, args.out, args.name)
            where = f", data_dir {args.out}" if name.startswith("tfds:") else ""
            print(f"wrote {len(source)} images; open them as {name}{where}")
    except (SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
