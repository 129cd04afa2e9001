"""What network a state dict is: one function a kind, (state, shapes, settings given) -> Match."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import numpy as np

from ogdm_jax import networks
from ogdm_jax.interop import (
    names_adm,
    names_discriminator,
    names_edm,
    names_inception,
    names_latent,
    names_score_sde,
    recognise,
    recognise_latent,
)
from ogdm_jax.interop.names_shared import Entry, make
from ogdm_jax.typing import PyTree

_State = Mapping[str, np.ndarray]
_Settings = dict[str, Any]


class Match(NamedTuple):
    """The network of a state dict, the tensors it needs, and what makes its variables of them."""

    network: nn.Module
    needed: Mapping[str, tuple[int, ...]]
    optional: set[str]  # names that the state may have beside them
    convert: Callable[[Mapping[str, np.ndarray], Any], PyTree]  # (state, network)


def _shapes_of(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """{PyTorch name: shape}."""
    return {entry.name: entry.torch_shape for entry in entries}


def _edm(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    network = names_edm.edm_network({"dropout": 0.0} | recognise.edm_settings(state) | settings)
    prefix = "" if any(name.startswith("model.") for name in shapes) else "model."
    needed = _shapes_of(names_edm.edm_entries(network)).items()
    return Match(
        network,
        {name.removeprefix(prefix): shape for name, shape in needed},
        set(filter(names_edm.is_constant, shapes)),
        names_edm.edm_to_flax,
    )


def _adm(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    return _openai(networks.ADMUNet, recognise.adm_settings(shapes, settings))


def _adm_encoder(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    return _openai(networks.ADMEncoder, recognise.encoder_settings(shapes, settings))


def _openai(cls: type[networks.ADMUNet | networks.ADMEncoder], settings: _Settings) -> Match:
    order = settings.pop("qkv_order")
    network = make(cls, settings)
    needed = _shapes_of(names_adm.adm_entries(network, order))
    convert = functools.partial(names_adm.adm_to_flax, qkv_order=order)
    return Match(network, needed, set(), convert)


def _score_sde(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    found = names_score_sde.score_sde_settings(shapes, settings)
    network = names_edm.edm_network({"dropout": 0.0, "model_type": "SongUNet"} | found | settings)
    network = cast(networks.SongUNet, network)
    needed = names_score_sde.score_sde_shapes(network)
    return Match(network, needed, {"sigmas"}, names_score_sde.score_sde_to_flax)


def _discriminator(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    found = names_discriminator.discriminator_settings(state, settings.get("t_dim", 2))
    network = make(networks.StyleGAN2Discriminator, found | settings)
    return Match(
        network,
        _shapes_of(names_discriminator.discriminator_entries(network)),
        set(filter(names_discriminator.is_constant, shapes)),
        names_discriminator.discriminator_to_flax,
    )


def _inception(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    """The raw module, NVIDIA's detector, or pytorch-fid's wrapper, which has no classes."""
    raw_names = {name: names_inception.raw_name(name) for name in shapes}
    theirs = {raw: name for name, raw in raw_names.items()}
    classes = shapes.get(theirs.get("fc.bias", ""), (1008,))[0]
    network = make(networks.InceptionV3, {"num_classes": classes} | settings)
    implied = set(names_inception.scales_left_out(theirs))
    implied |= set() if {"fc.weight", "fc.bias"} & set(theirs) else {"fc.weight", "fc.bias"}
    needed = _shapes_of(names_inception.inception_entries(network)).items()
    unused = ("AuxLogits.", "Conv2d_AuxLogits.")
    return Match(
        network,
        {theirs.get(raw, raw): shape for raw, shape in needed if raw not in implied},
        {
            name
            for name, raw in raw_names.items()
            if raw.endswith("num_batches_tracked") or raw.startswith(unused)
        },
        names_inception.inception_to_flax,
    )


def _dit(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    """In the authors' names or diffusers'."""
    theirs = "x_embedder.proj.weight" not in shapes
    known = recognise_latent.dit_shapes(shapes) if theirs else shapes
    network = make(networks.DiT, recognise_latent.dit_settings(known, settings))
    needed = _shapes_of(names_latent.dit_entries(network))
    if not theirs:  # the conversion compares the table of positions
        needed |= {name: shapes[name] for name in ("pos_embed",) if name in shapes}
        return Match(network, needed, set(), names_latent.dit_to_flax)
    split = {}
    for name, (rows, *rest) in needed.items():
        thirds = 3 if "attn.qkv." in name else 1
        parts = names_latent.diffusers_dit(name, network.depth)
        split |= dict.fromkeys(parts, (rows // thirds, *rest))
    ours = names_latent.dit_from_diffusers
    return Match(network, split, set(), lambda s, net: names_latent.dit_to_flax(ours(s, net), net))


def _autoencoder(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    """In diffusers' names, today's or older ones, or LDM's."""
    levels = recognise_latent.vae_levels(shapes)
    named = {names_latent.vae_name(name, levels): name for name in shapes}
    known = {name: shapes[theirs] for name, theirs in named.items()}
    network = make(networks.AutoencoderKL, recognise_latent.autoencoder_settings(known, settings))
    needed = _stored(_shapes_of(names_latent.vae_entries(network)), named, shapes)
    return Match(network, needed, names_latent.vae_beside(shapes), names_latent.vae_to_flax)


