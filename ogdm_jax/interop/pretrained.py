"""Networks with the weights of checkpoints that other programs wrote."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import models
from ogdm_jax.brief import brief
from ogdm_jax.config import Precondition
from ogdm_jax.diffusion import precondition
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.process import SCHEDULES, betas
from ogdm_jax.interop import diffusers, export, kinds, names_score_sde, recognise, recognise_latent
from ogdm_jax.interop.inert import Module, quote
from ogdm_jax.interop.parts import Part
from ogdm_jax.interop.settings import PROCESS, check_about, check_settings
from ogdm_jax.interop.torch_records import Tensor
from ogdm_jax.interop.torch_state import TorchFile, open_torch
from ogdm_jax.networks import SongUNet, UNet2DCondition
from ogdm_jax.networks.tapped import apply_compiled
from ogdm_jax.startup import raised_here
from ogdm_jax.typing import Array, PyTree

_State = Mapping[str, np.ndarray]
_CLASSES = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
# of VPPrecond and iDDPMPrecond, as published
_CONSTANTS = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "C_1": 0.001, "C_2": 0.008}
_LISTED = 6  # names of each kind of mismatch that a message shows
# tensors of a network; the published ones have fewer than 1,000, and each layer is traced
_MOST_TENSORS = 5000
# errors of an impossible network, raised here or in JAX: names promise what shapes do not keep
_MISFIT = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError)
_MISFIT += (flax.errors.FlaxError,)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network, its variables, and what the file says about them. Unpacks as (network, variables).

    Attributes:
      kind: one of recognise.KINDS.
      network: a flax module.
      variables: {"params": ...}, and "buffers" where the network has any.
      precondition: one of settings.PRECONDITIONS where the file says so or its kind implies it;
        else None.
      sigma_data: of edm.
      dropout: of the original training where the file says so; the network itself always has 0
        unless a setting asks.
      schedule: of adm and v, the betas: linear, cosine or scaled_linear.
      process: settings of config.precondition beside it, where the file says them
        (`settings.PROCESS`).
      notes: what was taken of the file, what else it holds, what was ignored and converted; one
        sentence each.
      images: settings of config.data that say what it was trained on, of a file that a training
        folder was exported to.
    """

    kind: str
    network: nn.Module
    variables: PyTree
    precondition: str | None = None
    sigma_data: float = 0.5
    dropout: float | None = None
    schedule: str = "linear"
    process: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    images: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    __repr__ = brief

    def __iter__(self) -> Iterator[Any]:
        return iter((self.network, self.variables))

    def denoiser(self, augment: Array | None = None) -> Denoiser:
        """The denoiser under the file's `preconditioning`.

        augment: [B,9] augmentation labels of the batch that it will be asked about, for networks
          that were trained with them.
        """
        bound: dict[str, Any] = {} if augment is None else {"augment": augment}
        on_device = jax.tree.map(jnp.asarray, self.variables)  # once, not at each call
        apply = functools.partial(apply_compiled, self.network, on_device)

        def network_fn(x: Array, c_noise: Array, label: PyTree = None) -> Array:
            return cast(Array, apply(x, c_noise, label, **bound))

        def taps(x: Array, c_noise: Array, label: PyTree, at: str) -> PyTree:
            return apply(x, c_noise, label, at=at, method="features", **bound)

        kind = self.preconditioning()
        if kind == "edm":
            return precondition.edm(network_fn, self.sigma_data, taps=taps)
        network: Any = self.network
        learned = kind == "adm" and network.out_channels == 2 * network.img_channels
        told = {"schedule": self.schedule, "learned_variance": learned, **self.process}
        return models.wrap(Precondition(kind, **told))(network_fn, taps=taps)

    def preconditioning(self) -> str:
        """The file's preconditioning, EDM's where it does not say.

        Raises:
          ValueError: a score_sde network with time steps: VP, sub-VP and both discrete processes
            have the same tensors; a U-Net of Stable Diffusion 2.
        """
        if self.kind == "score_sde" and self.precondition is None:
            raise ValueError(
                "precondition: the tensors of this score_sde network do not show it; give vp "
                "(continuous), subvp, adm (the discrete VP) or smld (the discrete VE), such as "
                "--precondition vp"
            )
        if self.kind == "sd_unet" and self.precondition is None:
            raise ValueError(
                "precondition: the tensors of Stable Diffusion 2's U-Nets do not show it; give adm "
                "(the noise: 2.0-base, 2.1-base) or v (2.0 and 2.1 for 768 pixels)"
            )
        return self.precondition or "edm"


