"""The words of a command about guidance: presets and options to the Settings of methods, and those
to guidance, checked before anything is compiled.
"""

import argparse
import dataclasses
import sys
from types import ModuleType
from typing import Any

import jax
import numpy as np

from ogdm_jax.cli import options
from ogdm_jax.cli.parsing import listed
from ogdm_jax.config import ConfigError, Sample, require
from ogdm_jax.diffusion import process
from ogdm_jax.inverse import files, tasks
from ogdm_jax.inverse.measured import Restoration, measure, taken
from ogdm_jax.methods import dg, discovery
from ogdm_jax.methods.session import Session
from ogdm_jax.models import VAE, Model
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.churn import Churn
from ogdm_jax.sampling.guidance import Guidance, Preset, per_image
from ogdm_jax.sampling.schedule import Schedule
from ogdm_jax.training.workdir import TrainedModel, open_workdir
from ogdm_jax.typing import PyTree


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --guidance, --preset, --task, --input, and the options of every method and of tasks."""
    methods = discovery.sampling()
    presets = [name for module in methods.values() for name in _presets(module)]
    group = parser.add_argument_group("guidance")
    group.add_argument(
        "--guidance", default="", help=f"comma-separated, some of {', '.join(methods)}"
    )
    group.add_argument("--preset", default="", help=f"published settings: {', '.join(presets)}")
    group.add_argument(
        "--task", default="", help=f"what was measured: one of {', '.join(tasks.TASKS)}"
    )
    group.add_argument(
        "--input",
        default="",
        help="picture, folder or data source to measure; or to follow (style, face_id, ...)",
    )
    group.add_argument(
        "--measured",
        default="",
        help="picture, folder or .npy that was measured already, taken as it is: a low-resolution, "
        "blurred or covered picture (with --task.mask); there is no truth, so no PSNR",
    )
    options.add_options(parser, "task", tasks.Settings, "what is measured, and with which noise")
    for name, module in methods.items():
        about = (module.__doc__ or name).partition("\n\n")[0].replace("\n", " ")
        options.add_options(parser, name, module.Settings, about)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command asks for.

    Attributes:
      settings: the Settings of each method, by name, in the order of --guidance.
      sampling: what the presets say of the sampler: solver, eta, steps, grid.
      task: name, or "".
      task_settings: of the task.
      input: where the images to measure are.
      measured: where measurements are, if they were made already.
      several: whether the command says how many samples it wants; if not, one of each picture.
      preset: of discriminator guidance, its name, or "".
      said: options of methods that were given, such as "dsg.rate".
    """

    settings: dict[str, Any]
    sampling: dict[str, Any]
    task: str
    task_settings: tasks.Settings
    input: str
    measured: str = ""
    several: bool = False
    preset: str = ""
    said: frozenset[str] = frozenset()


def read(args: argparse.Namespace) -> Request:
    """The request of a command, its options over those of its presets.

    Raises:
      ConfigError: an unknown method, preset or task; options that do not belong together.
    """
    methods, texts = discovery.sampling(), options.given(args)
    presets = _chosen_presets(args.preset, methods)
    names = listed(args.guidance) or list(presets)
    _check_names(names, presets, texts)
    sampling: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name in names:
        published = presets[name][1] if name in presets else Preset({})
        own = options.values(name, methods[name].Settings, texts)
        settings[name] = methods[name].Settings(**published.settings | own)
        sampling = published.sampling | sampling
    published_task = sampling.pop("task", "")
    task = args.task or published_task
    measured = _task_settings(task, texts)
    if (task or args.input or args.measured) and not names:
        raise ConfigError(
            f"--task, --input, --measured: expected --guidance with one of {', '.join(methods)}"
        )
    if (args.input or args.measured) and not task:
        option = "--measured" if args.measured else "--input"
        raise ConfigError(
            f"{option}: given, but there is no --task; expected one of {', '.join(tasks.TASKS)}"
        )
    if args.measured and args.input:
        raise ConfigError("--measured, --input: both given; expected one of them")
    if args.measured:
        tasks.check_known(task, measured)
    # A transition needs steps that are random; ddim with eta 1 has them with every model.
    asked = sampling or args.solver or args.eta is not None or args.churn
    if not asked and any(isinstance(s, Schedule) for s in settings.values()):
        sampling = {"solver": "ddim", "eta": 1.0}
    several = bool(args.seeds) or args.num is not None
    preset = presets["dg"][0] if "dg" in presets else ""
    inputs = (args.input, args.measured)
    return Request(settings, sampling, task, measured, *inputs, several, preset, frozenset(texts))