def _sd_unet(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    """In diffusers' names or LDM's."""
    network = make(networks.UNet2DCondition, recognise_latent.sd_unet_settings(shapes, settings))
    ldm = names_latent.ldm_unet_names(network) if "time_embed.0.weight" in shapes else {}
    named = {ours: theirs for theirs, ours in ldm.items()}
    needed = _stored(_shapes_of(names_latent.sd_unet_entries(network)), named, shapes)
    return Match(network, needed, set(), names_latent.sd_unet_to_flax)


def _clip_text(state: _State, shapes: recognise.Shapes, settings: _Settings) -> Match:
    """In transformers' names, of before and from version 5 on, or open_clip's, whose tensors are
    stacked: those the conversion checks.
    """
    network = make(networks.CLIPText, recognise_latent.clip_settings(shapes, settings))
    if "ln_final.weight" in shapes:
        beside = names_latent.open_clip_beside(shapes, network.depth)
        needed = {name: shape for name, shape in shapes.items() if name not in beside}
        return Match(network, needed, beside, names_latent.clip_to_flax)
    named = names_latent.clip_names(shapes)
    needed = _stored(_shapes_of(names_latent.clip_entries(network)), named, shapes)
    beside = names_latent.clip_beside(shapes, network.depth)
    return Match(network, needed, beside, names_latent.clip_to_flax)


def _stored(
    needed: Mapping[str, tuple[int, ...]], named: Mapping[str, str], shapes: recognise.Shapes
) -> dict[str, tuple[int, ...]]:
    """The shapes that a file must have under its own names: a matrix may be a 1x1 convolution."""
    found = {}
    for name, shape in needed.items():
        theirs = named.get(name, name)
        squared = (*shape, 1, 1)
        found[theirs] = squared if shapes.get(theirs) == squared else shape
    return found


# With the class whose attributes the settings are; SongUNet's include DhariwalUNet's.
RECOGNISED: dict[str, tuple[type[nn.Module], Callable[..., Match]]] = {
    "edm": (networks.SongUNet, _edm),
    "adm": (networks.ADMUNet, _adm),
    "score_sde": (networks.SongUNet, _score_sde),
    "adm_encoder": (networks.ADMEncoder, _adm_encoder),
    "ogdm_discriminator": (networks.StyleGAN2Discriminator, _discriminator),
    "inception": (networks.InceptionV3, _inception),
    "dit": (networks.DiT, _dit),
    "sd_unet": (networks.UNet2DCondition, _sd_unet),
    "autoencoder": (networks.AutoencoderKL, _autoencoder),
    "clip_text": (networks.CLIPText, _clip_text),
}
