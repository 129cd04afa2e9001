"""Looks at image sets and prepares them.

ogdm data describe SOURCE                       size, classes, mean, std, sigma_data to set
ogdm data check SOURCE                          reads every image: what is bad, odd or left out
ogdm data prepare SOURCE --out DIR|FILE.zip     array_record, or EDM's zip
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ogdm_jax import places, records, startup
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.data import SourceError, open_source
from ogdm_jax.data.check import check, in_words
from ogdm_jax.data.describe import describe
from ogdm_jax.data.prepare import prepare
from ogdm_jax.data.sources import KINDS

_COMMANDS = {
    "describe": "print number, size, classes, mean, std and the suggested sigma_data",
    "check": "read every image; list what is bad, odd or left out; exit code 1 where any is bad",
    "prepare": "write a set as array_record (read without TensorFlow) or as EDM's zip; the same "
    "command continues unfinished work",
}


def _text(facts: dict[str, Any]) -> str:
    """The figures of `describe` as lines to read."""

    def numbers(values: Iterable[float]) -> str:
        return "  ".join(f"{value:.4f}" for value in values)

    names = facts["class_names"] or [str(i) for i in range(len(facts["class_counts"]))]
    counts = ", ".join(f"{name}: {n}" for name, n in list(zip(names, facts["class_counts"]))[:20])
    more = ", ..." if len(names) > 20 else ""
    partly = (
        ""
        if facts["measured"] == facts["images"]
        else f" (measured on {facts['measured']} of them)"
    )
    low, high = facts["range"]
    dark = "   nearly black: are these numbers of another range?" if high < 64 else ""
    flat = "   all images are of one colour" if low == high else "   suggested"
    return "\n".join(
        [
            f"source      {facts['name']}",
            f"images      {facts['images']}{partly}",
            f"size        {facts['width']} x {facts['height']}, {facts['channels']} channel(s)",
            f"classes     {facts['classes']}" + (f"  ({counts}{more})" if counts else ""),
            f"values      {low} to {high} of 0 to 255{dark}",
            f"mean        {numbers(facts['mean'])}   in [-1, 1], per channel",
            f"std         {numbers(facts['std'])}",
            f"sigma_data  {facts['sigma_data']:.2f}{flat}",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("data", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, prog="ogdm data")
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add = command.add_argument
        add("source", metavar="SOURCE", help=", ".join(KINDS).replace("%", "%%"))
        add("--data-dir", help="folder of prepared tfds sets, and of relative paths")
        add(
            "--resolution",
            type=whole(1, 8192),
            help="centre-crop and resize to this many pixels a side",
        )
        add("--channels", type=whole(1, 3), help="3 turns grey images of a mixed set into RGB")
        if name != "prepare":
            add("--json", action="store_true", help="print JSON")
        else:
            add("--out", required=True, metavar="DIR|FILE.zip", help="what to write")
            add("--name", help="name of the tfds set in DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    how = args.data_dir, args.resolution, args.channels
    try:
        if args.command == "check":
            report = check(args.source, *how)
            print(records.dumps(report) if args.json else in_words(report))
            return 1 if report["bad"] else 0
        if args.command == "describe":
            facts = describe(open_source(args.source, *how))
            print(records.dumps(facts) if args.json else _text(facts))
            return 0
        out = places.place(args.out, "--out")
        places.writable(out, "--out", file=out.suffix == ".zip")
        # It passes over the set once: there is no use in holding it in memory first.
        source = open_source(args.source, *how, memory_limit=0)
        name = prepare(source, args.out, args.name)
        where = f", data_dir {args.out}" if name.startswith("tfds:") else ""
        print(f"wrote {len(source)} images; open them as {name}{where}")
    except (SourceError, places.PlaceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        error.filename = error.filename or getattr(args, "out", None)
        print(f"error: {startup.sentence_of(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
