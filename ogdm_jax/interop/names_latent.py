"""PyTorch names of latent models' networks <-> our variables.

Our modules have the names of the files (`blocks.0.attn.qkv`, `down_blocks.0.resnets.1.conv1`), so
that a name map is a rule. DiT's blocks are stacked in ours and numbered in the files.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.interop.names_shared import (
    Entry,
    image,
    image_input,
    path_entries,
    path_entry,
    to_flax,
    to_torch,
    variable_shapes,
)
from ogdm_jax.networks.clip_text import CLIPText
from ogdm_jax.networks.dit import DiT, position_table
from ogdm_jax.networks.sd_unet import UNet2DCondition
from ogdm_jax.networks.vae import AutoencoderKL
from ogdm_jax.typing import PyTree

_POSITIONS = "pos_embed"


def dit_entries(network: DiT) -> list[Entry]:
    """Every tensor of the file but the table of positions; a block's are rows of ours."""
    found, label = [], jax.ShapeDtypeStruct((1,), jnp.int32)
    for path, shape in variable_shapes(network, *image_input(network), label).items():
        if path[1] != "blocks":
            found.append(path_entry(path, shape))
            continue
        for i in range(shape[0]):
            one = path_entry((*path[:2], str(i), *path[2:]), shape[1:])
            found.append(dataclasses.replace(one, path=path, row=i, rows=shape[0]))
    return sorted(found, key=lambda e: e.name)


def dit_to_flax(state: Mapping[str, np.ndarray], network: DiT) -> PyTree:
    """{"params": ...} of a DiT from its state dict.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network; a table of
        positions that is not the published one.
    """
    stored = state.get(_POSITIONS)
    if stored is not None:
        side = network.img_resolution // network.patch
        ours = position_table(side, side, network.width)[None]
        rounding = max(1e-3, float(jnp.finfo(stored.dtype).eps) / 2)  # of a stored sine, at most
        if stored.shape != ours.shape or np.abs(stored - ours).max() > rounding:
            raise ValueError(
                f"state: {_POSITIONS} {stored.shape} is not DiT's table of sines for {side} x "
                f"{side} patches; expected a DiT whose positions were not trained"
            )
    return to_flax(state, dit_entries(network), "a DiT", [_POSITIONS])


def flax_to_dit(variables: PyTree, network: DiT) -> dict[str, np.ndarray]:
    """The inverse of dit_to_flax, with the table of positions where whole parameters are given."""
    state = to_torch({"params": variables["params"]}, dit_entries(network))
    side = network.img_resolution // network.patch
    return {_POSITIONS: position_table(side, side, network.width)[None], **state}


# the authors' modules -> diffusers': in every block, with equal numbers; once; in its own block
_DIFFUSERS_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_DIFFUSERS_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_DIFFUSERS_INSIDE = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


def diffusers_dit(name: str, depth: int) -> list[str]:
    """What diffusers' DiTTransformer2DModel calls a tensor: three names where it keeps q, k and v
    apart, and one a block for the embedders, which it repeats.
    """
    module, _, leaf = name.rpartition(".")
    if (same := _DIFFUSERS_EMBEDDERS.get(module)) is not None:
        return [f"transformer_blocks.{i}.norm1.emb.{same}.{leaf}" for i in range(depth)]
    if (outside := _DIFFUSERS_OUTSIDE.get(module)) is not None:
        return [f"{outside}.{leaf}"]
    _, block, inside = module.split(".", 2)
    return [f"transformer_blocks.{block}.{part}.{leaf}" for part in _DIFFUSERS_INSIDE[inside]]


def dit_from_diffusers(state: Mapping[str, np.ndarray], network: DiT) -> dict[str, np.ndarray]:
    """The authors' names of a state dict of diffusers, whose arithmetic is not the authors' (its
    time frequencies and one norm differ a little): the published weights come from theirs.

    Raises:
      ValueError: blocks whose embedders were trained apart.
    """
    found = {}
    for entry in dit_entries(network):
        parts = [state[name] for name in diffusers_dit(entry.name, network.depth)]
        if "attn.qkv." in entry.name:
            found[entry.name] = np.concatenate(parts)
            continue
        if any(not np.array_equal(part, parts[0]) for part in parts[1:]):
            raise ValueError(
                f"state: {entry.name} differs among the blocks; expected a DiT whose blocks share "
                "the embedders of time and class, as the authors' does"
            )
        found[entry.name] = parts[0]
    return found


