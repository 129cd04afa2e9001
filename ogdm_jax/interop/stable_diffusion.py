"""A Stable Diffusion model of others: a folder of diffusers or a single file of LDM, with its parts
(arXiv 2112.10752).

What a single file does not hold, or does not say, is asked for and never guessed.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from etils import epath

from ogdm_jax import places, records
from ogdm_jax.config import Config, ConfigError, Sample, effects, require
from ogdm_jax.data.tokens import START, Tokenizer, open_tokenizer
from ogdm_jax.interop import diffusers, export, recognise_latent
from ogdm_jax.interop.pretrained import Pretrained, load_pretrained
from ogdm_jax.networks import CLIPText, UNet2DCondition

INDEX, TOKENIZER, FILES = "model_index.json", "tokenizer", (".safetensors", ".ckpt")
PREDICTIONS = {"epsilon": "adm", "v_prediction": "v"}
_SCHEDULES = {
    ("scaled_linear", 0.00085, 0.012): "scaled_linear",
    ("linear", 0.0001, 0.02): "linear",
    ("squaredcos_cap_v2", None, None): "cosine",
}
_GRIDS = ("leading", "trailing", "linspace")
# class -> (solver, spacing where the file does not say, the default of set_alpha_to_one)
_SOLVERS: dict[str, tuple[str, str, bool]] = {
    "DDIMScheduler": ("ddim", "leading", True),
    "PNDMScheduler": ("plms", "leading", False),
    "DDPMScheduler": ("ancestral", "leading", True),
    "EulerDiscreteScheduler": ("euler", "linspace", True),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", "linspace", True),
    "UniPCMultistepScheduler": ("unipc", "linspace", True),
}
# What a single file is sampled by: the default of its published folder.
_OF_FILES = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}
_OF_FILES |= {"beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True}
# Fields that `scheduler_settings` reads, and those without effect where the others are as here.
_READ = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"}
_READ |= {"prediction_type", "timestep_spacing", "set_alpha_to_one", "rescale_betas_zero_snr"}
_READ |= {"clip_sample_range", "dynamic_thresholding_ratio", "euler_at_final", "flow_shift"}
_READ |= {"sample_max_value", "time_shift_type"}
# Fields that change the numbers, and what the solvers here do; another value is said.
_HERE: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "clip_sample": (False,),
    "disable_corrector": ([],),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf, None),
    "lower_order_final": (True,),
    "predict_x0": (True,),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "skip_prk_steps": (True,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": ("midpoint",),
    "steps_offset": (1,),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "variance_type": ("fixed_small", None),
}
_SIGMAS = [f"use_{name}_sigmas" for name in ("beta", "exponential", "flow", "karras")]
_HERE |= dict.fromkeys([*_SIGMAS, "use_dynamic_shifting", "use_lu_lambdas"], (False, None))
_ADVICE = {"use_karras_sigmas": "; --grid edm has such levels"}
_STEPS = 50  # as diffusers' pipeline has by default
_SPECIAL = ("tokenizer_config.json", "special_tokens_map.json")
_WORDS = (*_SPECIAL, "tokenizer.json", "merges.txt", "vocab.json")  # last what makes it whole
# model_index.json: part -> (library, class)
_PARTS: dict[str, tuple[str | None, str | None]] = {
    "feature_extractor": (None, None),
    "image_encoder": (None, None),
    "safety_checker": (None, None),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


@dataclasses.dataclass(frozen=True)
class StableDiffusion:
    """The parts of a model.

    Attributes:
      unet, vae, text: networks with their weights, {} where these were not asked for.
      tokenizer: of the text encoder.
      settings: {"group.key": value} of the configuration: process and sampler.
      notes: what was taken and what was changed; one sentence each.
    """

    unet: Pretrained
    vae: Pretrained
    text: Pretrained
    tokenizer: Tokenizer
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def is_model(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of diffusers or may be a single file of LDM."""
    where = places.place(path)
    return (where.suffix in FILES and where.is_file()) or (where / INDEX).is_file()


