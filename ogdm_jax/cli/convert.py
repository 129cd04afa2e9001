"""Makes a training folder of a checkpoint of another program; runs nothing of the file.

    ogdm convert network-snapshot.pkl --out WORKDIR
    ogdm train --config.init.workdir=WORKDIR --workdir NEW ...       fine-tune: convert prints it
    ogdm sample --workdir WORKDIR

FILE: .pt, .pth, .pkl (EDM's network-snapshot), .npz or .safetensors (also a folder of its shards),
with a denoiser of EDM's, OpenAI's, score_sde's or DiT's code. Averaged weights come first, wherever
they lie; what was taken is printed, and what else there is, which --entry picks. What tensors hide
of unpublished OpenAI U-Nets: --set img_resolution=64 --set num_heads=1 (or head_channels=64) and,
where they are so, --set qkv_order=new --set schedule=cosine. A DiT's latents are decoded by an
autoencoder: --config configs/imagenet256_dit.py --config.data.vae=FILE.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from ogdm_jax import config as configs
from ogdm_jax import places, startup
from ogdm_jax.cli import show
from ogdm_jax.cli.parsing import parser_of
from ogdm_jax.training import convert, steps

# the tensors do not say these
_KEPT = ("network.dropout", "precondition.schedule", "sample.grid", "sample.solver")
_KEPT += ("noise.distribution", "noise.mean", "noise.std")
_KEPT += ("sample.sigma_min", "sample.sigma_max")
# others are read of the file or by --set
_HOW = {"precondition.sigma_data": " (--set sigma_data=... says so of the file)"}


def main(argv: Sequence[str] | None = None) -> None:
    """Converts a file; exits with 1 after one sentence on bad input."""
    parser = parser_of("convert", __doc__)
    show.add_arguments(parser)
    parser.add_argument("--out", required=True, help="new training folder")
    parser.add_argument(
        "--config",
        default=str(configs.SHIPPED / "base.py"),
        help="settings beside the network's (default: configs/base.py)",
    )
    args, rest = parser.parse_known_args(argv)
    with startup.command():
        _convert(args, startup.split_overrides(rest))


def _convert(args: argparse.Namespace, overrides: list[str]) -> None:
    out = places.workdir(args.out, "--out")
    if steps.present(out):
        raise ValueError(f"--out: {args.out!r} already holds checkpoints; expected a new folder")
    places.writable(out, "--out")
    found = show.load(args)
    convert.check_denoiser(found, args.source)
    config = configs.load(args.config, overrides)
    defaults = configs.flatten(configs.load(args.config, ()))
    typed = {text.partition("=")[0] for text in overrides}
    told = convert.settings_of(found, config)
    kept = typed.intersection(_KEPT)
    flat = configs.flatten(config)
    for key in typed.intersection(told) - kept:
        need = f"{_text(told[key])}, as {args.source} has, or nothing{_HOW.get(key, '')}"
        configs.require(flat[key] == told[key], key, flat[key], need)
    if config.data.source == configs.Config().data.source and "data.source" not in typed:
        told |= convert.data_of(found)  # the settings are of no particular images yet
    config = configs.replace(config, {key: v for key, v in told.items() if key not in kept})
    count = convert.write(found, config, args.out, args.source)
    print(f"wrote {count:,} parameters to {args.out} (preconditioning: {config.precondition.kind})")
    print("\n".join(found.notes), end="\n" if found.notes else "")
    flat = configs.flatten(config)
    changed = [
        f"--config.{key}={_text(flat[key])}"
        for key in flat
        if flat[key] != defaults[key] and not key.startswith("init.")
    ]
    program = "python -m ogdm_jax" if sys.argv[0].endswith("__main__.py") else "ogdm"
    start = ["--config", _shortest(args.config), f"--config.init.workdir={args.out}"]
    words = [*start, *changed, "--workdir", f"{args.out.rstrip('/')}-tuned"]
    print(f"fine-tune: {program} train {shlex.join(words)}")
    print(f"sample:    {program} sample --workdir {shlex.quote(args.out)}")
    if flat["data.source"] == "folder:DIR":
        labels = found.network.label_dim
        classes = f" (a sub-folder for each of {labels} classes)" if labels else ""
        print(f"put the folder of your images in place of DIR{classes}")


def _shortest(path: str) -> str:
    """The name of a file as one would type it here."""
    near = os.path.relpath(path)
    return path if near.startswith("..") else near


def _text(value: Any) -> str:
    return str(value).replace(" ", "") if isinstance(value, tuple) else str(value)