def unclipped(request: Request, model: Model) -> Request:
    """The request without, and a word about, the clipping that presets bring, where the model is of
    latents: they have no bounds, and the code that was released for them does not clip.

    Raises:
      ConfigError: clipping that the words themselves ask for.
    """
    if model.pixels:
        return request
    settings, off = dict(request.settings), ["clip"] * bool(request.sampling.get("clip"))
    for name, chosen in settings.items():
        changes = {f: False for f in ("clip_loss", "clip_mean") if getattr(chosen, f, False)}
        for asked in request.said & {f"{name}.{field}" for field in changes}:
            raise ConfigError(f"--{asked}: True given; expected {generate.UNBOUNDED}")
        settings[name] = dataclasses.replace(chosen, **changes)
        off += [f"{name}.{field}" for field in changes]
    sampling = {name: value for name, value in request.sampling.items() if name != "clip"}
    if off:
        names = ", ".join(f"--{name}" for name in off)
        print(f"--preset: without {names}, as latents have no bounds", file=sys.stderr)
    return dataclasses.replace(request, settings=settings, sampling=sampling)


def check_effect(
    request: Request, run: TrainedModel, settings: Sample, churn: Churn | None = None
) -> None:
    """Refuses guidance and churn that would do nothing in this run.

    Raises:
      ConfigError: noise levels that no step has; an option that another one replaces, or that the
        solver has no use for.
    """
    grid = generate.noise_levels(run.model, settings)
    levels = grid[:-1]

    def reached(field: str, low: float, high: float, every: int = 1) -> None:
        if not any(low <= level <= high for level in levels[::-1][::every]):
            steps = "no step" if every == 1 else f"none of every {every} steps"
            raise ConfigError(
                f"--{field}: {low:g} to {high:g} given, where {steps} of this grid lies; expected "
                f"noise levels between {levels[-1]:.4g} and {levels[0]:.4g}, or more --steps"
            )

    for name, chosen in request.settings.items():
        if getattr(chosen, "window", None) is not None:
            low, high = chosen.window
            reached(f"{name}.window", low, high, getattr(chosen, "interval", 1))
        if getattr(chosen, "below", None) is not None:
            reached(f"{name}.below", 0.0, chosen.below[0])
        if f"{name}.repeat_window" in request.said:
            reached(f"{name}.repeat_window", *chosen.repeat_window)
    _check_bounded(request, settings, levels)
    if churn is None and "dg" not in request.settings:  # whose boosting churns
        _check_noise_left(request, grid)
    if churn is not None and churn.S_churn:
        reached("churn", churn.S_min, churn.S_max)
    if {"dsg.rate", "dsg.strength"} <= request.said:
        raise ConfigError("--dsg.rate: given with --dsg.strength, which replaces it; expected one")
    if "dg.window" in request.said and {"dg.time_min", "dg.time_max"} & request.said:
        raise ConfigError(
            "--dg.window: given with --dg.time_min or --dg.time_max; expected one of the two ways"
        )
    if "dg.corrector_weight" in request.said and settings.solver != "heun":
        raise ConfigError(
            f"--dg.corrector_weight: given with the solver {settings.solver!r}, which evaluates "
            "once a step; expected --solver heun, or --dg.weight alone"
        )


def _check_noise_left(request: Request, grid: np.ndarray) -> None:
    """Refuses DSG where it guides at most the last step, which has no noise."""
    chosen = request.settings.get("dsg")
    if chosen is None or grid[-1] > 0:
        return
    low, high = chosen.window or (0.0, np.inf)
    counted = grid[-2 :: -chosen.interval]  # from the last step's level up
    if not ((low <= counted[1:]) & (counted[1:] <= high)).any():
        raise ConfigError(
            f"--guidance: dsg given for {len(grid) - 1} steps, where it would guide at most the "
            "last, which has no noise; expected more --steps, or higher levels in --dsg.window"
        )


def _check_bounded(request: Request, settings: Sample, levels: np.ndarray) -> None:
    """Refuses guidance from pure noise whose step grows with that level."""
    if levels[0] < process.PURE_NOISE:
        return
    mean = ("mean", "auto") if settings.solver == "ancestral" else ("mean",)
    bounded = {"pigdm": (), "classifier": mean, "freedom": ("time",)}  # rules
    for name, rules in bounded.items():
        chosen = request.settings.get(name)
        if chosen is None or getattr(chosen, "rule", "") in rules:
            continue
        if chosen.window is None or chosen.window[1] >= process.PURE_NOISE:
            below = 2 * levels[1] if len(levels) > 1 else 80.0
            raise ConfigError(
                f"--{name}.window: {'not given' if chosen.window is None else chosen.window}, and "
                f"the grid {settings.grid!r} starts from pure noise, with whose infinite level "
                f"{name}'s step would grow; expected lower levels, such as 0,{below:.3g}"
            )


