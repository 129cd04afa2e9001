"""Guidance on the command line: names and settings to sampling methods (`slots.Guidance`), checked before compiling.

`dg` and `cfg` shift the denoiser; the others are kicks, which need measurements (`restore.py`). Several names go
together, as in --guidance dg,dsg.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ogdm_jax import generate, restore
from ogdm_jax.diffusion import kicks, operators, process
from ogdm_jax.diffusion.solvers import Kick
from ogdm_jax.methods import cfg, dg, dsg
from ogdm_jax.methods.slots import Guidance, check_guidance
from ogdm_jax.typing import PyTree

DPS_SCALE = {"inpaint": 0.5, "phase_retrieval": 1.0}  # of the released code; 0.3 for the other tasks
_DDIM, _DDPM = {"solver": "ddim", "eta": 1.0}, {"solver": "ancestral"}


def _dsg(task: str, steps: int, rate: float, interval: int = 1) -> dict[str, Any]:
    how = _DDPM if steps == 1000 else _DDIM
    return {"guidance": "dsg", "task": task, "steps": steps, "rate": rate, "interval": interval, **how}


# DSG: table 3 of its appendix (arXiv 2402.03201); the row of deblurring in 20 steps is not known to us: 0.1 as for 50.
PRESETS: dict[str, dict[str, Any]] = {
    "inpaint_1000": _dsg("inpaint", 1000, 0.2, 5),
    "super_resolution_1000": _dsg("super_resolution", 1000, 0.2, 20),
    "deblur_1000": _dsg("deblur", 1000, 0.2, 5),
    "inpaint_100": _dsg("inpaint", 100, 0.2),
    "super_resolution_100": _dsg("super_resolution", 100, 0.1, 2),
    "deblur_100": _dsg("deblur", 100, 0.1),
    "inpaint_50": _dsg("inpaint", 50, 0.2),
    "super_resolution_50": _dsg("super_resolution", 50, 0.1),
    "deblur_50": _dsg("deblur", 50, 0.1),
    "inpaint_20": _dsg("inpaint", 20, 0.2),
    "super_resolution_20": _dsg("super_resolution", 20, 0.2),
    "deblur_20": _dsg("deblur", 20, 0.1),
    "face_id": _dsg("embedding", 100, 0.05) | {"window": "face_id"},
    "style": _dsg("style", 100, 0.1) | {"window": "style", "repeats": 3, "repeat_window": "style_repeats"},
    **{
        f"dps_{task}": {"guidance": "dps", "task": task, "steps": 1000, "scale": DPS_SCALE.get(task, 0.3), **_DDPM}
        for task in ("inpaint", "super_resolution", "deblur", "motion_deblur", "nonlinear_deblur", "phase_retrieval")
    },
}


def _published_window(name: str) -> tuple[float, float]:
    """Noise levels of windows that are published as time indices."""
    if name == "face_id":  # guided while t > 100 of the linear schedule
        return float(process.Discrete.make().sigma[101]), float("inf")
    # Stable Diffusion's schedule; indices 30 to 69 (40 to 69 repeated) of 100 steps at t = 10 index + 1
    levels = process.Discrete.make(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).sigma
    first = 30 if name == "style" else 40
    return float(levels[10 * first + 1]), float(levels[691])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of guidance to sample.py's."""
    group = parser.add_argument_group("guidance")
    add = group.add_argument
    add("--guidance", default="", help=f"comma-separated: dg, cfg, or one of {', '.join(KICKS)}")
    add("--preset", default="", help=f"published settings: {', '.join(PRESETS)}; for dg: {', '.join(dg.PRESETS)}")
    add("--discriminator", default="", help="dg: training folder of the discriminator")
    add("--discriminator-weight", type=float, default=None, help="dg: weight (default: the folder's)")
    add("--guidance-weight", type=float, default=1.5, help="cfg: 1 is the conditional model alone")
    add("--guidance-window", default="", help="cfg: LOW,HIGH noise levels (default: all)")
    add("--task", default="", help=f"what was measured: {', '.join(restore.TASKS)}")
    add("--input", default="", help="picture, folder or data source to measure; or to follow (style, embedding, ...)")
    add("--measurement-noise", type=float, default=0.05, help="standard deviation, images in [-1, 1]")
    add("--poisson", type=float, default=0.0, help="Poisson noise of so many counts per grey level instead")
    add("--mask", default="random", help="inpaint: random, box, or a picture of which black pixels are hidden")
    add("--factor", type=int, default=4, help="super_resolution: reduction")
    add("--blur", type=float, default=None, help="deblur: standard deviation; motion: kernel size (default: by size)")
    add("--network", default="", help="FILE.py:FUNCTION, images [n,h,w,c] in [-1, 1] to features")
    add("--rate", type=float, default=None, help="dsg: 0 to 1 (default 0.2)")
    add("--strength", type=float, default=None, help="dsg: replaces --rate, about equal over numbers of steps; try 1")
    add("--scale", type=float, default=None, help="step size of the other kicks")
    add("--interval", type=int, default=None, help="guide every so many steps")
    add("--window", default="", help="LOW,HIGH noise levels that are guided")
    add("--repeats", type=int, default=None, help="time travel: passes of each guided step")
    add("--repeat-window", default="", help="LOW,HIGH noise levels with time travel")
    add("--stop", type=float, default=0.0, help="dsg: no guidance once the residual ratio is at most this")


