"""Writes weights that other programs can read: under the authors' names, with a JSON file beside.

ogdm export WORKDIR --out FILE.safetensors (or FILE.pt; of a DiT also FOLDER, as diffusers has it)
"""

import argparse
import json
from collections.abc import Sequence

from etils import epath

from ogdm_jax import config as configs
from ogdm_jax import places, startup
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.config import require
from ogdm_jax.interop import diffusers, export
from ogdm_jax.interop.settings import PROCESS
from ogdm_jax.training import workdir


def main(argv: Sequence[str] | None = None) -> None:
    """Exports a training folder; exits with 1 after one sentence on bad input."""
    parser = parser_of("export", __doc__)
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("--out", required=True, help="FILE.safetensors, FILE.pt or FOLDER")
    parser.add_argument(
        "--step", type=whole(0), default=None, help="checkpoint (default: the newest)"
    )
    parser.add_argument("--weights", default="ema", help="ema or params")
    args = parser.parse_args(argv)
    with startup.one_sentence():
        startup.prepare()
        folder = places.place(args.out, "--out")
        if folder.suffix:
            export.check_out(args.out)
        else:
            places.writable(folder, "--out")
        run = workdir.open_workdir(args.workdir, args.step, args.weights)
        network, config = run.model.network, run.config.network
        if not folder.suffix:
            dit = "FILE.safetensors or FILE.pt; diffusers has no such network as a folder"
            require(config.kind == "dit", "network.kind", config.kind, dit)
            state = export.to_torch(network, {"params": run.params})
            path = diffusers.write(folder, network, state)
        else:
            path = _export(run, args)
    beside = export.about_path(path) if folder.suffix else folder / diffusers.CONFIG
    print(f"wrote {path} and {beside} ({args.weights})")


def _export(run: workdir.TrainedModel, args: argparse.Namespace) -> epath.Path:
    config, network = run.config, run.model.network
    variables = {"params": run.params, **({"buffers": run.buffers} if run.buffers else {})}
    settings = export.network_settings(network)
    settings.pop("dropout", None)  # it matters in training alone, and stands below
    kind = {"openai": "adm", "dit": "dit"}.get(config.network.kind, "edm")
    if kind == "edm":
        settings["model_type"] = type(network).__name__
    elif kind == "adm":  # as to_torch writes it; published networks of these sizes may be "new"
        settings["qkv_order"] = "legacy"
    chain = ("schedule", *PROCESS[:3])
    kinds = {"adm": chain[:-1], "v": chain, "flow": PROCESS[3:4]}
    kinds |= dict.fromkeys(("ve", "smld"), PROCESS[4:])
    told = kinds.get(config.precondition.kind, ())
    about = {
        "kind": kind,
        "settings": settings,
        "precondition": config.precondition.kind,
        **{name: getattr(config.precondition, name) for name in told},
        "sigma_data": config.precondition.sigma_data,
        "dropout": config.network.dropout,
        "step": run.step,
        "weights": args.weights,
        "config": json.loads(configs.to_json(config)),
    }
    return export.write(args.out, export.to_torch(network, variables), about)