def _check_names(
    names: list[str], presets: dict[str, tuple[str, Preset]], texts: dict[str, str]
) -> None:
    """Raises ConfigError for unknown methods, and for presets and options of others."""
    methods, given = discovery.sampling(), ",".join(names)
    for name in names:
        require(name in methods, "--guidance", name, f"some of {', '.join(methods)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--guidance: {given!r} names a method twice; expected each once")
    for owner, (preset, _) in presets.items():
        if owner not in names:
            raise ConfigError(
                f"--preset: {preset!r} is for {owner}; expected --guidance {owner} with it, or none"
            )
    for key, text in texts.items():
        group = key.partition(".")[0]
        if group not in ("task", *names):
            raise ConfigError(
                f"--{key}: {text} given, but {group} is not in --guidance; expected --guidance "
                f"{','.join([*names, group])}"
            )


def _presets(module: ModuleType) -> dict[str, Preset]:
    return getattr(module, "PRESETS", {})


def _chosen_presets(text: str, methods: dict[str, ModuleType]) -> dict[str, tuple[str, Preset]]:
    """{method: (name, preset)} of a comma-separated list."""
    owners = {name: owner for owner, module in methods.items() for name in _presets(module)}
    chosen: dict[str, tuple[str, Preset]] = {}
    for name in listed(text):
        require(name in owners, "--preset", name, f"one of {', '.join(owners)}")
        owner = owners[name]
        if owner in chosen:
            raise ConfigError(
                f"--preset: {text!r} holds two of one method; expected at most one for each"
            )
        chosen[owner] = (name, _presets(methods[owner])[name])
    return chosen


def _task_settings(task: str, texts: dict[str, str]) -> tasks.Settings:
    """Settings of the task; raises ConfigError for those that it does not use."""
    require(not task or task in tasks.TASKS, "--task", task, f"one of {', '.join(tasks.TASKS)}")
    own = options.values("task", tasks.Settings, texts)
    for name in own:
        if task not in tasks.users(name):
            text = texts[f"task.{name}"]
            raise ConfigError(
                f"--task.{name}: {text} given, but "
                f"{f'--task {task} does not use it' if task else 'there is no --task'}; expected "
                f"--task {' or '.join(tasks.users(name))}"
            )
    if own.get("poisson") and "noise" in own:
        raise ConfigError(
            f"--task.noise: {own['noise']:g} given with --task.poisson; expected one of them"
        )
    return tasks.Settings(**own)


@dataclasses.dataclass(frozen=True)
class Guided:
    """What guidance adds to a run of sampling.

    Attributes:
      guidance: the methods.
      restoration: the measurements, if there are any.
      labels: [n] classes of the images, tokens of their texts, or None.
    """

    guidance: tuple[Guidance, ...] = ()
    restoration: Restoration | None = None
    labels: PyTree = None


def build(
    request: Request,
    run: TrainedModel,
    settings: Sample,
    seeds: np.ndarray,
    *,
    label: int | None = None,
    churn: Churn | None = None,
    texts: PyTree = None,
) -> Guided:
    """The guidance of a request.

    Args:
      request: what the command asks for.
      run: the model.
      settings: of its sampler.
      seeds: [n] of the images.
      label: class of all images, or None.
      churn: of the run, where no method brings it.
      texts: labels of the images, where they are texts (`models.Model.text`).

    Raises:
      ValueError: guidance that does not fit the model, the sampler or each other; nothing to
        measure.
    """
    restoration, labels, classes = None, None, _classes(request, run)
    if request.task:
        restoration, labels = _measure(request, run, seeds, label, classes)
    elif classes or label is not None:
        labels = generate.labels_for(seeds, classes, label)
    if texts is not None:
        count = len(seeds if restoration is None else restoration.seeds)
        labels = jax.tree.map(lambda rows: rows[:count], texts)
    session = Session(
        model=run.model,
        config=run.config,
        sampling=settings,
        settings=request.settings,
        churn=churn,
        labels=labels,
        open_discriminator=lambda chosen: _open_discriminator(chosen, run, session, request),
        open_model=lambda workdir, step, field: open_workdir(workdir, step, field=field, vae=None),
    )
    methods = discovery.sampling()
    guidance = tuple(
        _build(methods[name], chosen, session, restoration)
        for name, chosen in request.settings.items()
    )
    if restoration is not None and all(method.transition is None for method in guidance):
        raise ConfigError(
            f"--task: {request.task!r} given, but {', '.join(request.settings)} does not use it; "
            "expected --guidance with a method for measurements, such as dsg"
        )
    generate.check_guidance(settings, guidance, churn)
    return Guided(guidance, restoration, labels)