def from_torch(
    state: Mapping[str, np.ndarray],
    kind: str | None = None,
    *,
    allow_nan: bool = False,
    **settings: Any,
) -> tuple[nn.Module, PyTree]:
    """(network, variables) of a PyTorch state dict; variables are numpy arrays, at least float32.

    Args:
      state: {name: array}, as read_torch gives it. Names may have a prefix, such as "module.";
        counts and tables of noise beside the network's tensors are left out.
      kind: edm (SongUNet, DhariwalUNet; also OGDM_edm's and STF's), adm (OpenAI's U-Net, also
        OGDM_adm's), score_sde (NCSN++ and DDPM++ of that code), adm_encoder (OpenAI's classifiers,
        DG's heads), ogdm_discriminator, inception; dit, sd_unet, autoencoder, clip_text (latent
        models); None recognises it from the names.
      allow_nan: take weights that are not finite.
      **settings: attributes of the network that replace what names and shapes show, such as
        dropout=0.1, or add what they cannot show: img_resolution, head_channels or num_heads, and
        qkv_order (legacy or new) of OpenAI's models.

    Raises:
      ValueError: an unknown kind or setting, a setting that the tensors do not show, tensors that
        are missing, unexpected or of other shapes (listed, in one sentence), or numbers that are
        not finite or no floating-point numbers.
    """
    state = _plain(state, kind)
    found = match(state, kind, **settings)
    _check_numbers({name: state[name] for name in found.needed}, allow_nan)
    return found.network, found.convert(state, found.network)


def _check_numbers(state: _State, allow_nan: bool) -> None:
    """Raises ValueError naming the first of a network's tensors that it cannot compute with."""
    for name, value in state.items():
        inexact = jnp.issubdtype(value.dtype, jnp.floating)
        if value.size > 1 and not inexact:
            raise ValueError(
                f"state: {quote(name)} is {value.dtype}, no floating-point numbers (quantised "
                "weights?); expected the checkpoint from before that"
            )
    bad = [
        name
        for name, value in state.items()
        if not np.isfinite(value if value.dtype.kind == "f" else value.astype(np.float32)).all()
    ]
    if bad and not allow_nan:
        raise ValueError(
            f"state: {quote(bad[0])} holds numbers that are not finite, as do {len(bad)} of "
            f"{len(state)} tensors; expected a checkpoint from before that, or allow_nan "
            "(--allow-nan) to take them as they are"
        )


def match(state: Mapping[str, np.ndarray], kind: str | None = None, **settings: Any) -> kinds.Match:
    """A state dict's network and the function that converts it, from names and shapes alone.

    Arguments and errors are those of from_torch.
    """
    state = _plain(state, kind)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    kind = kind or recognise.kind_of(shapes)
    if kind not in kinds.RECOGNISED:
        raise ValueError(f"kind: {kind!r} given; expected one of {', '.join(recognise.KINDS)}")
    known = {of: None for _, of in recognise.places(shapes)}
    if known and kind not in known:
        raise recognise.UnrecognisedError(
            f"state: holds a network of kind {', '.join(known)}; expected {kind}"
        )
    if len(shapes) > _MOST_TENSORS:
        raise recognise.UnrecognisedError(
            f"state: has {len(shapes)} tensors; expected at most {_MOST_TENSORS}"
        )
    cls, recognised = kinds.RECOGNISED[kind]
    check_settings(cls, settings)
    try:
        found = recognised(state, shapes, settings)
    except _MISFIT as error:
        if isinstance(error, ValueError) and raised_here(error):
            raise
        what = "shapes, or the settings given," if settings else "shapes"
        raise recognise.UnrecognisedError(
            f"state: has names of the {kind} network, but its {what} make none "
            f"({type(error).__name__})"
        ) from error
    extra = _compare(kind, shapes, found.needed, found.optional)
    kept = lambda full: {name: value for name, value in full.items() if name not in extra}
    return found._replace(convert=lambda full, network: found.convert(kept(full), network))


