"""Guidance on the command line: names and settings to sampling methods (`slots.Guidance`), checked
before compiling.

`dg` and `cfg` shift the denoiser; the others are kicks, which need measurements (`restore.py`).
Several names go together, as in --guidance dg,dsg.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ogdm_jax.diffusion import process
from ogdm_jax.inverse import operators
from ogdm_jax.inverse import tasks as restore
from ogdm_jax.methods import cfg, dg, dsg
from ogdm_jax.methods.contract import Guidance, check_guidance
from ogdm_jax.pixels import to_float
from ogdm_jax.sampling import generate, kicks
from ogdm_jax.sampling.solvers import Kick
from ogdm_jax.typing import PyTree

DPS_SCALE = {
    "inpaint": 0.5,
    "phase_retrieval": 1.0,
}  # of the released code; 0.3 for the other tasks
CFG_WEIGHT = 1.5
_DDIM, _DDPM = {"solver": "ddim", "eta": 1.0}, {"solver": "ancestral"}


_RELEASED = {
    "clip": True,
    "discrete_grid": "respaced",
}  # of linear problems; the grid where the model has steps
_STEERING = {"clip": None, "discrete_grid": "ddim"}
_OWN_TRANSITION = ("ddnm", "diffpir")


def _dsg(task: str, steps: int, rate: float, interval: int = 1) -> dict[str, Any]:
    how = (_DDPM if steps == 1000 else _DDIM) | _RELEASED
    return {
        "guidance": "dsg",
        "task": task,
        "steps": steps,
        "rate": rate,
        "interval": interval,
        **how,
    }


# DSG: table 3 of its appendix (arXiv 2402.03201); the row of deblurring in 20 steps is not known to
# us: 0.1 as for 50.
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
    "face_id": _dsg("embedding", 100, 0.05) | _STEERING | {"window": "face_id"},
    "style": _dsg("style", 100, 0.1)
    | _STEERING
    | {"window": "style", "repeats": 3, "repeat_window": "style_repeats"},
    **{
        f"dps_{task}": {
            "guidance": "dps",
            "task": task,
            "steps": 1000,
            "scale": DPS_SCALE.get(task, 0.3),
        }
        | _DDPM
        | _RELEASED
        for task in (
            "inpaint",
            "super_resolution",
            "deblur",
            "motion_deblur",
            "nonlinear_deblur",
            "phase_retrieval",
        )
    },
}


def _published_window(name: str) -> tuple[float, float]:
    """Noise levels of windows that are published as time indices."""
    if name == "face_id":  # guided while t > 100 of the linear schedule
        return float(process.Discrete.make().sigma[101]), float("inf")
    # Stable Diffusion's schedule; indices 30 to 69 (40 to 69 repeated) of 100 steps at t = 10 index
    # + 1
    levels = process.Discrete.make(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).sigma
    first = 30 if name == "style" else 40
    return float(levels[10 * first + 1]), float(levels[691])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of guidance to sample.py's."""
    group = parser.add_argument_group("guidance")
    add = group.add_argument
    add("--guidance", default="", help=f"comma-separated: dg, cfg, or one of {', '.join(KICKS)}")
    add(
        "--preset",
        default="",
        help=f"published settings: {', '.join(PRESETS)}; for dg: {', '.join(dg.PRESETS)}",
    )
    add("--discriminator", default="", help="dg: training folder of the discriminator")
    add(
        "--discriminator-weight",
        type=float,
        default=None,
        help="dg: weight (default: the folder's)",
    )
    add(
        "--guidance-weight",
        type=float,
        default=None,
        help="cfg: 1 is the conditional model alone (default 1.5)",
    )
    add("--guidance-window", default="", help="cfg: LOW,HIGH noise levels (default: all)")
    add("--task", default="", help=f"what was measured: {', '.join(restore.TASKS)}")
    add(
        "--input",
        default="",
        help="picture, folder or data source to measure; or to follow (style, embedding, ...)",
    )
    add(
        "--measurement-noise",
        type=float,
        default=None,
        help="standard deviation, images in [-1, 1] (default 0.05)",
    )
    add(
        "--poisson",
        type=float,
        default=None,
        help="Poisson noise of so many counts per grey level instead",
    )
    add(
        "--mask",
        default="",
        help="inpaint: random (default), box, or a picture of which black pixels are hidden",
    )
    add("--factor", type=int, default=None, help="super_resolution: reduction (default 4)")
    add(
        "--blur",
        type=float,
        default=None,
        help="deblur: standard deviation; motion: kernel size (default: by size)",
    )
    add("--network", default="", help="FILE.py:FUNCTION, images [n,h,w,c] in [-1, 1] to features")
    add("--rate", type=float, default=None, help="dsg: 0 to 1 (default 0.2)")
    add(
        "--strength",
        type=float,
        default=None,
        help="dsg: replaces --rate, about equal over numbers of steps; try 1",
    )
    add("--scale", type=float, default=None, help="step size of the other kicks (ddnm has none)")
    clip = (
        "dsg, dps: x0_hat clipped to [-1, 1] for the loss and every step, as released for linear "
        "problems"
    )
    add("--clip", action=argparse.BooleanOptionalAction, default=None, help=clip)
    add("--interval", type=int, default=None, help="guide every so many steps")
    add("--window", default="", help="LOW,HIGH noise levels that are guided")
    add("--repeats", type=int, default=None, help="time travel: passes of each guided step")
    add("--repeat-window", default="", help="LOW,HIGH noise levels with time travel")
    add(
        "--stop",
        type=float,
        default=None,
        help="dsg: no guidance once the residual ratio is at most this",
    )