@dataclasses.dataclass(frozen=True)
class Guided:
    """What sample.py has to do beside plain sampling: methods, and the measurements if there are any."""

    guidance: tuple[Guidance, ...] = ()
    restoration: restore.Restoration | None = None
    labels: np.ndarray | None = None


def prepare(args: argparse.Namespace) -> argparse.Namespace:
    """Arguments with the preset's values where none were given, and a stochastic sampler where a kick needs one.

    Raises:
      ValueError: an unknown preset, guidance or task; two kicks; options that do not belong together.
    """
    args = argparse.Namespace(**vars(args), dg_preset="")
    for name in filter(None, args.preset.split(",")):
        if name not in PRESETS and name not in dg.PRESETS:
            raise ValueError(f"--preset: {name!r} given; expected one of {', '.join([*PRESETS, *dg.PRESETS])}")
        if name in dg.PRESETS:
            args.dg_preset = name
            continue
        for key, value in PRESETS[name].items():
            if getattr(args, key) in (None, ""):
                setattr(args, key, value)
    names = [n.strip() for n in args.guidance.split(",") if n.strip()]
    unknown = [n for n in names if n not in (*KICKS, "dg", "cfg")]
    if unknown:
        raise ValueError(f"--guidance: {unknown[0]!r} given; expected some of dg, cfg, {', '.join(KICKS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"--guidance: {args.guidance!r} names a method twice; expected each once")
    kick = [n for n in names if n in KICKS]
    if len(kick) > 1:
        raise ValueError(f"guidance: {kick[0]} and {kick[1]} both fill the kick slot; choose one of them")
    if kick and args.task not in restore.TASKS:
        raise ValueError(f"--task: {args.task!r} given for {kick[0]}; expected one of {', '.join(restore.TASKS)}")
    if not kick and (args.task or args.input):
        raise ValueError(f"--task, --input: expected --guidance with one of {', '.join(KICKS)}")
    if "dg" in names and not args.discriminator:
        raise ValueError("--discriminator: not given; expected the training folder of a discriminator")
    if args.discriminator and "dg" not in names:
        raise ValueError("--discriminator: expected --guidance dg with it")
    if kick and not args.solver and args.eta is None and not args.churn:
        args.solver, args.eta = "ddim", 1.0
    args.names, args.kick = names, kick[0] if kick else ""
    return args


def window(text: str, option: str) -> tuple[float, float] | None:
    """ "0.1,5" -> (0.1, 5.0); "" -> None; the name of a published window -> its levels. ValueError otherwise."""
    if not text:
        return None
    if text in ("face_id", "style", "style_repeats"):
        return _published_window(text)
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise ValueError(f"{option}: {text!r} given; expected LOW,HIGH noise levels with 0 <= LOW < HIGH")
    return low, high


def build(args: argparse.Namespace, run: Any, settings: ConfigDict, seeds: np.ndarray) -> Guided:
    """Everything that guidance adds to a run of sample.py: see `Guided`.

    Args:
      args: of `prepare`.   run: the opened model.   settings: its sampler's.   seeds: of the images.

    Raises:
      ValueError: see `prepare`; a deterministic sampler under a kick; nothing to measure; a model without classes.
    """
    methods, restoration, labels = [], None, None
    for name in args.names:
        if name == "dg":
            methods.append(_discriminator(args, run, settings))
        elif name == "cfg":
            methods.append(_classifier_free(args, run))
    if args.kick:
        if settings.solver != "ancestral" and not settings.eta and not args.churn:
            raise ValueError(
                f"--guidance {args.kick} with --solver {settings.solver}, eta {settings.eta:g}: a deterministic step "
                "has no noise to guide; expected --solver ancestral, --solver ddim or heun with --eta 1, or --churn"
            )
        restoration, labels = _measure(args, run, seeds)
        methods.append(dsg.guidance(_kick_of(args, restoration), restoration.given, args.kick))
    elif run.model.label_dim or args.label is not None:
        labels = generate.labels_for(seeds, run.model.label_dim, args.label)
    check_guidance(methods)
    if any(m.churn for m in methods) and (settings.solver not in ("heun", "euler") or settings.eta):
        raise ValueError(
            f"--guidance dg with boosting and --solver {settings.solver}, eta {settings.eta:g}: boosting adds churn; "
            "expected --solver heun or euler with --eta 0"
        )
    return Guided(tuple(methods), restoration, labels)


def _discriminator(args: argparse.Namespace, run: Any, settings: ConfigDict) -> Guidance:
    from ogdm_jax.training import discriminator  # its many imports only where it is asked for

    return discriminator.open_guidance(
        args.discriminator, run=run, settings=settings, preset=args.dg_preset, weight=args.discriminator_weight
    )


def _classifier_free(args: argparse.Namespace, run: Any) -> Guidance:
    if not run.model.label_dim:
        raise ValueError("--guidance cfg: the model is unconditional; expected one trained with data.conditional")
    if not run.config.data.label_dropout:
        raise ValueError("--guidance cfg: the model never saw hidden labels; expected data.label_dropout above 0")
    levels = window(args.guidance_window, "--guidance-window") or (0.0, float("inf"))
    return cfg.guidance(args.guidance_weight, *levels)


def _measure(args: argparse.Namespace, run: Any, seeds: np.ndarray) -> tuple[restore.Restoration, np.ndarray | None]:
    """Measurements of as many inputs as there are seeds, and the classes of the images."""
    shape, classes = run.model.image_shape, run.model.label_dim
    source = restore.open_input(args.input, shape)
    if len(source) < len(seeds):
        seeds = seeds[: len(source)]
    settings = restore.Settings(args.measurement_noise, args.poisson, args.mask, args.factor, args.blur, args.network)
    task = restore.make_task(args.task, settings, shape)
    taken = source.take(np.arange(len(seeds)))
    images = taken["image"].astype(np.float32) / 127.5 - 1
    if not classes or args.label is not None:
        labels = generate.labels_for(seeds, classes, args.label)
    elif source.num_classes == classes and not source.label_size:
        labels = taken["label"]
    elif run.config.data.label_dropout:
        labels = np.full(len(seeds), -1, np.int32)
    else:
        raise ValueError("--label: not given, and --input has no classes of the model's; expected the images' class")
    return restore.measure(task, settings, images, seeds), labels


def _kick_of(args: argparse.Namespace, restoration: restore.Restoration) -> Callable[[PyTree], Kick]:
    """given -> kick; every setting is checked here, on a kick that is thrown away."""
    settings = {
        "interval": 1 if args.interval is None else args.interval,
        "window": window(args.window, "--window"),
    }
    travel = {
        "repeats": 1 if args.repeats is None else args.repeats,
        "repeat_window": window(args.repeat_window, "--repeat-window"),
    }
    scale, noise = args.scale, restoration.settings.noise
    chosen = KICKS[args.kick]

    def kick_of(given: PyTree) -> Kick:
        return chosen(args, restoration, given, scale, noise, settings, travel)

    one = {"rows": {k: v[:1] for k, v in restoration.rows.items()}, "y": restoration.y[:1]}
    kick_of(one)
    if args.kick in ("ddnm", "diffpir") and restoration.operator(one).spectrum is None:
        raise ValueError(
            f"--guidance {args.kick} with --task {args.task}: needs known singular values; expected inpaint, "
            "super_resolution, deblur or denoise, or --guidance dsg"
        )
    return kick_of


def _loss(restoration, given, squared: bool = True, whitened: bool = False) -> Callable:
    std = restoration.std(given["y"]) if whitened or restoration.settings.poisson else None
    return operators.measurement_loss(restoration.operator(given), given["y"], squared, std)


def _dsg_kick(args, restoration, given, scale, noise, settings, travel) -> Kick:
    operator, stop = restoration.operator(given), None
    if args.stop:
        stop = (args.stop * restoration.settings.noise) ** 2 * operator.count(given["y"])
    rate = 0.2 if args.rate is None else args.rate
    loss = _loss(restoration, given)
    return dsg.spherical(loss, rate, **settings, strength=args.strength, stop=stop, **travel)


def _dps_kick(args, restoration, given, scale, noise, settings, travel) -> Kick:
    scale = DPS_SCALE.get(args.task, 0.3) if scale is None else scale
    return dsg.posterior(_loss(restoration, given, squared=False), scale, **settings, coordinate="vp", **travel)


def _mpgd_kick(args, restoration, given, scale, noise, settings, travel) -> Kick:
    return _placed(kicks.mpgd(_loss(restoration, given), 0.4 if scale is None else scale), settings, travel)


def _lgd_kick(args, restoration, given, scale, noise, settings, travel) -> Kick:
    loss = _loss(restoration, given, whitened=True)
    return _placed(kicks.lgd(lambda x0: loss(x0) / 2, 1e-3 if scale is None else scale), settings, travel)


def _freedom_kick(args, restoration, given, scale, noise, settings, travel) -> Kick:
    return _placed(kicks.freedom(_loss(restoration, given), 0.2 if scale is None else scale), settings, travel)


def _ddnm_kick(args, restoration, given, scale, noise, settings, travel) -> Kick:
    return kicks.ddnm(restoration.operator(given), given["y"], noise)


def _diffpir_kick(args, restoration, given, scale, noise, settings, travel) -> Kick:
    return kicks.diffpir(restoration.operator(given), given["y"], noise, 8.0 if scale is None else scale)


def _placed(kick: Kick, settings: dict[str, Any], travel: dict[str, Any]) -> Kick:
    """The kick on its steps, as often as asked for."""
    return kicks.on_steps(kicks.time_travel(kick, travel["repeats"], travel["repeat_window"]), **settings)


KICKS: dict[str, Callable[..., Kick]] = {
    "dsg": _dsg_kick,
    "dps": _dps_kick,
    "mpgd": _mpgd_kick,
    "ddnm": _ddnm_kick,
    "diffpir": _diffpir_kick,
    "freedom": _freedom_kick,
    "lgd": _lgd_kick,
}


def figures(guided: Guided, restored: np.ndarray, **more: Any) -> dict[str, Any]:
    """Means over images of `Restoration.judge`, with what was run."""
    judged = guided.restoration.judge(restored)
    means = {name: round(float(np.mean(values)), 4) for name, values in judged.items()}
    return {"task": guided.restoration.task.name, **more, "images": len(restored), **means}