def open_model(
    path: str | os.PathLike,
    vae: str = "",
    tokenizer: str = "",
    prediction: str = "",
    field: str = "--workdir",
    wanted: Sequence[str] = ("unet", "vae", "text_encoder"),
) -> StableDiffusion:
    """Reads a model.

    Args:
      path: a folder of diffusers with model_index.json, or a single file of LDM.
      vae: file or folder of the autoencoder, in place of the model's own.
      tokenizer: folder of the tokenizer's files, in place of the model's own.
      prediction: "epsilon" or "v_prediction", which a single file does not say.
      field: the option or setting that names the path, for messages.
      wanted: the parts whose weights are read.

    Raises:
      ConfigError: something is missing, contradicts what is given, or is not offered.
      ValueError: a file that cannot be read, see `load_pretrained`.
    """
    where = places.local(path, field)
    scheduler, of_text = dict(_OF_FILES), None
    if where.is_dir():
        kind = records.read(where / INDEX, dict, field).get("_class_name")
        if kind not in ("StableDiffusionPipeline", "FlaxStableDiffusionPipeline"):
            raise ConfigError(
                f"{field}: '{path}' is a {kind}; expected a StableDiffusionPipeline (1.x, 2.x)"
            )
        scheduler = records.read(where / "scheduler" / "scheduler_config.json", dict, field)
        parts = {name: where / name for name in ("unet", "vae", "text_encoder")}
        tokens, of_text = Path(tokenizer or where / TOKENIZER), _pad(where / TOKENIZER)
    else:
        parts = dict.fromkeys(("unet", "vae", "text_encoder"), where)
        if not tokenizer:
            raise ConfigError(
                f"--tokenizer: not given, and a single file ('{path}') has none; expected the "
                "folder of vocab.json and merges.txt, or of tokenizer.json"
            )
        tokens = Path(tokenizer)
    told = scheduler.get("prediction_type") if where.is_dir() else None
    if prediction and told and prediction != told:
        raise ConfigError(f"--prediction: {prediction} given, and the model says {told}")
    unet = load_pretrained(parts["unet"], "sd_unet", weights="unet" in wanted)
    context = cast(UNet2DCondition, unet.network).context_dim
    first = "epsilon" if context == recognise_latent.CONTEXT_1 else ""
    scheduler["prediction_type"] = prediction or told or first
    if not scheduler["prediction_type"]:
        raise ConfigError(
            "--prediction: not given, and the file of a Stable Diffusion 2 does not say; expected "
            "epsilon (2.0-base, 2.1-base) or v_prediction (2.0, 2.1)"
        )
    how: dict[str, Any] = _depth(where, context) | {"weights": "text_encoder" in wanted}
    encoder = load_pretrained(parts["text_encoder"], "clip_text", **how)
    text = cast(CLIPText, encoder.network)
    if text.width != context:
        raise ConfigError(
            f"{field}: the text encoder's tokens have {text.width} numbers, the U-Net takes "
            f"{context}; expected parts of one model"
        )
    coder = load_pretrained(vae or parts["vae"], "autoencoder", weights="vae" in wanted)
    words = open_words(tokens, text.positions, context, of_text)
    settings, said = scheduler_settings(scheduler)
    network: Any = unet.network
    read = {"unet": unet, "vae": coder, "text_encoder": encoder}
    notes = [f"{name}: {note}" for name, part in read.items() for note in part.notes]
    return StableDiffusion(
        unet, coder, encoder, words, _network(network, text) | settings, (*notes, *said)
    )


def open_words(
    folder: Path | epath.Path, length: int, context: int, pad: str | None = None
) -> Tokenizer:
    """The tokenizer of a folder, for a text encoder whose tokens have `context` numbers; pad fills
    rows: as its files say it, else the token of Stable Diffusion 1 or 2.
    """
    pad = (_pad(folder) if pad is None else pad) or (
        "" if context == recognise_latent.CONTEXT_1 else "!"
    )
    return open_tokenizer(folder, length, pad or None)