@dataclasses.dataclass(frozen=True)
class Guided:
    """What sample.py has to do beside plain sampling: methods, and the measurements if there are
    any.
    """

    guidance: tuple[Guidance, ...] = ()
    restoration: restore.Restoration | None = None
    labels: np.ndarray | None = None


def prepare(args: argparse.Namespace) -> argparse.Namespace:
    """Arguments with the preset's values where none were given, and a stochastic sampler where a
    kick needs one.

    Raises:
      ValueError: an unknown preset, guidance or task; two kicks; options that do not belong
      together.
    """
    args = _with_presets(args)
    names = [n.strip() for n in args.guidance.split(",") if n.strip()]
    unknown = [n for n in names if n not in (*KICKS, "dg", "cfg")]
    if unknown:
        raise ValueError(
            f"--guidance: {unknown[0]!r} given; expected some of dg, cfg, {', '.join(KICKS)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"--guidance: {args.guidance!r} names a method twice; expected each once")
    kick = [n for n in names if n in KICKS]
    if len(kick) > 1:
        raise ValueError(
            f"guidance: {kick[0]} and {kick[1]} both fill the kick slot; choose one of them"
        )
    if kick and args.task not in restore.TASKS:
        raise ValueError(
            f"--task: {args.task!r} given for {kick[0]}; expected one of {', '.join(restore.TASKS)}"
        )
    if not kick and (args.task or args.input):
        raise ValueError(f"--task, --input: expected --guidance with one of {', '.join(KICKS)}")
    if "dg" in names and not args.discriminator:
        raise ValueError(
            "--discriminator: not given; expected the training folder of a discriminator"
        )
    if args.discriminator and "dg" not in names:
        raise ValueError("--discriminator: expected --guidance dg with it")
    args.names, args.kick = names, kick[0] if kick else ""
    _refuse_unheard(args)
    if args.guidance_weight is None:
        args.guidance_weight = CFG_WEIGHT
    if kick and not args.solver and args.eta is None and not args.churn:
        args.solver, args.eta = "ddim", 1.0
    return args


def _with_presets(args: argparse.Namespace) -> argparse.Namespace:
    """The presets' values where none were given; a preset says --guidance, too. Raises ValueError,
    see `prepare`.
    """
    args = argparse.Namespace(**vars(args), dg_preset="", discrete_grid="")
    chosen = [name.strip() for name in args.preset.split(",") if name.strip()]
    for name in chosen:
        if name not in PRESETS and name not in dg.PRESETS:
            raise ValueError(
                f"--preset: {name!r} given; expected one of {', '.join([*PRESETS, *dg.PRESETS])}"
            )
    methods = ["dg" if name in dg.PRESETS else PRESETS[name]["guidance"] for name in chosen]
    if len(set(methods)) < len(methods):
        raise ValueError(
            f"--preset: {args.preset!r} holds two of one method; expected at most one for each"
        )
    args.guidance = args.guidance or ",".join(methods)
    for name, method in zip(chosen, methods, strict=True):
        if method not in [n.strip() for n in args.guidance.split(",")]:
            raise ValueError(
                f"--preset: {name!r} is for {method}; expected --guidance {method} with it, or none"
            )
        if method == "dg":
            args.dg_preset = name
        for key, value in PRESETS.get(name, {}).items():
            if getattr(args, key) in (None, ""):
                setattr(args, key, value)
    return args


def _heard_by() -> dict[str, tuple[str, ...]]:
    """Which methods or tasks listen to an option; the others refuse it."""
    blurs = ("deblur", "motion_deblur", "nonlinear_deblur")
    return {
        "discriminator_weight": ("dg",),
        **dict.fromkeys(("guidance_weight", "guidance_window"), ("cfg",)),
        **dict.fromkeys(("rate", "strength", "stop"), ("dsg",)),
        "clip": ("dsg", "dps"),
        "scale": ("dps", "mpgd", "diffpir", "freedom", "lgd"),
        **dict.fromkeys(("interval", "window", "repeats", "repeat_window"), tuple(KICKS)),
        **dict.fromkeys(("measurement_noise", "poisson"), restore.RESTORING),
        "mask": ("inpaint",),
        "factor": ("super_resolution",),
        "blur": blurs,
        "network": ("nonlinear_deblur", *restore.STEERING),
    }


def _refuse_unheard(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that nothing listens to, and for two that exclude each
    other.
    """
    for name, owners in _heard_by().items():
        value = getattr(args, name)
        if value not in (None, "") and not {*args.names, args.task} & {*owners}:
            asked = " ".join(filter(None, [",".join(args.names), args.task])) or "plain sampling"
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option}: {value} given, but {asked} does not use it; expected "
                f"{' or '.join(owners)}"
            )
    if args.poisson and args.measurement_noise is not None:
        raise ValueError(
            f"--measurement-noise: {args.measurement_noise:g} given with --poisson; expected one "
            "of them"
        )
    if args.repeat_window and (args.repeats or 1) == 1:
        raise ValueError(
            f"--repeat-window: {args.repeat_window!r} given; expected --repeats of at least 2 with "
            "it"
        )
    if args.kick in _OWN_TRANSITION:
        if args.poisson:
            raise ValueError(
                f"--poisson: {args.poisson:g} given for {args.kick}, which knows Gaussian noise of "
                "one size only; "
                "expected --measurement-noise, or --guidance dsg"
            )
        if args.churn:
            raise ValueError(
                f"--churn: {args.churn!r} given for {args.kick}, which brings a transition of its "
                "own; expected "
                "--solver ddim with --eta 1, or --solver ancestral"
            )
    if args.stop is not None:
        noisy = args.task in restore.RESTORING and (args.poisson or args.measurement_noise != 0)
        if not (args.stop >= 0 and noisy):
            raise ValueError(
                f"--stop: {args.stop:g} given; expected at least 0, and a task with measurement "
                "noise"
            )


def grid_of(args: argparse.Namespace, run: Any) -> str:
    """Grid to sample on, "" for the configuration's: as asked for, else the preset's where the
    model has its steps.
    """
    return args.grid or (args.discrete_grid if run.model.table is not None else "")


def window(text: str, option: str) -> tuple[float, float] | None:
    """ "0.1,5" -> (0.1, 5.0); "" -> None; the name of a published window -> its levels. ValueError
    otherwise.
    """
    if not text:
        return None
    if text in ("face_id", "style", "style_repeats"):
        return _published_window(text)
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise ValueError(
            f"{option}: {text!r} given; expected LOW,HIGH noise levels with 0 <= LOW < HIGH"
        )
    return low, high


def build(args: argparse.Namespace, run: Any, settings: ConfigDict, seeds: np.ndarray) -> Guided:
    """Everything that guidance adds to a run of sample.py: see `Guided`.

    Args:
      args: of `prepare`.   run: the opened model.   settings: its sampler's.   seeds: of the
        images.

    Raises:
      ValueError: see `prepare`; a deterministic sampler under a kick; nothing to measure; a model
      without classes.
    """
    methods, restoration, labels = [], None, None
    # CFG inside DG in whatever order they are named: the discriminator then sees each image once,
    # with its class.
    if "cfg" in args.names:
        methods.append(_classifier_free(args, run))
    if "dg" in args.names:
        methods.append(_discriminator(args, run, settings))
    if args.kick:
        if settings.solver != "ancestral" and not settings.eta and not args.churn:
            raise ValueError(
                f"--guidance {args.kick} with --solver {settings.solver}, eta {settings.eta:g}: a "
                "deterministic step "
                "has no noise to guide; expected --solver ancestral, --solver ddim or heun with "
                "--eta 1, or --churn"
            )
        restoration, labels = _measure(args, run, seeds)
        methods.append(dsg.guidance(_kick_of(args, restoration), restoration.given, args.kick))
    elif run.model.label_dim or args.label is not None:
        labels = generate.labels_for(seeds, run.model.label_dim, args.label)
    if "dg" in args.names and labels is not None and (labels < 0).any():
        _refuse_no_class(args.discriminator)
    check_guidance(methods)
    if any(m.churn for m in methods) and (settings.solver not in ("heun", "euler") or settings.eta):
        raise ValueError(
            f"--guidance dg with boosting and --solver {settings.solver}, eta {settings.eta:g}: "
            "boosting adds churn; "
            "expected --solver heun or euler with --eta 0"
        )
    return Guided(tuple(methods), restoration, labels)


def _discriminator(args: argparse.Namespace, run: Any, settings: ConfigDict) -> Guidance:
    from ogdm_jax.discriminator import (
        training as discriminator,  # its many imports only where it is asked for
    )

    weight = (
        None if args.guidance_window else args.guidance_weight
    )  # samples to train on have no window
    around = {"churn": args.churn, "cfg": weight if "cfg" in args.names else 1.0}
    return discriminator.open_guidance(
        args.discriminator,
        run=run,
        settings=settings,
        preset=args.dg_preset,
        around=around,
        weight=args.discriminator_weight,
    )


def _refuse_no_class(folder: str) -> None:
    """Raises ValueError for a conditional discriminator: its head knows no "no class"."""
    from ogdm_jax.training import checkpoint

    if checkpoint.find(folder, field="--discriminator").config.data.conditional:
        raise ValueError(
            "--label: no class given, but the discriminator is conditional; expected the images' "
            "class"
        )


def _classifier_free(args: argparse.Namespace, run: Any) -> Guidance:
    if not run.model.label_dim:
        raise ValueError(
            "--guidance cfg: the model is unconditional; expected one trained with data.conditional"
        )
    if not run.config.data.label_dropout:
        raise ValueError(
            "--guidance cfg: the model never saw hidden labels; expected data.label_dropout above 0"
        )
    levels = window(args.guidance_window, "--guidance-window") or (0.0, float("inf"))
    return cfg.guidance(args.guidance_weight, *levels)


def _measure(
    args: argparse.Namespace, run: Any, seeds: np.ndarray
) -> tuple[restore.Restoration, np.ndarray | None]:
    """Measurements of as many inputs as there are seeds, and the classes of the images."""
    shape, classes = run.model.image_shape, run.model.label_dim
    source = restore.open_input(args.input, shape)
    if len(source) < len(seeds):
        seeds = seeds[: len(source)]
    words = {"noise": args.measurement_noise}
    words |= {
        name: getattr(args, name) for name in ("poisson", "mask", "factor", "blur", "network")
    }
    settings = restore.Settings(
        **{name: value for name, value in words.items() if value not in (None, "")}
    )
    task = restore.make_task(args.task, settings, shape)
    taken = source.take(np.arange(len(seeds)))
    images = to_float(taken["image"])
    if not classes or args.label is not None:
        labels = generate.labels_for(seeds, classes, args.label)
    elif source.num_classes == classes and not source.label_size:
        labels = taken["label"]
    elif run.config.data.label_dropout:
        labels = np.full(len(seeds), -1, np.int32)
    else:
        raise ValueError(
            "--label: not given, and --input has no classes of the model's; expected the images' "
            "class"
        )
    return restore.measure(task, settings, images, seeds), labels


def _kick_of(
    args: argparse.Namespace, restoration: restore.Restoration
) -> Callable[[PyTree], Kick]:
    """given -> kick; every setting is checked here, on a kick that is thrown away."""
    place = {
        "interval": 1 if args.interval is None else args.interval,
        "window": window(args.window, "--window"),
        "repeats": 1 if args.repeats is None else args.repeats,
        "repeat_window": window(args.repeat_window, "--repeat-window"),
    }
    more = {"clip": bool(args.clip)} if args.kick in ("dsg", "dps") else {}
    if args.kick == "dsg":
        more |= {"strength": args.strength, "stop": args.stop}

    def kick_of(given: PyTree) -> Kick:
        size = args.rate if args.kick == "dsg" else args.scale
        return kick(args.kick, restoration, given, size, place, **more)

    one = {"rows": {k: v[:1] for k, v in restoration.rows.items()}, "y": restoration.y[:1]}
    kick_of(one)
    if args.kick in _OWN_TRANSITION and restoration.operator(one).spectrum is None:
        raise ValueError(
            f"--guidance {args.kick} with --task {args.task}: needs known singular values; "
            "expected inpaint, "
            "super_resolution, deblur or denoise, or --guidance dsg"
        )
    return kick_of


def kick(
    name: str,
    restoration: restore.Restoration,
    given: PyTree,
    size: Any = None,
    place: dict[str, Any] | None = None,
    **more: Any,
) -> Kick:
    """A kick of KICKS on measurements.

    Args:
      given: rows of restoration.given.   size: dsg's rate, the others' scale; None: the default.
      place: interval, window, repeats, repeat_window.   more: dsg's and dps's clip; dsg's strength
        and stop.

    Raises:
      ValueError: a setting out of range.
    """
    default = {"dps": DPS_SCALE.get(restoration.task.name, 0.3)} | _SIZES
    return KICKS[name](
        restoration, given, default[name] if size is None else size, place or {}, **more
    )


def _loss(restoration, given, squared: bool = True, whitened: bool = False) -> Callable:
    std = restoration.std(given["y"]) if whitened or restoration.settings.poisson else None
    return operators.measurement_loss(restoration.operator(given), given["y"], squared, std)


def _dsg_kick(restoration, given, size, place, strength=None, stop=None, clip=False) -> Kick:
    if stop is not None:
        noise = (
            1.0 if restoration.settings.poisson else restoration.settings.noise
        )  # Poisson's loss is in units of it
        stop = (stop * noise) ** 2 * restoration.operator(given).count(given["y"])
    more = {"strength": strength, "stop": stop, "clip_loss": clip, "clip_mean": clip}
    return dsg.spherical(_loss(restoration, given), size, **place, **more)


def _dps_kick(restoration, given, size, place, clip=False) -> Kick:
    loss = _loss(restoration, given, squared=False)
    return dsg.posterior(loss, size, **place, coordinate="vp", clip_loss=clip, clip_mean=clip)


def _mpgd_kick(restoration, given, size, place) -> Kick:
    return _placed(kicks.mpgd(_loss(restoration, given), size), **place)


def _lgd_kick(restoration, given, size, place) -> Kick:
    loss = _loss(restoration, given, whitened=True)
    return _placed(kicks.lgd(lambda x0: loss(x0) / 2, size), **place)


def _freedom_kick(restoration, given, size, place) -> Kick:
    return _placed(kicks.freedom(_loss(restoration, given), size), **place)


def _ddnm_kick(restoration, given, size, place) -> Kick:
    return _placed(
        kicks.ddnm(restoration.operator(given), given["y"], restoration.settings.noise), **place
    )


def _diffpir_kick(restoration, given, size, place) -> Kick:
    return _placed(
        kicks.diffpir(restoration.operator(given), given["y"], restoration.settings.noise, size),
        **place,
    )


def _placed(kick: Kick, interval=1, window=None, repeats=1, repeat_window=None) -> Kick:
    """The kick on its steps, as often as asked for."""
    return kicks.on_steps(kicks.time_travel(kick, repeats, repeat_window), interval, window)


KICKS: dict[str, Callable[..., Kick]] = {
    "dsg": _dsg_kick,
    "dps": _dps_kick,
    "mpgd": _mpgd_kick,
    "ddnm": _ddnm_kick,
    "diffpir": _diffpir_kick,
    "freedom": _freedom_kick,
    "lgd": _lgd_kick,
}
_SIZES = {"dsg": 0.2, "mpgd": 0.5, "ddnm": None, "diffpir": 8.0, "freedom": 0.2, "lgd": 1e-3}


def figures(guided: Guided, restored: np.ndarray, **more: Any) -> dict[str, Any]:
    """Means over images of `Restoration.judge`, with what was run."""
    judged = guided.restoration.judge(restored)
    means = {name: round(float(np.mean(values)), 4) for name, values in judged.items()}
    return {"task": guided.restoration.task.name, **more, "images": len(restored), **means}