def load_pretrained(
    path: str | os.PathLike | TorchFile,
    kind: str | None = None,
    entry: str | None = None,
    allow_nan: bool = False,
    weights: bool = True,
    **settings: Any,
) -> Pretrained:
    """Reads a checkpoint file and makes its network: read_torch, then from_torch.

    Preconditioning, sigma_data and dropout come from EDM's pickles, from export's JSON file beside
    a .safetensors file, or from iDDPM's table `u`; the schedule of OpenAI's U-Nets also from
    `betas` beside their tensors; a plain state dict does not say
    (precondition="vp" and the like may be given; of "v" also schedule, zero_terminal; of "flow"
    time_scale). OpenAI's U-Nets are "adm" with the published schedule, linear for unknown ones.
    score_sde's networks with Fourier features are "ve" up to twice the largest of the file's
    `sigmas`: its images lie in [0, 1], ours in [-1, 1].

    Args:
      path: see read_torch; also what open_torch gives.
      entry: see read_torch.
      kind: see from_torch.
      allow_nan: see from_torch.
      weights: False reads what the network is alone: its variables are {}.
      **settings: see from_torch; also precondition, sigma_data, schedule and the names of
        `settings.PROCESS`.

    Raises:
      UnsafeFileError: the file is refused.
      ValueError: see from_torch.
    """
    file = path if isinstance(path, TorchFile) else open_torch(path)
    about = export.read_about(file.path) or {}
    part, others = file.part(entry, kind or about.get("kind"))
    about, state = about or describe(part), file.arrays(part, copy=False)
    for name in ("precondition", "sigma_data", "schedule", *PROCESS):
        about[name] = settings.pop(name, about.get(name))
    check_about(about)
    kind = kind or about.get("kind") or part.kind
    if kind == "adm" and about["schedule"] is None:
        about |= {name: about[name] or value for name, value in _of_betas(file, part).items()}
    if about["precondition"] is None and ("u" in state or "model.u" in state):
        about["precondition"] = "iddpm"
    more = (about.get("settings") or {}) | settings
    try:
        if weights:
            network, variables = from_torch(state, kind, allow_nan=allow_nan, **more)
        else:
            network, variables = match(state, kind, **more).network, {}
    except ValueError as error:
        if not str(error).startswith("state: "):
            raise
        said = f"{file.path}: {str(error).removeprefix('state: ')}"
        raise type(error)(said) from error.__cause__
    kind = kind or recognise.kind_of({name: value.shape for name, value in state.items()})
    sigma_data = 0.5 if about["sigma_data"] is None else about["sigma_data"]
    said = notes(file, part, others, state)
    if kind == "score_sde":
        if cast(SongUNet, network).embedding_type == "fourier":
            about["precondition"] = about["precondition"] or "ve"
        if about["precondition"] in ("ve", "smld"):
            about["sigma_max"] = about["sigma_max"] or names_score_sde.sigma_max(state)
        said += names_score_sde.supposed(cast(SongUNet, network), more)
    check_about(about)
    supposed = {n: v for n, v in _published(kind, network).items() if about[n] is None}
    about |= supposed
    if kind != "sd_unet" and supposed:  # whose scheduler says them
        words = ", ".join(f"{name} {value}" for name, value in supposed.items())
        how = "--precondition, --set schedule=..."
        said += (f"not said by the tensors, taken as published: {words} ({how})",)
    return Pretrained(
        kind,
        network,
        variables,
        about["precondition"],
        sigma_data,
        about.get("dropout"),
        about["schedule"] or "linear",
        {name: about[name] for name in PROCESS if about[name] is not None},
        said,
        _images(about),
    )


def _published(kind: str, network: nn.Module) -> dict[str, str | None]:
    """Preconditioning and schedule of the published networks of a kind."""
    if kind == "sd_unet":  # 1.x predicts the noise; of 2.x both are published
        context = cast(UNet2DCondition, network).context_dim
        first = "adm" if context == recognise_latent.CONTEXT_1 else None
        return {"precondition": first, "schedule": "scaled_linear"}
    if kind in ("adm", "dit"):
        return {"precondition": "adm", "schedule": recognise.schedule_of(network)}
    return {}


def _images(about: Mapping[str, Any]) -> dict[str, Any]:
    """What our own export says of the images, where it is of the types that settings have."""
    config = about.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    kinds = {"source": str, "data_dir": str, "resolution": int, "channels": int}
    if not isinstance(data, dict) or not data.get("source"):
        return {}
    return {name: data[name] for name, kind in kinds.items() if type(data.get(name)) is kind}


def describe(part: Part) -> dict[str, Any]:
    """What a part's object says beside its tensors: any of precondition, sigma_data, dropout."""
    if not isinstance(part.node, Module) or part.node.name not in _CLASSES:
        return {}
    for name, published in _CONSTANTS.items():
        if (value := part.node.state.get(name, published)) != published:
            raise ValueError(
                f"{part.node.name}: {name} {quote(repr(value))} given; expected {published}"
            )
    arguments = part.node.state.get("_init_kwargs")
    dropout = arguments.get("dropout") if isinstance(arguments, dict) else None
    found = {
        "precondition": _CLASSES[part.node.name],
        "sigma_data": part.node.state.get("sigma_data"),
        "dropout": dropout,
    }
    return {name: value for name, value in found.items() if isinstance(value, str | float | int)}


