"""Writes a configuration for an image set of yours: resolution, network, batch, sigma_data.

ogdm new --data folder:DIR --out configs/mine.py

It is a start, with a reason on each line: read it, change it, then train.
"""

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from ogdm_jax import config as configs
from ogdm_jax import places, startup
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.data import propose
from ogdm_jax.data.describe import describe
from ogdm_jax.data.sources import KINDS, source_name
from ogdm_jax.planning import chips


def devices_here() -> propose.Devices:
    """What the proposals are for: the devices of this process."""
    chip, devices = chips.here()
    if devices[0].platform == "cpu":
        return propose.Devices()
    return propose.Devices(len(devices), True, chips.memory(chip, devices))


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
    with startup.command():
        _write(args)


def _write(args: argparse.Namespace) -> None:
    out, file = places.place(args.out, "--out"), shlex.quote(args.out)
    if out.suffix != ".py" or out.exists():
        state = "is there already" if out.exists() else "is no Python file"
        raise configs.ConfigError(f"--out: {args.out!r} {state}; expected a new FILE.py")
    places.writable(out, "--out", file=True)
    devices, name = devices_here(), source_name(args.data)
    source, why = propose.opened(name, None, args.resolution, args.channels, devices)
    found = propose.settings(source, describe(source), why, devices)
    if args.channels:
        found["data.channels"] = (args.channels, "as asked for")
    configs.replace(configs.Config(), {key: value for key, (value, _) in found.items()})
    with places.written(out) as new:
        new.write_text(propose.as_file(found, file))
    run, sheet = shlex.quote(f"runs/{out.stem}"), shlex.quote(f"{out.stem}.png")
    about = f"--image-shape {','.join(map(str, source.shape))} --classes {source.num_classes}"
    print(
        f"{lines(found)}\nwrote {args.out}; then:\n"
        f"ogdm train --config {file}\nogdm sample --workdir {run} --out {sheet}\n"
        f"what it will need: ogdm plan --config {file} {about} --images {len(source)}"
    )
