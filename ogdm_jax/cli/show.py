"""Says what a checkpoint of another program holds; runs nothing of it.

    ogdm show FILE               its network, its settings, and where they are known from
    ogdm show FILE --tensors     also one line per tensor

FILE: .pt, .pth, .pkl (EDM's network-snapshot), .npz or .safetensors, also a folder of its shards.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ogdm_jax import startup
from ogdm_jax.cli.parsing import parser_of
from ogdm_jax.interop import Pretrained, export, load_pretrained, pretrained, recognise
from ogdm_jax.interop.inert import quote
from ogdm_jax.interop.settings import PRECONDITIONS
from ogdm_jax.interop.torch_state import TorchFile, open_torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which network lies in a file; `ogdm convert` has them, too."""
    add = parser.add_argument
    add("source", metavar="FILE")
    add("--entry", default=None, help="way to the part to take, such as net, 4 or state.model")
    kinds = f"{', '.join(PRECONDITIONS)}, where the file does not say"
    add("--precondition", default=None, help=kinds)
    hidden = "a setting that the tensors do not tell, such as num_heads=1"
    add("--set", action="append", default=[], metavar="NAME=VALUE", help=hidden)
    add("--allow-nan", action="store_true", help="take weights that are not finite")


def load(args: argparse.Namespace, file: TorchFile | None = None) -> Pretrained:
    """The network of the command's FILE. file: what open_torch gave, if it was called already."""
    settings: dict[str, Any] = {}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: no value given; expected NAME=VALUE")
        try:
            settings[name] = json.loads(value)
        except (ValueError, RecursionError):
            settings[name] = value
        if isinstance(settings[name], list):
            settings[name] = tuple(settings[name])
    if args.precondition:
        settings["precondition"] = args.precondition
    told = {"entry": args.entry, "allow_nan": args.allow_nan}
    return load_pretrained(file or args.source, **told, **settings)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what a file holds; exits with 1 after one sentence on bad input."""
    parser = parser_of("show", __doc__)
    add_arguments(parser)
    parser.add_argument("--tensors", action="store_true", help="one line per tensor")
    args = parser.parse_args(argv)
    with startup.command():
        _show(args)


def _show(args: argparse.Namespace) -> None:
    file = open_torch(args.source)
    part, others = file.part(args.entry)
    state = file.arrays(part)
    numbers = sum(value.size for value in state.values())
    print(f"{args.source}: {len(state)} tensors, {numbers:,} numbers ({file.layout})")
    for note in pretrained.notes(file, part, others, state):
        print(note)
    if args.tensors:
        for name, value in state.items():
            print(f"  {quote(name)}  {value.dtype}  {list(value.shape)}")
    try:
        found = load(args, file)
    except recognise.UnrecognisedError as error:
        print(f"network: {error}")
        return
    print(f"network: {found.kind}, {type(found.network).__name__}")
    known = {
        "precondition": found.precondition,
        "sigma_data": found.sigma_data,
        "dropout in training": found.dropout,
    }
    known |= {"schedule": found.schedule} if found.precondition in ("adm", "v") else {}
    known |= found.process
    for name, value in (export.network_settings(found.network) | known).items():
        print(f"  {name}: {'not said by the file' if value is None and name in known else value}")
    told = export.read_about(file.path) or pretrained.describe(part)
    print(f"from the file itself: {', '.join(sorted(told)) or 'only names and shapes'}")
