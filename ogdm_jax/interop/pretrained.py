"""Networks with the weights of checkpoints that other programs wrote."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import flax.errors
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ogdm_jax import models
from ogdm_jax.config import Precondition
from ogdm_jax.diffusion import precondition
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.interop import (
    export,
    names_adm,
    names_discriminator,
    names_edm,
    names_inception,
    recognise,
)
from ogdm_jax.interop.inert import Module, quote
from ogdm_jax.interop.names_shared import Entry
from ogdm_jax.interop.parts import Part
from ogdm_jax.interop.settings import PROCESS, check_about, check_settings
from ogdm_jax.interop.torch_state import TorchFile, open_torch
from ogdm_jax.networks import ADMEncoder, ADMUNet, InceptionV3, SongUNet, StyleGAN2Discriminator
from ogdm_jax.startup import raised_here
from ogdm_jax.typing import Array, PyTree

_State = Mapping[str, np.ndarray]
_Settings = dict[str, Any]
_Network = TypeVar("_Network", bound=nn.Module)
_CLASSES = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
_LISTED = 6  # names of each kind of mismatch that a message shows
# tensors of a network; the published ones have fewer than 1,000, and each layer is traced
_MOST_TENSORS = 5000
# errors of an impossible network, raised here or in JAX: names promise what shapes do not keep
_MISFIT = (
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    flax.errors.FlaxError,
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network, its variables, and what the file says about them. Unpacks as (network, variables).

    Attributes:
      kind: one of recognise.KINDS.
      network: a flax module.
      variables: {"params": ...}, and "buffers" where the network has any.
      precondition: edm, vp, ve, iddpm, adm, v or flow where the file says so or its kind implies
        it; else None.
      sigma_data: of edm.
      dropout: of the original training where the file says so; the network itself always has 0
        unless a setting asks.
      schedule: of adm and v, the betas: linear, cosine or scaled_linear.
      process: settings of config.precondition beside it, where the file says them
        (`settings.PROCESS`).
      notes: what was taken of the file, what else it holds, what was ignored and converted; one
        sentence each.
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

    def __iter__(self) -> Iterator[Any]:
        return iter((self.network, self.variables))

    def denoiser(self, augment: Array | None = None) -> Denoiser:
        """The denoiser under the file's preconditioning (EDM's where it does not say).

        augment: [B,9] augmentation labels of the batch that it will be asked about, for networks
          that were trained with them.
        """
        bound: dict[str, Any] = {} if augment is None else {"augment": augment}

        def network_fn(x: Array, c_noise: Array, label: PyTree = None) -> Array:
            return cast(Array, self.network.apply(self.variables, x, c_noise, label, **bound))

        def taps(x: Array, c_noise: Array, label: PyTree, at: str) -> PyTree:
            return self.network.apply(
                self.variables, x, c_noise, label, at=at, method="features", **bound
            )

        if self.precondition in (None, "edm"):
            return precondition.edm(network_fn, self.sigma_data, taps=taps)
        network: Any = self.network
        learned = self.precondition == "adm" and network.out_channels == 2 * network.img_channels
        told = {"schedule": self.schedule, "learned_variance": learned, **self.process}
        return models.wrap(Precondition(self.precondition, **told))(network_fn, taps=taps)


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
        OGDM_adm's), adm_encoder (OpenAI's classifiers, DG's heads), ogdm_discriminator, inception;
        None recognises it from the names.
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
    network, convert = match(state, kind, **settings)
    _check_numbers(state, allow_nan)
    return network, convert(state)


def _check_numbers(state: _State, allow_nan: bool) -> None:
    """Raises ValueError naming the first tensors that no network can compute with."""
    state = {n: v for n, v in state.items() if not recognise.is_extra(n, v.shape)}
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


def match(
    state: Mapping[str, np.ndarray], kind: str | None = None, **settings: Any
) -> tuple[nn.Module, Callable[[Mapping[str, np.ndarray]], PyTree]]:
    """A state dict's network and the function that converts it, from names and shapes alone.

    Arguments and errors are those of from_torch.
    """
    state = _plain(state, kind)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    kind = kind or recognise.kind_of(shapes)
    if kind not in _RECOGNISED:
        raise ValueError(f"kind: {kind!r} given; expected one of {', '.join(recognise.KINDS)}")
    if len(shapes) > _MOST_TENSORS:
        raise recognise.UnrecognisedError(
            f"state: has {len(shapes)} tensors; expected at most {_MOST_TENSORS}"
        )
    cls, recognised = _RECOGNISED[kind]
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
    return found.network, lambda full: found.convert(
        {name: value for name, value in full.items() if name not in extra}
    )


def load_pretrained(
    path: str | os.PathLike | TorchFile,
    kind: str | None = None,
    entry: str | None = None,
    allow_nan: bool = False,
    **settings: Any,
) -> Pretrained:
    """Reads a checkpoint file and makes its network: read_torch, then from_torch.

    Preconditioning, sigma_data and dropout come from EDM's pickles, from export's JSON file beside
    a .safetensors file, or from iDDPM's table `u`; a plain state dict does not say
    (precondition="vp" and the like may be given; of "v" also schedule, zero_terminal; of "flow"
    time_scale). OpenAI's U-Nets are "adm" with the published schedule, linear for unknown ones.

    Args:
      path: see read_torch; also what open_torch gives.
      entry: see read_torch.
      kind: see from_torch.
      allow_nan: see from_torch.
      **settings: see from_torch; also precondition, sigma_data, schedule and the names of
        `settings.PROCESS`.

    Raises:
      UnsafeFileError: the file is refused.
      ValueError: see from_torch.
    """
    file = path if isinstance(path, TorchFile) else open_torch(path)
    about = export.read_about(file.path) or {}
    part, others = file.part(entry, kind or about.get("kind"))
    about, state = about or describe(part), file.arrays(part)
    for name in ("precondition", "sigma_data", "schedule", *PROCESS):
        about[name] = settings.pop(name, about.get(name))
    check_about(about)
    if about["precondition"] is None and ("u" in state or "model.u" in state):
        about["precondition"] = "iddpm"
    kind = kind or about.get("kind") or part.kind
    more = (about.get("settings") or {}) | settings
    try:
        network, variables = from_torch(state, kind, allow_nan=allow_nan, **more)
    except ValueError as error:
        if not str(error).startswith("state: "):
            raise
        said = f"{file.path}: {str(error).removeprefix('state: ')}"
        raise type(error)(said) from error.__cause__
    kind = kind or recognise.kind_of({name: value.shape for name, value in state.items()})
    sigma_data = 0.5 if about["sigma_data"] is None else about["sigma_data"]
    if kind == "adm":
        about["precondition"] = about["precondition"] or "adm"
        about["schedule"] = about["schedule"] or recognise.schedule_of(network)
    return Pretrained(
        kind,
        network,
        variables,
        about["precondition"],
        sigma_data,
        about.get("dropout"),
        about["schedule"] or "linear",
        {name: about[name] for name in PROCESS if about[name] is not None},
        notes(part, others, state),
    )


def describe(part: Part) -> dict[str, Any]:
    """What a part's object says beside its tensors: any of precondition, sigma_data, dropout."""
    if not isinstance(part.node, Module) or part.node.name not in _CLASSES:
        return {}
    arguments = part.node.state.get("_init_kwargs")
    dropout = arguments.get("dropout") if isinstance(arguments, dict) else None
    found = {
        "precondition": _CLASSES[part.node.name],
        "sigma_data": part.node.state.get("sigma_data"),
        "dropout": dropout,
    }
    return {name: value for name, value in found.items() if isinstance(value, str | float | int)}


