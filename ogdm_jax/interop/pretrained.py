"""Networks with the weights of checkpoints that other programs wrote."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np

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
from ogdm_jax.interop.restricted_pickle import UnsafeFileError, quote
from ogdm_jax.interop.settings import check_about, check_settings
from ogdm_jax.interop.torch_records import Module
from ogdm_jax.interop.torch_state import TorchFile, open_torch, select, tensors
from ogdm_jax.networks import ADMEncoder, ADMUNet, InceptionV3, SongUNet, StyleGAN2Discriminator
from ogdm_jax.startup import raised_here
from ogdm_jax.typing import Array, PyTree

_CLASSES = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
_LISTED = 6  # names of each kind of mismatch that a message shows
_MOST_TENSORS = (
    5000  # of a network; the published ones have fewer than 1,000, and each layer is traced
)
# What a network that cannot be raises, here or in JAX, where names promise what shapes do not keep.
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
      kind: one of recognise.KINDS.   network: a flax module.   variables: {"params": ...,
        "buffers": ... if any}.
      precondition: edm, vp, ve, iddpm or adm where the file says so or its kind implies it; else
        None.
      sigma_data: of edm.   schedule: of adm, the betas: linear or cosine.
      dropout: of the original training where the file says so; the network itself always has 0
        unless a setting asks.
    """

    kind: str
    network: nn.Module
    variables: PyTree
    precondition: str | None = None
    sigma_data: float = 0.5
    dropout: float | None = None
    schedule: str = "linear"

    def __iter__(self) -> Iterator[Any]:
        return iter((self.network, self.variables))

    def denoiser(self, augment: Array | None = None) -> Denoiser:
        """The denoiser under the file's preconditioning (EDM's where it does not say).

        augment: [B,9] augmentation labels of the batch that it will be asked about, for networks
          that were trained with them.
        """
        bound = {} if augment is None else {"augment": augment}

        def network_fn(x: Array, c_noise: Array, label: PyTree = None) -> Array:
            return self.network.apply(self.variables, x, c_noise, label, **bound)

        def taps(x: Array, c_noise: Array, label: PyTree, at: str) -> PyTree:
            return self.network.apply(
                self.variables, x, c_noise, label, at=at, method="features", **bound
            )

        if self.precondition in (None, "edm"):
            return precondition.edm(network_fn, self.sigma_data, taps=taps)
        if self.precondition == "adm":
            learned = self.network.out_channels == 2 * self.network.img_channels
            return precondition.adm(network_fn, self.schedule, learned_variance=learned, taps=taps)
        return getattr(precondition, self.precondition)(network_fn, taps=taps)


def from_torch(
    state: Mapping[str, np.ndarray], kind: str | None = None, **settings: Any
) -> tuple[nn.Module, PyTree]:
    """(network, variables) of a PyTorch state dict; variables are numpy arrays, at least float32.

    Args:
      state: {name: array}, as read_torch gives it. A prefix "module." (of data-parallel training)
        is dropped.
      kind: edm (SongUNet, DhariwalUNet; also OGDM_edm's and STF's), adm (OpenAI's U-Net, also
        OGDM_adm's), adm_encoder (OpenAI's classifiers, DG's heads), ogdm_discriminator, inception;
        None recognises it from the names.
      **settings: attributes of the network that replace what names and shapes show, such as
      dropout=0.1, or add what
        they cannot show: img_resolution, head_channels or num_heads, and qkv_order (legacy or new)
          of OpenAI's models.

    Raises:
      ValueError: an unknown kind or setting, a setting that the tensors do not show, or tensors
      that are missing,
        unexpected or of other shapes (listed, in one sentence).
    """
    state = _plain(state)
    network, convert = match(state, kind, **settings)
    return network, convert(state)


def match(
    state: Mapping[str, np.ndarray], kind: str | None = None, **settings: Any
) -> tuple[nn.Module, Callable[[Mapping[str, np.ndarray]], PyTree]]:
    """A state dict's network and the function that converts it, from names and shapes alone. Errors
    as from_torch.
    """
    state = _plain(state)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    kind = kind or recognise.kind_of(shapes)
    if kind not in _BUILD:
        raise ValueError(f"kind: {kind!r} given; expected one of {', '.join(recognise.KINDS)}")
    if len(shapes) > _MOST_TENSORS:
        raise recognise.UnrecognisedError(
            f"state: has {len(shapes)} tensors; expected at most {_MOST_TENSORS}"
        )
    cls, build = _BUILD[kind]
    check_settings(cls, settings)
    try:
        network, expected, optional, convert = build(state, shapes, settings)
    except _MISFIT as error:
        if isinstance(error, ValueError) and raised_here(error):
            raise
        what = "shapes, or the settings given," if settings else "shapes"
        raise recognise.UnrecognisedError(
            f"state: has names of the {kind} network, but its {what} make none "
            f"({type(error).__name__})"
        ) from error
    _compare(kind, shapes, expected, optional)
    return network, convert