def dit_to_diffusers(state: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """The inverse of dit_from_diffusers; the table of positions has no place there."""
    found = {}
    for name, value in state.items():
        if name != _POSITIONS:
            names = diffusers_dit(name, depth)
            qkv = "attn.qkv." in name
            found |= zip(names, np.split(value, 3) if qkv else [value] * len(names), strict=True)
    return found


def vae_entries(network: AutoencoderKL) -> list[Entry]:
    """Every tensor under diffusers' name."""
    return path_entries(network, image(network.factor * 2, network.img_channels))


# LDM's modules -> diffusers', after the numbers of levels and blocks; and those of diffusers' older
# files -> today's
_OLD_VAE = {
    "norm_out": "conv_norm_out",
    "nin_shortcut": "conv_shortcut",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    **{f"mid.attn_1.{part}": f"mid_block.attentions.0.to_{part}" for part in "qkv"},
    "attentions.0.query": "attentions.0.to_q",
    "attentions.0.key": "attentions.0.to_k",
    "attentions.0.value": "attentions.0.to_v",
    "attentions.0.proj_attn": "attentions.0.to_out.0",
}
_LDM_LEVEL = re.compile(r"\.(down|up)\.(\d+)\.(?:block\.(\d+)|(?:down|up)sample)\.")


def vae_name(name: str, levels: int) -> str:
    """Diffusers' name of an autoencoder's tensor in LDM's or an older diffusers layout."""

    def level(match: re.Match[str]) -> str:
        way, number, block = match[1], int(match[2]), match[3]
        number = levels - 1 - number if way == "up" else number
        at = f".{way}_blocks.{number}."
        return at + (f"resnets.{block}." if block is not None else f"{way}samplers.0.")

    name = _LDM_LEVEL.sub(level, name)
    for theirs, ours in _OLD_VAE.items():
        name = re.sub(rf"\.{re.escape(theirs)}\.", f".{ours}.", name)
    return name


def vae_beside(names: Iterable[str]) -> set[str]:
    """What LDM's training keeps beside an autoencoder."""
    return {name for name in names if name.startswith(("loss.", "model_ema."))}


def vae_to_flax(state: Mapping[str, np.ndarray], network: AutoencoderKL) -> PyTree:
    """{"params": ...} of an autoencoder from a state dict of diffusers (today's or older) or LDM.

    What LDM's training keeps beside it (`vae_beside`) is ignored. A 1x1 convolution and the matrix
    of a linear layer are the same numbers.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    levels = len(network.widths)
    named = {vae_name(name, levels): value for name, value in state.items()}
    for name, value in named.items():
        if ".attentions." in name and value.ndim == 4:
            named[name] = value[..., 0, 0]
    entries = vae_entries(network)
    return to_flax(named, entries, "Stable Diffusion's autoencoder", vae_beside(named))


def flax_to_vae(variables: PyTree, network: AutoencoderKL) -> dict[str, np.ndarray]:
    """The inverse of vae_to_flax, under diffusers' names."""
    return to_torch(variables, vae_entries(network))


_FLAT = re.compile(r"\.attentions\.\d+\.proj_(in|out)\.weight$")


def sd_unet_entries(network: UNet2DCondition) -> list[Entry]:
    """Every tensor under diffusers' name, proj_in and proj_out as matrices."""
    text = jax.ShapeDtypeStruct((1, 1, network.context_dim), jnp.float32)
    return path_entries(network, *image_input(network), text)


# diffusers' modules -> LDM's: in a residual block, and outside the levels
_LDM_RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LDM_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.conv(?=\.))?")


def ldm_unet_names(network: UNet2DCondition) -> dict[str, str]:
    """{LDM's name: diffusers' name} of the U-Net's tensors."""
    depth, attends_up = network.num_blocks, network.attends[::-1]

    def place(match: re.Match[str]) -> str:
        level, part, i = int(match[2]), match[3], int(match[4])
        first = level * (depth + 1)  # of the level; input_blocks.0 is the first convolution
        if part == "downsamplers":
            return f"input_blocks.{1 + first + depth}.0.op"
        if part == "upsamplers":
            return f"output_blocks.{first + depth}.{2 if attends_up[level] else 1}.conv"
        block = (
            f"input_blocks.{1 + first + i}" if match[1] == "down" else f"output_blocks.{first + i}"
        )
        return f"{block}.1" if part == "attentions" else f"{block}.0"

    found = {}
    for entry in sd_unet_entries(network):
        name = _LEVEL.sub(place, entry.name)
        for ours, theirs in _LDM_OUTSIDE.items():
            name = theirs + name.removeprefix(ours) if name.startswith(f"{ours}.") else name
        for ours, theirs in _LDM_RES.items() if ".resnets." in entry.name else ():
            name = name.replace(f".{ours}.", f".{theirs}.")
        found[name] = entry.name
    return found