def notes(part: Part, others: list[Part], state: _State) -> tuple[str, ...]:
    """Sentences that say what was taken of a file, what else there is, and what was changed."""
    said = []
    if part.entry or others:
        what = "averaged weights" if part.averaged else "weights"
        also = ", ".join(f"--entry {quote(other.entry)}" for other in others[:_LISTED])
        said.append(
            f"taken: the {what} at {quote(part.entry) or 'the top'}"
            + (f"; also there: {also}" if also else "")
        )
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    extra = [name for name in shapes if recognise.is_extra(name, shapes[name])]
    ignored = [*extra, *part.beside]
    if ignored:
        some = ", ".join(map(quote, ignored[:_LISTED]))
        more = ", ..." if len(ignored) > _LISTED else ""
        said.append(f"ignored: {len(ignored)} tensors ({some}{more})")
    types = sorted({str(value.dtype) for name, value in state.items() if name not in extra})
    if types not in ([], ["float32"]):
        said.append(f"stored as {', '.join(types)}; computed with float32")
    return tuple(said)


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
    found = [
        f"{len(items)} {what} ({', '.join(items[:_LISTED])}"
        f"{', ...' if len(items) > _LISTED else ''})"
        for what, items in (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong))
        if items
    ]
    if found:
        raise ValueError(
            f"state: does not fit the {kind} network that it seems to be: {'; '.join(found)}"
        )
    return extra