def _build(
    module: ModuleType, settings: Any, session: Session, restoration: Restoration | None
) -> Guidance:
    """One method; where there are measurements, it is made anew from those of each batch."""
    if restoration is None:
        return module.build(settings, session)

    def build(rows: PyTree, weights: PyTree = None) -> Guidance:
        measured = restoration.guided(rows, weights)
        return module.build(settings, dataclasses.replace(session, measured=measured))

    return per_image(build, restoration.rows, restoration.weights)


def _classes(request: Request, run: TrainedModel) -> int:
    """Classes that images may have: the model's, else those of a method (a classifier)."""
    methods = discovery.sampling()
    asked = [(methods[name], chosen) for name, chosen in request.settings.items()]
    others = [module.classes(chosen) for module, chosen in asked if hasattr(module, "classes")]
    return run.model.label_dim or max(others, default=0)


def _measure(
    request: Request, run: TrainedModel, seeds: np.ndarray, label: int | None, others: int
) -> tuple[Restoration, np.ndarray | None]:
    """Measurements, and the classes of the images.

    Without a number of samples in the command there is one of each picture, up to the seeds; else
    the pictures are taken in turn, so that three seeds give three samples of one measurement.
    """
    shape, classes = run.model.picture_shape, run.model.label_dim
    task = tasks.make_task(request.task, request.task_settings, shape)
    known = files.Classes(classes, run.class_names)
    if request.measured:
        found = files.read_measured(request.measured, task, shape, len(seeds), known)
    else:
        mask = request.task_settings.mask if request.task == "inpaint" else ""
        mask = "" if mask in tasks.DRAWN else mask
        found = files.read_input(request.input, shape, len(seeds), known, mask)
    count = len(found.values)
    seeds = seeds if request.several else seeds[:count]
    rows = np.arange(len(seeds)) % count
    if not classes or label is not None:
        labels = generate.labels_for(seeds, classes if label is None else others, label)
    elif found.labels is not None:
        labels = found.labels[rows]
    elif run.config.data.label_dropout:
        labels = np.full(len(seeds), -1, np.int32)
    else:
        option = "--measured" if request.measured else "--input"
        raise ConfigError(
            f"--label: not given, and {option} has no classes of the model's; expected the images' "
            "class"
        )
    make = taken if request.measured else measure
    made = make(task, request.task_settings, found.values, seeds[:count])
    about: dict[str, Any]
    about = {"measured": request.measured} if request.measured else {"input": request.input}
    about |= {"pictures": count, **task.about}
    if found.total > count:
        about["pictures_left"] = found.total - count
    made = dataclasses.replace(made, names=found.names, about=about).take(rows)
    coder = {"coder": run.model.autoencoder, "decoder": (run.buffers or {}).get(VAE)}
    return dataclasses.replace(made, seeds=seeds, **coder), labels


def _open_discriminator(
    chosen: dg.Settings, run: TrainedModel, session: Session, request: Request
) -> Guidance:
    """DG's guidance by the discriminator of a training folder. Only options that were given are
    words: the preset's weights are those of its solver, also where they are equal.
    """
    from ogdm_jax.discriminator.guidance import Use, open_guidance  # only where it is needed

    other = session.settings.get("cfg")
    weight: float | None = 1.0
    if other is not None:  # samples that are trained on have no window
        weight = None if other.window else other.weight
    use = Use(run, session.sampling, session.churn, weight)
    words = {name: value for name, value in vars(chosen).items() if f"dg.{name}" in request.said}
    folder, window = words.pop("discriminator", ""), words.pop("window", None)
    if window is not None:
        times = dg.vp_time(np.minimum(np.asarray(window, np.float64), dg.vp_sigma(np.float64(1))))
        words |= {"time_min": float(times[0]), "time_max": float(times[1])}
    return open_guidance(folder, use=use, labels=session.labels, preset=request.preset, **words)