def load_pretrained(
    path: str | os.PathLike | TorchFile,
    kind: str | None = None,
    entry: str | None = None,
    **settings: Any,
) -> Pretrained:
    """Reads a checkpoint file and makes its network: read_torch, then from_torch.

    Preconditioning, sigma_data and dropout come from EDM's pickles, from export's JSON file beside
    a .safetensors file, or from iDDPM's table `u`; a plain state dict does not say
    (precondition="vp" and the like may be given). OpenAI's U-Nets are "adm" with the published
    schedule, linear for unknown ones.

    Args:
      path, entry: see read_torch; also what open_torch gives.
      kind, **settings: see from_torch; also precondition, sigma_data and schedule.

    Raises:
      UnsafeFileError: the file is refused.   ValueError: see from_torch.
    """
    file = path if isinstance(path, TorchFile) else open_torch(path)
    about, state = describe(file, entry), tensors(file, entry)
    for name in ("precondition", "sigma_data", "schedule"):
        about[name] = settings.pop(name, about.get(name))
    check_about(about)
    if about["precondition"] is None and ("u" in state or "model.u" in state):
        about["precondition"] = "iddpm"
    kind = kind or about.get("kind")
    network, variables = from_torch(state, kind, **(about.get("settings") or {}) | settings)
    kind = kind or recognise.kind_of({name: value.shape for name, value in _plain(state).items()})
    sigma_data = 0.5 if about["sigma_data"] is None else about["sigma_data"]
    if kind == "adm":
        about["precondition"] = about["precondition"] or "adm"
        about["schedule"] = about["schedule"] or recognise.schedule_of(network)
    schedule = about["schedule"] or "linear"
    return Pretrained(
        kind, network, variables, about["precondition"], sigma_data, about.get("dropout"), schedule
    )


def describe(file: TorchFile, entry: str | None = None) -> dict[str, Any]:
    """What a file says beside the tensors: any of kind, settings, precondition, sigma_data,
    dropout.
    """
    about = export.read_about(file.path)
    if about is not None:
        return about
    try:
        part = select(file.root, entry)
    except UnsafeFileError:
        return {}  # tensors() says why
    if not isinstance(part, Module) or part.name not in _CLASSES:
        return {}
    arguments = part.state.get("_init_kwargs")
    dropout = arguments.get("dropout") if isinstance(arguments, dict) else None
    found = {
        "precondition": _CLASSES[part.name],
        "sigma_data": part.state.get("sigma_data"),
        "dropout": dropout,
    }
    return {name: value for name, value in found.items() if isinstance(value, str | float | int)}


def _plain(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    wrapped = bool(state) and all(name.startswith("module.") for name in state)
    return {
        name.removeprefix("module.") if wrapped else name: value for name, value in state.items()
    }


def _compare(
    kind: str, shapes: recognise.Shapes, expected: recognise.Shapes, optional: set[str]
) -> None:
    """Raises ValueError listing what is missing, unexpected or misshapen."""
    missing = [name for name in expected if name not in shapes]
    unexpected = [quote(name) for name in shapes if name not in expected and name not in optional]
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


# kind -> (state, shapes, given settings) -> (network, {name: shape} it needs, names it may have,
# state -> variables)

_Built = tuple[
    nn.Module, dict[str, tuple[int, ...]], set[str], Callable[[Mapping[str, np.ndarray]], PyTree]
]


@functools.lru_cache(maxsize=16)  # a second or two for the published sizes
def _edm_shapes(network: names_edm.EdmNetwork) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.torch_shape for entry in names_edm.edm_entries(network)}