class _Match(NamedTuple):
    """The network of a state dict, the tensors it needs, and how they become its variables."""

    network: nn.Module
    needed: Mapping[str, tuple[int, ...]]
    optional: set[str]  # names that the state may have beside them
    convert: Callable[[Mapping[str, np.ndarray]], PyTree]


# One function a kind: (state, shapes, the caller's settings) -> _Match.


def _traced(entries: Callable[..., list[Entry]], *network: Any) -> dict[str, tuple[int, ...]]:
    """{PyTorch name: shape} of entries(*network)."""
    return {entry.name: entry.torch_shape for entry in entries(*network)}


# a second or two for the published sizes; flax's modules can be hashed, but their type denies it
_shapes_of: Callable[..., dict[str, tuple[int, ...]]] = functools.lru_cache(maxsize=16)(_traced)


def _edm(state: _State, shapes: recognise.Shapes, settings: _Settings) -> _Match:
    network = names_edm.edm_network({"dropout": 0.0} | recognise.edm_settings(state) | settings)
    prefix = "" if any(name.startswith("model.") for name in shapes) else "model."
    needed = _shapes_of(names_edm.edm_entries, network).items()
    return _Match(
        network,
        {name.removeprefix(prefix): shape for name, shape in needed},
        set(filter(names_edm.is_constant, shapes)),
        lambda s: names_edm.edm_to_flax(s, network),
    )


def _adm(state: _State, shapes: recognise.Shapes, settings: _Settings) -> _Match:
    return _openai(ADMUNet, recognise.adm_settings(shapes, settings))


def _adm_encoder(state: _State, shapes: recognise.Shapes, settings: _Settings) -> _Match:
    return _openai(ADMEncoder, recognise.encoder_settings(shapes, settings))


def _openai(cls: type[ADMUNet | ADMEncoder], settings: _Settings) -> _Match:
    order = settings.pop("qkv_order")
    network = _make(cls, settings)
    needed = _shapes_of(names_adm.adm_entries, network, order)
    return _Match(network, needed, set(), lambda s: names_adm.adm_to_flax(s, network, order))


def _discriminator(state: _State, shapes: recognise.Shapes, settings: _Settings) -> _Match:
    found = names_discriminator.discriminator_settings(state, settings.get("t_dim", 2))
    network = _make(StyleGAN2Discriminator, found | settings)
    return _Match(
        network,
        _shapes_of(names_discriminator.discriminator_entries, network),
        set(filter(names_discriminator.is_constant, shapes)),
        lambda s: names_discriminator.discriminator_to_flax(s, network),
    )


def _inception(state: _State, shapes: recognise.Shapes, settings: _Settings) -> _Match:
    """The raw module, NVIDIA's detector, or pytorch-fid's wrapper, which has no classes."""
    raw_names = {name: names_inception.raw_name(name) for name in shapes}
    theirs = {raw: name for name, raw in raw_names.items()}
    classes = shapes.get(theirs.get("fc.bias", ""), (1008,))[0]
    network = _make(InceptionV3, {"num_classes": classes} | settings)
    implied = set(names_inception.scales_left_out(theirs))
    implied |= set() if {"fc.weight", "fc.bias"} & set(theirs) else {"fc.weight", "fc.bias"}
    needed = _shapes_of(names_inception.inception_entries, network).items()
    unused = ("AuxLogits.", "Conv2d_AuxLogits.")
    return _Match(
        network,
        {theirs.get(raw, raw): shape for raw, shape in needed if raw not in implied},
        {
            name
            for name, raw in raw_names.items()
            if raw.endswith("num_batches_tracked") or raw.startswith(unused)
        },
        lambda s: names_inception.inception_to_flax(s, network),
    )


def _make(cls: type[_Network], settings: _Settings) -> _Network:
    unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown setting {unknown[0]!r}")
    # export's JSON has lists where a hashable module needs tuples.
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})


# With the class whose attributes the settings are; SongUNet's include DhariwalUNet's.
_RECOGNISED: dict[str, tuple[type[nn.Module], Callable[..., _Match]]] = {
    "edm": (SongUNet, _edm),
    "adm": (ADMUNet, _adm),
    "adm_encoder": (ADMEncoder, _adm_encoder),
    "ogdm_discriminator": (StyleGAN2Discriminator, _discriminator),
    "inception": (InceptionV3, _inception),
}
