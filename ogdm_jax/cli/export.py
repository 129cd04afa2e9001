"""Writes weights that other programs can read: under the authors' names, with a JSON file beside.

ogdm export WORKDIR --out FILE.safetensors (or FILE.pt; of a DiT also FOLDER, as diffusers has it)
ogdm export WORKDIR --out FOLDER [--vae FILE]    of a model of texts: a StableDiffusionPipeline
ogdm export WORKDIR --out FOLDER --card --license apache-2.0

With --card a folder as hubs of models have it: model.safetensors, config.json, and a README.md with
a picture of samples, the data's fingerprint and the measured distances.
"""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from ogdm_jax import config as configs
from ogdm_jax import models, places, startup
from ogdm_jax.cli import card
from ogdm_jax.cli.parsing import parser_of, whole
from ogdm_jax.config import require
from ogdm_jax.interop import diffusers, export, stable_diffusion
from ogdm_jax.interop.settings import PROCESS
from ogdm_jax.training import checkpoint, workdir


def main(argv: Sequence[str] | None = None) -> None:
    """Exports a training folder; exits with 1 after one sentence on bad input."""
    parser = parser_of("export", __doc__)
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("--out", required=True, help="FILE.safetensors, FILE.pt or FOLDER")
    parser.add_argument(
        "--step", type=whole(0), default=None, help="checkpoint (default: the newest)"
    )
    parser.add_argument("--weights", default="ema", help="ema or params")
    parser.add_argument("--card", action="store_true", help="a FOLDER with a model card")
    words = "of the weights, as the card says it: apache-2.0, cc-by-4.0, ... (default: unknown)"
    parser.add_argument("--license", default="", metavar="NAME", help=words)
    words = "autoencoder of the card's samples, or of a pipeline (default: that of the data)"
    parser.add_argument("--vae", default="", metavar="FILE", help=words)
    args = parser.parse_args(argv)
    with startup.command():
        folder = places.place(args.out, "--out")
        _check_card(args, folder)
        if folder.suffix and not args.card:
            export.check_out(args.out)
        else:
            places.writable(folder, "--out")
        texts = checkpoint.find(args.workdir, args.step).config.network.kind == "sd"
        _check_texts(args, folder, texts)
        _check_free(args, folder, texts)
        vae = args.vae if args.card or texts else None
        run = workdir.open_workdir(args.workdir, args.step, args.weights, vae=vae)
        if texts:
            path = _export_texts(run, folder, args.workdir)
        elif args.card:
            path, beside = folder / card.WEIGHTS, folder / card.CONFIG
            export.write(path, _state(run), _about(run, args.weights), beside)
            averaged = args.weights == "ema"
            card.write(folder, run, args.workdir, args.license or "unknown", averaged)
        elif folder.suffix:
            path = export.write(folder, _state(run), _about(run, args.weights))
        else:
            path = _export_dit(run, folder, args.weights)
    beside = folder / card.PAGE if args.card else export.about_path(path)
    print(f"wrote {path} and {path.parent / 'unet' if texts else beside} ({args.weights})")


def _check_card(args: argparse.Namespace, folder: epath.Path) -> None:
    """Raises ValueError for words about a card that cannot be."""
    require(args.card or not args.license, "--license", args.license, "--card with it")
    plain = not args.license or re.fullmatch(r"[A-Za-z0-9.+_-]{1,60}", args.license)
    require(bool(plain), "--license", args.license, "an identifier such as apache-2.0")
    file = args.card and folder.suffix in export.SUFFIXES
    require(not file, "--out", args.out, "a FOLDER with --card")


def _check_texts(args: argparse.Namespace, folder: epath.Path, texts: bool) -> None:
    """Raises ValueError for words that a model of texts, or another one, does not take."""
    require(args.card or texts or not args.vae, "--vae", args.vae, "--card with it")
    if texts and (folder.suffix or args.card):
        raise ValueError(
            f"--out, --card: {args.out!r} given for a model of texts; expected a FOLDER, without "
            "--card: a pipeline of diffusers"
        )


def _check_free(args: argparse.Namespace, folder: epath.Path, texts: bool) -> None:
    """Raises ValueError where anything but an earlier export would be replaced."""
    if (folder / "checkpoints").exists():
        raise ValueError(f"--out: {args.out!r} is a training folder; expected another one")
    if texts:
        return export.check_free(stable_diffusion.written(folder), folder / stable_diffusion.INDEX)
    if args.card:
        return export.check_free([folder / name for name in card.FILES], folder / card.CONFIG)
    file = folder if folder.suffix else folder / diffusers.WEIGHTS
    files = [file, export.about_path(file), *([] if folder.suffix else [folder / diffusers.CONFIG])]
    return export.check_free(files, export.about_path(file))


def _export_texts(run: workdir.TrainedModel, folder: epath.Path, source: str) -> epath.Path:
    model, buffers = run.model, run.buffers
    networks = {
        "unet": (model.network, {"params": run.params}),
        "text_encoder": (model.text, buffers[models.TEXT]),
        "vae": (model.autoencoder, buffers[models.VAE]),
    }
    if left := stable_diffusion.write(folder, run.config, networks, source):
        print(left)
    return folder / stable_diffusion.INDEX


def _export_dit(run: workdir.TrainedModel, folder: epath.Path, weights: str) -> epath.Path:
    """A folder as diffusers has it; what its config.json has no place for is in a file beside."""
    kind = run.config.network.kind
    dit = "FILE.safetensors or FILE.pt; diffusers has no such network as a folder"
    require(kind == "dit", "network.kind", kind, dit)
    path = diffusers.write(folder, run.model.network, _state(run))
    export.write_about(export.about_path(path), _about(run, weights))
    return path


def _state(run: workdir.TrainedModel) -> dict[str, np.ndarray]:
    buffers = models.own_buffers(run.buffers)
    variables = {"params": run.params, **({"buffers": buffers} if buffers else {})}
    return export.to_torch(run.model.network, variables)


def _about(run: workdir.TrainedModel, weights: str) -> dict[str, Any]:
    """What the tensors do not show."""
    config, network = run.config, run.model.network
    settings = export.network_settings(network)
    dropout = settings.pop("dropout", 0.0)  # it matters in training alone, and stands below
    kind = {"openai": "adm", "dit": "dit"}.get(config.network.kind, "edm")
    if kind == "edm":
        settings["model_type"] = type(network).__name__
    elif kind == "adm":  # as to_torch writes it; published networks of these sizes may be "new"
        settings["qkv_order"] = "legacy"
    process = config.precondition
    told = ["schedule"] if process.kind in ("adm", "v") else []
    told += [name for name, kinds in PROCESS.items() if process.kind in kinds]
    return {
        "kind": kind,
        "settings": settings,
        "precondition": process.kind,
        **{name: getattr(process, name) for name in told},
        "sigma_data": process.sigma_data,
        "dropout": dropout,
        "step": run.step,
        "weights": weights,
        "config": json.loads(configs.to_json(config)),
    }
