"""Writes a configuration for an image set of yours: resolution, network, batch, sigma_data.

ogdm new --data folder:DIR --out configs/mine.py

It is a start, with a reason on each line: read it, change it, then train.
"""

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

import jax

from ogdm_jax import config as configs
from ogdm_jax import places, startup
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.data import propose
from ogdm_jax.data.sources import KINDS, source_name
from ogdm_jax.planning import chips


def devices_here() -> propose.Devices:
    """What the proposals are for: the devices of this process."""
    chip, devices = chips.here()
    accelerators = devices[0].platform != "cpu"
    return propose.Devices(
        jax.device_count() if accelerators else 1,
        accelerators,
        chips.memory(chip, devices) if accelerators else None,
    )


def lines(found: dict[str, tuple[Any, str]]) -> str:
    """The proposed settings, one a line, each with its reason."""
    return "\n".join(f"{key:26} {value!s:12} {why}" for key, (value, why) in found.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the file; exits with 1 after one sentence on bad input."""
    parser = parser_of("new", __doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="SOURCE", help=", ".join(KINDS).replace("%", "%%"))
    add("--out", required=True, metavar="FILE.py", help="what to write; never replaced")
    add("--resolution", type=whole(8, 8192), help="pixels a side (default: proposed)")
    add("--channels", type=whole(1, 3), help="3 turns grey images of a mixed set into RGB")
    args = parser.parse_args(argv)
    with startup.one_sentence():
        startup.prepare()
        _write(args)


def _write(args: argparse.Namespace) -> None:
    out = places.place(args.out, "--out")
    if out.suffix != ".py" or out.exists():
        state = "is there already" if out.suffix == ".py" else "is no Python file"
        raise configs.ConfigError(f"--out: {args.out!r} {state}; expected a new FILE.py")
    places.writable(out, "--out", file=True)
    devices = devices_here()
    name = source_name(args.data)
    source, why = propose.opened(name, None, args.resolution, args.channels, devices)
    found = propose.settings(source, why, devices)
    if args.channels:
        found["data.channels"] = (args.channels, "as asked for")
    configs.replace(configs.Config(), {key: value for key, (value, _) in found.items()})
    with places.written(out) as new:
        new.write_text(propose.as_file(found, shlex.quote(args.out)))
    print(lines(found))
    run = shlex.quote(f"runs/{out.stem}")
    print(f"wrote {args.out}; then: python train.py --config {shlex.quote(args.out)}")
    shape, classes = ",".join(map(str, source.shape)), source.num_classes
    print(f"and: python sample.py --workdir {run} --out {shlex.quote(out.stem + '.png')}")
    print(
        f"what it will need: ogdm plan --config {shlex.quote(args.out)} --image-shape {shape} "
        f"--classes {classes} --images {len(source)}"
    )