def sd_unet_to_flax(state: Mapping[str, np.ndarray], network: UNet2DCondition) -> PyTree:
    """{"params": ...} of a U-Net from a state dict of diffusers or of LDM (its prefix removed).

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    if "time_embed.0.weight" in state:
        names = ldm_unet_names(network)
        state = {names.get(name, name): value for name, value in state.items()}
    flat = lambda name, v: v[..., 0, 0] if _FLAT.search(name) and v.ndim == 4 else v
    named = {name: flat(name, value) for name, value in state.items()}
    return to_flax(named, sd_unet_entries(network), "Stable Diffusion's U-Net")


def flax_to_sd_unet(variables: PyTree, network: UNet2DCondition) -> dict[str, np.ndarray]:
    """The inverse of sd_unet_to_flax, under diffusers' names."""
    state = to_torch(variables, sd_unet_entries(network))
    flat = network.linear_projection
    square = lambda name, v: v[..., None, None] if _FLAT.search(name) and not flat else v
    return {name: square(name, value) for name, value in state.items()}


def clip_entries(network: CLIPText) -> list[Entry]:
    """Every tensor under the name that transformers before version 5 gives it."""
    return path_entries(network, jax.ShapeDtypeStruct((1, network.positions), jnp.int32))


_OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_OUTSIDE = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$")


def open_clip_beside(names: Iterable[str], depth: int) -> set[str]:
    """What files of open_clip have beside a network's tensors: the head, a mask, and layers behind
    depth.
    """
    inside = lambda name: (match := _OPEN_LAYER.fullmatch(name)) and int(match[1]) < depth
    return {name for name in names if name not in _OPEN_OUTSIDE and not inside(name)}


def _from_open_clip(state: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """Transformers' names of open_clip's tensors; layers behind `depth` and the head are left
    out.
    """
    found = {ours: state[theirs] for theirs, ours in _OPEN_OUTSIDE.items() if theirs in state}
    beside = open_clip_beside(state, depth)
    for name, value in state.items():
        match = _OPEN_LAYER.fullmatch(name)
        if match is None or name in beside:
            continue
        at, part, leaf = f"encoder.layers.{match[1]}.", match[2], match[3]
        if part == "attn.in_proj":
            for letter, third in zip("qkv", np.split(value, 3), strict=True):
                found[f"{at}self_attn.{letter}_proj.{leaf}"] = third
        else:
            found[f"{at}{_OPEN_CLIP.get(part, part)}.{leaf}"] = value
    return found


_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d{1,3})\..*")


def clip_names(names: Iterable[str]) -> dict[str, str]:
    """{name of `clip_entries`: name in the file} in the layouts of transformers."""
    return {f"text_model.{name.removeprefix('text_model.')}": name for name in names}


def clip_beside(names: Iterable[str], depth: int) -> set[str]:
    """What files of transformers have beside a network's tensors: ids, and layers behind depth."""
    behind = lambda name: (match := _LAYER.fullmatch(name)) and int(match[1]) >= depth
    return {name for name in names if name.endswith("position_ids") or behind(name)}


def clip_to_flax(state: Mapping[str, np.ndarray], network: CLIPText) -> PyTree:
    """{"params": ...} of a text encoder from a state dict of transformers (with the prefix
    `text_model.` or, from version 5 on, without it) or of open_clip, prefixes of LDM removed.

    Layers behind the network's depth are left out, as Stable Diffusion 2 leaves out the last one.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no place in the network.
    """
    if "ln_final.weight" in state:
        state = _from_open_clip(state, network.depth)
    named = {ours: state[theirs] for ours, theirs in clip_names(state).items()}
    beside = clip_beside(named, network.depth)
    return to_flax(named, clip_entries(network), "CLIP's text encoder", beside)


def flax_to_clip(variables: PyTree, network: CLIPText) -> dict[str, np.ndarray]:
    """The inverse of clip_to_flax, under the names of transformers before version 5."""
    return to_torch(variables, clip_entries(network))
