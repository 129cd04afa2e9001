"""Checkpoints in and out:

    python -m ogdm_jax interop show SRC                        what a PyTorch checkpoint holds; runs
    nothing of it python -m ogdm_jax interop convert SRC --out WORKDIR       a training folder for
    train.py and sample.py python -m ogdm_jax interop export WORKDIR --out FILE.safetensors
    weights under the authors' names, and FILE.json

SRC: .pt, .pth, .pkl (EDM's network-snapshot) or .safetensors, with a denoiser of EDM's or OpenAI's
code. What tensors hide of unpublished OpenAI U-Nets: --set img_resolution=64 --set num_heads=1 (or
head_channels=64) and, where they are so, --set qkv_order=new --set schedule=cosine. Fine-tune a
converted model with python train.py --config.init.workdir=WORKDIR --workdir NEW and the settings
that convert prints.
"""

import argparse
import json
import os
import pathlib
import shlex
from typing import Any

from ogdm_jax import config as configs
from ogdm_jax import places, startup

_BASE = pathlib.Path(__file__).resolve().parent.parent.parent / "configs" / "base.py"


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m ogdm_jax interop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="list a file's network, settings and tensors")
    show.add_argument("--tensors", action="store_true", help="one line per tensor")
    convert = commands.add_parser(
        "convert", help="make a training folder", epilog="--config.KEY=VALUE as in train.py"
    )
    convert.add_argument(
        "--config",
        default=str(_BASE),
        help="settings beside the network's (default: configs/base.py)",
    )
    for command in (show, convert):
        command.add_argument("source", metavar="SRC")
        command.add_argument(
            "--entry", default=None, help="part of a file that has several, such as net or disc"
        )
        command.add_argument(
            "--precondition",
            default=None,
            help="edm, vp, ve, iddpm or adm, where the file does not say",
        )
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a setting the tensors hide",
        )
    export = commands.add_parser("export", help="write weights that others can read")
    export.add_argument("source", metavar="WORKDIR")
    export.add_argument("--step", type=int, default=None, help="checkpoint (default: the newest)")
    export.add_argument("--weights", default="ema", help="ema or params")
    convert.add_argument("--out", required=True, help="new training folder")
    export.add_argument("--out", required=True, help="FILE.safetensors")
    return parser.parse_known_args()


def _load(args: argparse.Namespace, file: Any = None):
    """The Pretrained of the command's SRC. file: what open_torch gave, if it was called already."""
    from ogdm_jax.interop import load_pretrained

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
    return load_pretrained(file or args.source, entry=args.entry, **settings)


def show(args: argparse.Namespace) -> None:
    from ogdm_jax.interop import export, pretrained, recognise
    from ogdm_jax.interop.restricted_pickle import quote
    from ogdm_jax.interop.torch_state import open_torch, tensors

    file = open_torch(args.source)
    state = tensors(file, args.entry)
    numbers = sum(value.size for value in state.values())
    print(f"{args.source}: {len(state)} tensors, {numbers:,} numbers")
    if args.tensors:
        for name, value in state.items():
            print(f"  {quote(name)}  {value.dtype}  {list(value.shape)}")
    try:
        found = _load(args, file)
    except recognise.UnrecognisedError as error:
        print(f"network: {error}")
        return
    print(f"network: {found.kind}, {type(found.network).__name__}")
    known = {
        "precondition": found.precondition,
        "sigma_data": found.sigma_data,
        "dropout in training": found.dropout,
    }
    known |= {"schedule": found.schedule} if found.precondition == "adm" else {}
    for name, value in (export.network_settings(found.network) | known).items():
        print(f"  {name}: {'not said by the file' if value is None and name in known else value}")
    say = pretrained.describe(file, args.entry)
    print(f"from the file itself: {', '.join(sorted(say)) or 'only names and shapes'}")