def _of_betas(file: TorchFile, part: Part) -> dict[str, Any]:
    """The schedule and the steps of the `betas` that training programs keep beside a U-Net.

    Raises:
      UnrecognisedError: other betas than ours, or the U-Net of a latent diffusion model.
    """
    beside = part.node if isinstance(part.node, dict) else {}
    if any(str(name).startswith("first_stage_model.") for name in beside):
        raise recognise.UnrecognisedError(
            f"{file.path}: holds the U-Net of a latent diffusion model without texts, beside its "
            "autoencoder (first_stage_model), which is not offered; expected a model of pixels, or "
            "Stable Diffusion"
        )
    found = [leaf for name, leaf in beside.items() if str(name).rpartition(".")[2] == "betas"]
    rows = [leaf for leaf in found if isinstance(leaf, Tensor) and len(leaf.shape) == 1]
    if not rows or not 1 < rows[0].shape[0] <= 10**5:
        return {}
    table = dataclasses.replace(part, names={"betas": rows[0]})
    stored = file.arrays(table, copy=False)["betas"]
    numbers, steps = stored.astype(np.float64), len(stored)
    for name in SCHEDULES:
        if np.allclose(numbers, betas(name, steps), rtol=1e-2, atol=1e-7):  # half precision, too
            return {"schedule": name, "diffusion_steps": steps}
    raise recognise.UnrecognisedError(
        f"{file.path}: its betas, {numbers[0]:g} to {numbers[-1]:g} in {steps} steps, are none of "
        f"{', '.join(SCHEDULES)}; expected such, or schedule=... (--set schedule=linear), which "
        "takes others in their place"
    )


def notes(file: TorchFile, part: Part, others: list[Part], state: _State) -> tuple[str, ...]:
    """Sentences that say what was taken of a file, what else there is, and what was changed."""
    said = list(diffusers.taken(file.path))
    if part.entry or others:
        what = "averaged weights" if part.averaged else "weights"
        also = ", ".join(f"--entry {quote(other.entry)}" for other in others[:_LISTED])
        said.append(
            f"taken: the {what} at {quote(part.entry) or 'the top'}"
            + (f"; also there: {also}" if also else "")
        )
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    used = {"score_sde": "sigmas", "adm": "betas"}.get(part.kind or "")
    extra = [n for n in shapes if recognise.is_extra(n, shapes[n])]
    ignored = [n for n in (*extra, *part.beside) if n.rpartition(".")[2] != used]
    if ignored:
        said.append(f"ignored: {len(ignored)} tensors ({_some([*map(quote, ignored)])})")
    types = sorted({str(value.dtype) for name, value in state.items() if name not in extra})
    if types not in ([], ["float32"]):
        said.append(f"stored as {', '.join(types)}; computed with float32")
    return tuple(said)


def _some(items: list[str]) -> str:
    return ", ".join(items[:_LISTED]) + (", ..." if len(items) > _LISTED else "")


def _plain(state: _State, kind: str | None = None) -> dict[str, np.ndarray]:
    """The tensors under the prefix at which a known network lies.

    Raises:
      ValueError: there are several.
    """
    found = [(prefix, k) for prefix, k in recognise.places(state) if kind in (None, k)]
    if len({prefix for prefix, _ in found}) > 1:
        listed = ", ".join(quote(prefix) or "(none)" for prefix, _ in found[:_LISTED])
        raise ValueError(
            f"state: known networks lie under several prefixes of its names ({listed}); expected "
            "the tensors of one (load_pretrained takes entry=...)"
        )
    prefix = found[0][0] if found else ""
    return {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}


def _compare(
    kind: str, shapes: recognise.Shapes, expected: recognise.Shapes, optional: set[str]
) -> set[str]:
    """The tensors that are left out; raises ValueError listing what does not fit otherwise."""
    missing = [name for name in expected if name not in shapes]
    left = [name for name in shapes if name not in expected and name not in optional]
    extra = {name for name in left if recognise.is_extra(name, shapes[name])}
    unexpected = [quote(name) for name in left if name not in extra]
    wrong = [
        f"{n} {shapes[n]} instead of {e}"
        for n, e in expected.items()
        if n in shapes and tuple(shapes[n]) != tuple(e)
    ]
    misfits = {"missing": missing, "unexpected": unexpected, "misshapen": wrong}
    if found := [f"{len(items)} {k} ({_some(items)})" for k, items in misfits.items() if items]:
        raise ValueError(
            f"state: does not fit the {kind} network that it seems to be: {'; '.join(found)}"
        )
    return extra