def _depth(where: Path, context: int) -> dict[str, Any]:
    """Of open_clip's text encoder in a single file the last layer is left out."""
    return {} if where.is_dir() or context == recognise_latent.CONTEXT_1 else {"depth": 23}


def _pad(folder: Path | epath.Path) -> str:
    """The token that fills rows, as a folder's tokenizer says it; "" where it does not.

    As in transformers, special_tokens_map.json overrides a tokenizer_config.json that lists no
    added tokens: of Stable Diffusion 2.1 it alone says "!", as the model was trained.
    """
    config, special = (
        records.read(file, dict, "tokenizer") if file.is_file() else {}
        for file in (folder / name for name in _SPECIAL)
    )
    token = (config if "added_tokens_decoder" in config else config | special).get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token != START else ""


def _network(unet: UNet2DCondition, text: CLIPText) -> dict[str, Any]:
    """config.network of a U-Net and its text encoder.

    Raises:
      ConfigError: a U-Net that no setting describes.
    """
    widths, heads = unet.widths, unet.heads
    one = len(set(heads)) == 1 and not unet.linear_projection
    wide = {width // count for width, count in zip(widths, heads)}
    last = (True,) * (len(widths) - 1) + (False,)
    if tuple(unet.attends) != last or not (one or len(wide) == 1):
        raise ConfigError(
            f"--workdir: a U-Net with heads {tuple(heads)} of widths {tuple(widths)} and attention "
            f"{tuple(unet.attends)}; expected all levels but the last to attend, with heads of one "
            "number or of one width"
        )
    return {
        "network.kind": "sd",
        "network.model_channels": widths[0],
        "network.channel_mult": tuple(width / widths[0] for width in widths),
        "network.num_blocks": unet.num_blocks,
        "network.num_heads": heads[0] if one else 1,
        "network.head_channels": 0 if one else wide.pop(),
        "network.context": unet.context_dim,
        "network.groups": unet.groups,
        "network.text_layers": text.depth,
        "network.text_heads": text.heads,
        "network.text_hidden": text.hidden,
        "network.text_vocabulary": text.vocabulary,
        "network.text_quick": text.quick,
    }


def scheduler_settings(scheduler: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """({"group.key": value} of precondition and sample, notes) of a scheduler_config.json.

    As in diffusers' pipeline the lowest step of leading spacing is 1 and x0_hat is not clipped,
    whatever the file says.

    Raises:
      ConfigError: betas or a prediction that are not offered.
    """
    ends = scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
    name = scheduler.get("beta_schedule", "linear")
    ends = (None, None) if name == "squaredcos_cap_v2" else ends
    steps = scheduler.get("num_train_timesteps", 1000)
    predicts = scheduler.get("prediction_type", "epsilon")
    # compared, not looked up: a file may have a list where a word or a number belongs
    known = [ours for theirs, ours in _schedules(steps).items() if theirs == (name, *ends)]
    if not known or scheduler.get("trained_betas") is not None:
        raise ConfigError(
            f"scheduler_config.json: betas {name} from {ends[0]} to {ends[1]} of {steps} steps "
            "given; expected scaled_linear from 0.00085 to 0.012 or linear from 0.0001 to 0.02, "
            "both times 1000 / steps, or squaredcos_cap_v2"
        )
    if predicts not in [*PREDICTIONS]:
        raise ConfigError(
            f"scheduler_config.json: prediction_type {predicts!r} given; expected "
            f"{' or '.join(PREDICTIONS)}"
        )
    theirs = str(scheduler.get("_class_name"))
    solver, spacing, to_zero = _SOLVERS.get(theirs, _SOLVERS["DDIMScheduler"])
    spacing = scheduler.get("timestep_spacing", spacing)
    if spacing not in [*_GRIDS]:
        raise ConfigError(
            f"scheduler_config.json: timestep_spacing {spacing!r} given; expected one of "
            f"{', '.join(_GRIDS)}"
        )
    zero = bool(scheduler.get("rescale_betas_zero_snr", False))
    if zero and predicts == "epsilon":
        raise ConfigError(
            "scheduler_config.json: rescale_betas_zero_snr true with prediction_type 'epsilon' "
            "given: at pure noise such a model has no first step; expected false, or v_prediction"
        )
    first = not scheduler.get("set_alpha_to_one", to_zero) and solver in ("ddim", "plms")
    own, left = _of_solver(solver, scheduler)
    return {
        "precondition.kind": PREDICTIONS[predicts],
        "precondition.schedule": known[0],
        "precondition.diffusion_steps": steps,
        "precondition.interpolate": True,
        "precondition.zero_terminal": zero,
        "sample.solver": solver,
        "sample.steps": _STEPS,
        "sample.grid": spacing,
        "sample.offset": 1,
        "sample.start": "ve" if solver == "euler" and spacing != "leading" else "vp",
        "sample.end": "first" if first else "zero",
        **own,
    }, _left_out(theirs, left)


def _schedules(steps: Any) -> dict[tuple[Any, ...], str]:
    """_SCHEDULES of T steps: ours are times 1000 / T, diffusers' are as its files say."""
    if type(steps) is not int or steps < 1:
        return {}
    of = lambda end: end and round(end * 1000 / steps, 12)
    return {(name, of(a), of(b)): ours for (name, a, b), ours in _SCHEDULES.items()}


def _of_solver(solver: str, scheduler: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"sample.key": value} that one solver alone has, the fields that are left)."""
    left, kind = dict(scheduler), scheduler.get("algorithm_type")
    if solver == "dpmpp_2m" and kind == "sde-dpmsolver++":
        del left["algorithm_type"]
        return {"sample.solver": "dpmpp_2m_sde", "sample.eta": 1.0}, left
    if solver != "unipc":
        return {}, left
    own = {"sample.order": left.pop("solver_order", 2), "sample.bh": left.pop("solver_type", "bh2")}
    return own, left


def _left_out(theirs: str, scheduler: Mapping[str, Any]) -> list[str]:
    """What of a scheduler is not followed, a sentence each."""
    said = []
    if theirs not in _SOLVERS:
        said.append(f"sampled by ddim: the scheduler {theirs} is not offered")
    elif theirs == "PNDMScheduler":
        scheduler = {"skip_prk_steps": False, **scheduler}
    for name, value in scheduler.items():
        here = _HERE.get(name)
        if here is not None and value not in here:
            other = f"; here {here[0]!r}{_ADVICE.get(name, '')}"
            said.append(f"left out: {name} {value!r} of the scheduler{other}")
        elif here is None and name not in _READ and not name.startswith("_"):
            said.append(f"left out: {name} {value!r} of the scheduler, which is not known")
    return said


def written(folder: epath.Path) -> list[epath.Path]:
    """What `write` makes in a folder."""
    parts = [name for name, (library, _) in _PARTS.items() if library]
    return [folder / name for name in (INDEX, "scheduler", *parts)]


def copy_words(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the tokenizer's files of a folder to another one."""
    for name in _WORDS:
        file = places.place(source) / TOKENIZER / name
        if file.is_file():
            with places.written(places.place(target) / TOKENIZER / name) as new:
                new.write_bytes(file.read_bytes())


def write(
    folder: str | os.PathLike,
    config: Config,
    networks: Mapping[str, tuple[Any, Any]],
    words: str | os.PathLike,
) -> str:
    """Writes a model as diffusers' StableDiffusionPipeline.from_pretrained(folder) reads it.

    Args:
      folder: made where it is missing.
      config: of the run: its process and sampler become the scheduler.
      networks: {"unet", "text_encoder", "vae": (network, variables)}.
      words: a folder whose tokenizer is copied.

    Returns:
      What `unwritten` says of the sampler.

    Raises:
      ConfigError: a process that no scheduler of diffusers has.
    """
    scheduler = scheduler_config(config)
    for name, (network, variables) in networks.items():
        state = export.to_torch(network, variables)
        diffusers.write(places.place(folder) / name, network, state)
    copy_words(words, folder)
    parts = _PARTS | {"scheduler": ("diffusers", scheduler["_class_name"])}
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    index[diffusers.MARK] = diffusers.OURS
    about = {"scheduler/scheduler_config.json": scheduler, INDEX: index}
    for name, content in about.items():  # the index comes last: it makes a model of the folder
        records.write(places.place(folder) / name, content, indent=1)
    return unwritten(config, scheduler)


def scheduler_config(config: Config) -> dict[str, Any]:
    """The scheduler_config.json of a process and a sampler, which `scheduler_settings` reads back:
    that of DDIM for solvers that diffusers does not have.

    Raises:
      ConfigError: no discrete process, a learned variance, or times that diffusers does not tell.
    """
    process, sampler = config.precondition, config.sample
    predicts = {kind: name for name, kind in PREDICTIONS.items()}.get(process.kind, "")
    expected = "adm or v, without learned variance, for a folder of diffusers"
    good = bool(predicts) and not process.learned_variance
    require(good, "precondition.kind", process.kind, expected)
    scaled, steps = process.rescale_timesteps, process.diffusion_steps
    plain, field = not scaled or steps == 1000, "precondition.rescale_timesteps"
    require(plain, field, scaled, "false for a folder of diffusers, whose networks are told t")
    name, *ends = next(key for key, ours in _schedules(steps).items() if ours == process.schedule)
    zero, end = process.zero_terminal and process.kind == "v", sampler.end == "zero"
    own: dict[str, dict[str, Any]] = {
        "ddim": {"clip_sample": False, "set_alpha_to_one": end},
        "plms": {"skip_prk_steps": True, "set_alpha_to_one": end},
        "ancestral": {"clip_sample": False},
        "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
        "unipc": {"solver_order": sampler.order, "solver_type": sampler.bh},
    }
    solvers = {ours: theirs for theirs, (ours, *_) in _SOLVERS.items()}
    solver = sampler.solver if sampler.solver.removesuffix("_sde") in solvers else "ddim"
    solver = "ddim" if zero and solver == "plms" else solver  # PNDMScheduler has no such betas
    made: dict[str, Any] = {
        "_class_name": solvers[solver.removesuffix("_sde")],
        "beta_schedule": name,
        "num_train_timesteps": steps,
        "prediction_type": predicts,
        "steps_offset": sampler.offset,
        "timestep_spacing": sampler.grid if sampler.grid in _GRIDS else "trailing",
        **own.get(solver, {}),
    }
    made |= {"rescale_betas_zero_snr": zero} if solver != "plms" else {}
    return made | (dict(zip(("beta_start", "beta_end"), ends)) if ends[0] is not None else {})


def unwritten(config: Config, scheduler: Mapping[str, Any]) -> str:
    """A sentence that names the settings of config.sample which `scheduler_settings` does not give
    back of a scheduler; "" where there are none.
    """
    given, found = vars(config.sample), scheduler_settings(scheduler)[0]
    back = vars(Sample()) | {key.removeprefix("sample."): value for key, value in found.items()}
    without = {key.removeprefix("sample.") for key in effects.idle(config, {})}
    without |= {"every", "num"}
    without |= {"sigma_min", "sigma_max"} if config.sample.grid in _GRIDS else set()
    lost = [
        f"{name} {value!r} (read as {back[name]!r})"
        for name, value in given.items()
        if name not in without and value != back[name]
    ]
    which = ", ".join(lost)
    return f"the scheduler of diffusers does not hold these of sample: {which}" if lost else ""