def convert(args: argparse.Namespace, overrides: list[str]) -> None:
    import jax

    from ogdm_jax import models
    from ogdm_jax.interop import export
    from ogdm_jax.training import checkpoint, optim, state

    out = places.workdir(args.out, "--out")
    if (out / "checkpoints").exists():
        raise ValueError(f"--out: {args.out!r} already holds checkpoints; expected a new folder")
    places.writable(out, "--out")
    found = _load(args)
    network = found.network
    if found.kind not in ("edm", "adm"):
        raise ValueError(
            f"{args.source}: holds a network of kind {found.kind}; expected a denoiser (others: "
            "load_pretrained)"
        )
    if found.kind == "adm" and network.img_channels == 6:
        raise ValueError(
            f"{args.source}: enlarges small images, which it gets as 3 of its 6 channels; use "
            "load_pretrained"
        )
    config = configs.load(args.config, overrides)
    defaults = configs.flatten(config)
    given = {text.partition("=")[0] for text in overrides} & {
        "network.dropout",
        "precondition.schedule",
        "noise.law",
    }
    for key, value in _settings(found, config).items():
        group, name = key.split(".")
        if key not in given:  # what the user says and the tensors cannot
            config[group][name] = value
    shape = (network.img_resolution, network.img_resolution, network.img_channels)
    built = models.build(config, shape, network.label_dim)
    ours, theirs = export.network_settings(built.network), export.network_settings(network)
    differ = [
        f"{name} {theirs[name]}"
        for name in theirs
        if name != "dropout" and theirs[name] != ours.get(name)
    ]
    if differ:
        raise ValueError(
            f"{args.source}: no configuration describes its {', '.join(differ)}; use "
            "load_pretrained"
        )
    params, buffers = found.variables["params"], found.variables.get("buffers", {})
    tx, _ = optim.optimiser(config)
    empty = jax.tree.map(
        lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), jax.eval_shape(tx.init, params)
    )
    start = state.TrainState(jax.numpy.zeros((), "int32"), params, params, buffers, empty, {}, {})
    with checkpoint.Checkpoints(args.out) as folder:
        folder.save(0, start, checkpoint.describe(config, shape, network.label_dim), {"step": 0})
    count = models.parameter_count(params)
    print(f"wrote {count:,} parameters to {args.out} (preconditioning: {config.precondition.kind})")
    flat = configs.flatten(config)
    changed = [
        key
        for key in flat
        if key.startswith(("network.", "precondition.", "noise.", "data."))
        and flat[key] != defaults[key]
    ]
    flags = " ".join(shlex.quote(f"--config.{key}={_text(flat[key])}") for key in changed)
    start_here = f"--config {os.path.relpath(args.config)} --config.init.workdir={args.out}"
    print(f"fine-tune: python train.py {start_here} {flags} --workdir NEW")
    print(f"sample:    python sample.py --workdir {args.out}")


def _settings(found, config) -> dict[str, Any]:
    """What a configuration must say for model.build to make this network."""
    from ogdm_jax import models

    network, kind = found.network, found.precondition or "edm"
    owner = {"SongUNet": "song", "DhariwalUNet": "dhariwal", "ADMUNet": "openai"}[
        type(network).__name__
    ]
    settings = {
        "network.kind": owner,
        "precondition.kind": kind,
        "precondition.sigma_data": found.sigma_data,
        "data.conditional": network.label_dim > 0,
        "data.augment": (config.data.augment or 0.12) if network.augment_dim else 0.0,
    }
    fields = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions")
    for field in fields + models.ONLY.get(owner, ()):
        value = getattr(network, field)
        settings[f"network.{field}"] = tuple(value) if isinstance(value, tuple | list) else value
    if kind in ("vp", "ve"):
        settings["noise.law"] = kind
    if kind == "adm":
        settings |= {"noise.law": "ddpm", "precondition.schedule": found.schedule}
        settings["precondition.learned_variance"] = network.out_channels == 2 * network.img_channels
    if found.dropout is not None:
        settings["network.dropout"] = float(found.dropout)
    elif owner == "openai":
        settings["network.dropout"] = (
            0.0  # what most of them were trained with; the file does not say
        )
    return settings


def _text(value: Any) -> str:
    return str(value).replace(" ", "") if isinstance(value, tuple) else str(value)


def export_(args: argparse.Namespace) -> None:
    from ogdm_jax.interop import export
    from ogdm_jax.training.workdir import open_workdir

    run = open_workdir(args.source, args.step, args.weights)
    variables = {"params": run.params, **({"buffers": run.buffers} if run.buffers else {})}
    settings = export.network_settings(run.model.network)
    settings.pop(
        "dropout"
    )  # a matter of training; below, and 0 in the networks that load_pretrained makes
    discrete = run.config.precondition.kind == "adm"
    kind = "adm" if run.config.network.kind == "openai" else "edm"
    if kind == "edm":
        settings["model_type"] = type(run.model.network).__name__
    else:
        settings["qkv_order"] = (
            "legacy"  # as to_torch writes it; published networks of these sizes may be "new"
        )
    about = {
        "kind": kind,
        "settings": settings,
        "precondition": run.config.precondition.kind,
        **({"schedule": run.config.precondition.schedule} if discrete else {}),
        "sigma_data": run.config.precondition.sigma_data,
        "dropout": run.config.network.dropout,
        "step": run.step,
        "weights": args.weights,
        "config": json.loads(configs.to_json(run.config)),
    }
    path = export.write(args.out, export.to_torch(run.model.network, variables), about)
    print(f"wrote {path} and {export.about_path(path)} (step {run.step}, {args.weights})")


def main() -> None:
    args, rest = parse()
    with startup.one_sentence():
        if args.command != "export" and not places.local(args.source, args.command).is_file():
            raise ValueError(
                f"{args.source}: there is no such file; expected .pt, .pth, .pkl or .safetensors"
            )
        startup.prepare()
        overrides = startup.split_overrides(rest)
        if overrides and args.command != "convert":
            raise ValueError(
                f"--config.{overrides[0]}: only convert takes settings of a configuration"
            )
        if args.command == "convert":
            convert(args, overrides)
        else:
            {"show": show, "export": export_}[args.command](args)


if __name__ == "__main__":
    main()
