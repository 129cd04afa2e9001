"""Looks at image sets and prepares them.

ogdm data describe SOURCE                       size, classes, mean, std; settings that fit
ogdm data check SOURCE                          reads every image: what is bad, odd or left out
ogdm data prepare SOURCE --out DIR|FILE.zip     array_record, or EDM's zip
ogdm data encode SOURCE --vae FILE --out DIR    the latents of an autoencoder
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ogdm_jax import places, records, startup
from ogdm_jax.cli.new import devices_here, lines
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.config import ConfigError
from ogdm_jax.data import SourceError, open_source, propose
from ogdm_jax.data.check import check, in_words
from ogdm_jax.data.describe import describe
from ogdm_jax.data.encode import about_pixels, encode
from ogdm_jax.data.prepare import prepare
from ogdm_jax.data.sources import KINDS
from ogdm_jax.latents import Latents

_COMMANDS = {
    "describe": "print number, size, classes, mean, std, and what `ogdm new` would write",
    "check": "read every image; list what is bad, odd or left out; exit code 1 where any is bad",
    "prepare": "write a set as array_record (read without TensorFlow) or as EDM's zip; the same "
    "command continues unfinished work",
    "encode": "encode every image and its mirrored image, write mean and deviation of their "
    "latents; the same command continues unfinished work",
}


_MADE_OF = (("vae", "path"), ("pixels", "name"))


def _text(facts: dict[str, Any]) -> str:
    """The figures of `describe` as lines to read."""

    def numbers(values: Iterable[float]) -> str:
        return "  ".join(f"{value:.4f}" for value in values)

    names = facts["class_names"] or [str(i) for i in range(len(facts["class_counts"]))]
    counts = ", ".join(f"{name}: {n}" for name, n in list(zip(names, facts["class_counts"]))[:20])
    more = ", ..." if len(names) > 20 else ""
    partly = ", with captions" if facts.get("captions") else ""
    if facts["measured"] != facts["images"]:
        partly += f" (measured on {facts['measured']} of them)"
    low, high = facts["range"]
    latents: Any = facts.get("latents")
    dark = "   nearly black: are these numbers of another range?" if high < 64 else ""
    values = f"{low:.4g} to {high:.4g}, scaled" if latents else f"{low} to {high} of 0 to 255{dark}"
    where = "" if latents else "in [-1, 1], "
    flat = "   all images are of one colour" if low == high else "   suggested"
    return "\n".join(
        [
            f"source      {facts['name']}",
            f"images      {facts['images']}{partly}",
            f"size        {facts['width']} x {facts['height']}, {facts['channels']} channel(s)",
            f"classes     {facts['classes']}" + (f"  ({counts}{more})" if counts else ""),
            f"values      {values}",
            f"mean        {numbers(facts['mean'])}   {where}per channel",
            f"std         {numbers(facts['std'])}",
            f"sigma_data  {facts['sigma_data']:.2f}{flat}",
        ]
        + [f"latents     {_latents(latents)}" for _ in range(bool(latents))]
    )


def _latents(facts: dict[str, Any]) -> str:
    """What latents are, in words."""
    what = "mean and standard deviation" if facts["moments"] else "samples"
    views = " of each image and its mirrored one" if facts["views"] == 2 else ""
    scaled = "scaled" if facts["scaled"] else "not scaled yet"
    vae, pixels = (facts[name].get(key, "not known") for name, key in _MADE_OF)
    return (
        f"{what}{views}, {facts['dtype']}, {scaled}; scale {facts['scale']:g}, shift "
        f"{facts['shift']:g}; autoencoder: {vae}; pixels: {pixels}"
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
        if name == "encode":
            vae = "a file or a diffusers folder of AutoencoderKL"
            add("--vae", required=True, metavar="FILE|DIR", help=vae)
            add("--out", required=True, metavar="DIR", help="folder to write: latents:DIR")
            add("--batch", type=whole(1, 4096), default=16, help="images at a time (default: 16)")
        elif name != "prepare":
            add("--json", action="store_true", help="print JSON")
        else:
            add("--out", required=True, metavar="DIR|FILE.zip", help="what to write")
            add("--name", help="name of the tfds set in DIR")
    return parser


def _folder(args: argparse.Namespace) -> str | None:
    """Where the set's relative path starts from, for whoever opens it from another folder."""
    at_a_path = ("folder", "wds", "zip", "npz", "cifar10")
    if args.data_dir or args.source.partition(":")[0] not in at_a_path:
        return args.data_dir and str(places.absolute(places.place(args.data_dir)))
    return os.getcwd()


def _encode(args: argparse.Namespace) -> str:
    """Encodes a set; returns what was done, in words."""
    from ogdm_jax.interop.autoencoder import open_autoencoder  # JAX, which no other command needs

    startup.prepare()
    vae = open_autoencoder(args.vae)
    for note in vae.notes:
        print(f"{args.vae}: {note}", file=sys.stderr)
    network = vae.network
    how = {"data_dir": args.data_dir, "resolution": args.resolution}
    how["channels"] = args.channels or network.img_channels
    source = open_source(args.source, **how, memory_limit=0)
    height, width, channels = source.shape
    if source.latents is not None or (height % network.factor or width % network.factor):
        raise SourceError(
            f"{args.source}: {width} x {height}{' latents' if source.latents else ' pixels'}; "
            f"expected images with sides that {network.factor} divides, such as --resolution "
            f"{max(min(height, width) // network.factor, 1) * network.factor}"
        )
    if channels != network.img_channels:
        raise SourceError(
            f"{args.source}: {channels} channels given; {args.vae} encodes {network.img_channels}"
        )
    shape = (height // network.factor, width // network.factor, network.latent_channels)
    latents = Latents(
        shape,
        scale=network.scale,
        shift=network.shift,
        vae={"path": str(places.absolute(places.place(args.vae))), "sha256": vae.sha256},
        pixels=about_pixels(source, how | {"data_dir": _folder(args)}),
    )
    name = encode(source, args.out, vae.encode, latents, args.batch)
    return (
        f"wrote {len(source)} images and their mirrored ones as latents of "
        f"{'x'.join(map(str, shape))}; open them as {name}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    startup.print_lines()
    how = args.data_dir, args.resolution, args.channels
    try:
        if args.command == "check":
            report = check(args.source, *how)
            print(records.dumps(report) if args.json else in_words(report))
            return 1 if report["bad"] else 0
        if args.command == "describe":
            devices = devices_here()
            source, why = propose.opened(args.source, *how, devices)
            facts = describe(source)
            found = propose.settings(source, facts, why, devices)
            facts |= {"proposed": {k: v for k, (v, _) in found.items()}}
            text = f"{_text(facts)}\n\nproposed (`ogdm new` writes it as a file):\n{lines(found)}"
            print(records.dumps(facts) if args.json else text)
            return 0
        out = places.place(args.out, "--out")
        places.writable(out, "--out", file=out.suffix == ".zip")
        if args.command == "encode":
            print(_encode(args))
            return 0
        # It passes over the set once: there is no use in holding it in memory first.
        source = open_source(args.source, *how, memory_limit=0)
        name = prepare(source, args.out, args.name)
        where = f", data_dir {args.out}" if name.startswith("tfds:") else ""
        print(f"wrote {len(source)} images; open them as {name}{where}")
    except (SourceError, places.PlaceError, ConfigError) as error:
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