def _edm(state: dict[str, np.ndarray], shapes: recognise.Shapes, given: dict[str, Any]) -> _Built:
    settings = {"dropout": 0.0} | recognise.edm_settings(state) | given
    network = names_edm.edm_network(settings)
    prefix = "" if any(name.startswith("model.") for name in shapes) else "model."
    needed = {name.removeprefix(prefix): shape for name, shape in _edm_shapes(network).items()}
    optional = {
        name for name in shapes if name.endswith(".resample_filter") or name in ("u", "model.u")
    }
    return network, needed, optional, lambda s: names_edm.edm_to_flax(s, network)


def _adm(state: dict[str, np.ndarray], shapes: recognise.Shapes, given: dict[str, Any]) -> _Built:
    settings = recognise.adm_settings(shapes, given)
    order = settings.pop("qkv_order")
    network = _make(ADMUNet, settings)
    return (
        network,
        _adm_shapes(network, order),
        set(),
        lambda s: names_adm.adm_to_flax(s, network, order),
    )


def _adm_encoder(
    state: dict[str, np.ndarray], shapes: recognise.Shapes, given: dict[str, Any]
) -> _Built:
    settings = recognise.encoder_settings(shapes, given)
    order = settings.pop("qkv_order")
    network = _make(ADMEncoder, settings)
    return (
        network,
        _adm_shapes(network, order),
        set(),
        lambda s: names_adm.adm_to_flax(s, network, order),
    )


@functools.lru_cache(maxsize=16)
def _adm_shapes(network: ADMUNet | ADMEncoder, order: str) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.torch_shape for entry in names_adm.adm_entries(network, order)}


def _discriminator(
    state: dict[str, np.ndarray], shapes: recognise.Shapes, given: dict[str, Any]
) -> _Built:
    settings = names_discriminator.discriminator_settings(state, given.get("t_dim", 2)) | given
    network = _make(StyleGAN2Discriminator, settings)
    side, channels = network.img_resolution, network.img_channels
    struct = jax.ShapeDtypeStruct
    inputs = struct((4, side, side, channels), np.float32), struct((4, network.t_dim), np.float32)
    labels = struct((4, network.label_dim), np.float32) if network.label_dim else None
    variables = jax.eval_shape(
        network.init, jax.eval_shape(lambda: jax.random.key(0)), *inputs, labels
    )["params"]
    needed = {}
    for module in names_discriminator.discriminator_modules(network):
        block, layer = module.split(".")
        for leaf, array in variables[block][layer].items():
            shape = array.shape if leaf == "bias" else array.shape[::-1]
            needed[f"{module}.{'bias' if leaf == 'bias' else 'weight'}"] = shape
    optional = {name for name in shapes if name.endswith("resample_filter")}
    return (
        network,
        needed,
        optional,
        lambda s: names_discriminator.discriminator_to_flax(s, network),
    )


def _inception(
    state: dict[str, np.ndarray], shapes: recognise.Shapes, given: dict[str, Any]
) -> _Built:
    """The raw module, NVIDIA's detector, or pytorch-fid's wrapper, which has no classes."""
    ours = {name: names_inception.raw_name(name) for name in shapes}
    theirs = {raw: name for name, raw in ours.items()}
    classes = shapes.get(theirs.get("fc.bias", ""), (1008,))[0]
    network = _make(InceptionV3, {"num_classes": classes} | given)
    needed = {
        theirs.get(e.name, e.name): e.torch_shape
        for e in names_inception.inception_entries(network)
    }
    if not {"fc.weight", "fc.bias"} & set(theirs):
        needed = {name: shape for name, shape in needed.items() if not name.startswith("fc.")}
    implied = set(names_inception.scales_left_out(theirs))
    needed = {name: shape for name, shape in needed.items() if name not in implied}
    unused = ("AuxLogits.", "Conv2d_AuxLogits.")
    optional = {
        n
        for n, raw in ours.items()
        if raw.endswith("num_batches_tracked") or raw.startswith(unused)
    }
    return network, needed, optional, lambda s: names_inception.inception_to_flax(s, network)


def _make(cls: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
    unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown setting {unknown[0]!r}")
    # export's JSON has lists where a hashable module needs tuples.
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})


# With the class whose attributes the settings are; SongUNet's include DhariwalUNet's.
_BUILD: dict[str, tuple[type[nn.Module], Callable[..., _Built]]] = {
    "edm": (SongUNet, _edm),
    "adm": (ADMUNet, _adm),
    "adm_encoder": (ADMEncoder, _adm_encoder),
    "ogdm_discriminator": (StyleGAN2Discriminator, _discriminator),
    "inception": (InceptionV3, _inception),
}
