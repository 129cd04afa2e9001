"""A network as diffusers keeps it: a folder of config.json and diffusion_pytorch_model.safetensors,
of transformers model.safetensors.

The JSON file says what the tensors cannot; a field that it lacks has the library's default.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from ogdm_jax import places, records
from ogdm_jax.interop import names_latent
from ogdm_jax.networks import AutoencoderKL, CLIPText, DiT, UNet2DCondition

CONFIG, OURS = "config.json", 1
MARK = "_ogdm_jax"  # of an index that export writes; the library ignores keys that begin so
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"
# a file of weights, whole or the list of its shards, plain or of a variant such as fp16
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(\.\w+)?\.(safetensors|bin)"
    r"(\.index(\.\w+)?\.json)?"
)
_DIT = {"num_attention_heads": ("heads", 16), "sample_size": ("img_resolution", 32)}
# class -> kind, and {its field: (our setting, the library's default)} of what the tensors do not
# show
_CLASSES: dict[str, tuple[str, dict[str, tuple[str, Any]]]] = {
    "AutoencoderKL": (
        "autoencoder",
        {
            "norm_num_groups": ("groups", 32),
            "scaling_factor": ("scale", 0.18215),
            "shift_factor": ("shift", 0.0),
        },
    ),
    "DiTTransformer2DModel": ("dit", _DIT),
    "Transformer2DModel": ("dit", _DIT),  # of older files
    "UNet2DConditionModel": (
        "sd_unet",
        {
            "norm_num_groups": ("groups", 32),
            "sample_size": ("img_resolution", 64),
            "attention_head_dim": ("heads", 8),  # a misnomer: their number
        },
    ),
    "CLIPTextModel": (
        "clip_text",
        {"num_attention_heads": ("heads", 8), "hidden_act": ("quick", "quick_gelu")},
    ),
}
# fields that would change the arithmetic: the values that the networks here have
_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "activation_fn": ("gelu-approximate",),
    "addition_embed_type": (None,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "hidden_act": ("quick_gelu", "gelu"),
    "layer_norm_eps": (1e-5,),
    "mid_block_add_attention": (True,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "norm_type": ("ada_norm_zero",),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}


def weights(folder: Path) -> Path | None:
    """The file of weights in a folder of a known class, or the list of its shards; None in any
    other. Plain files come before variants, whole ones before shards.
    """
    found = _files(folder)
    return found[0] if found and read_about(found[0]) else None


def _files(folder: Path) -> list[Path]:
    """Weights in a folder, the ones that are taken first."""

    def order(file: Path) -> tuple[bool, bool, bool, str]:
        variant, kind, index, of_index = cast(re.Match[str], _WEIGHTS.fullmatch(file.name)).groups()
        return bool(variant or of_index), bool(index), kind != "safetensors", file.name

    return sorted((f for f in folder.iterdir() if _WEIGHTS.fullmatch(f.name)), key=order)


def taken(file: Path) -> tuple[str, ...]:
    """A sentence that names the file, where it is a variant or others lie beside it."""
    if not _WEIGHTS.fullmatch(file.name) or not (file.parent / CONFIG).is_file():
        return ()
    others = [other.name for other in _files(file.parent) if other.name != file.name]
    variant = cast(re.Match[str], _WEIGHTS.fullmatch(file.name)).group(1, 4) != (None, None)
    also = f"; also there: {', '.join(others)}" if others else ""
    return (f"taken: {file.name}{also}",) if others or variant else ()


def read_about(file: Path | epath.Path) -> dict[str, Any] | None:
    """{"kind", "settings"} of weights beside the config.json of a known class, else None.

    Raises:
      ValueError: no JSON, statistics of each channel in place of one scale, or a field whose
        arithmetic is not offered.
    """
    path = file.parent / CONFIG
    if not _WEIGHTS.fullmatch(file.name) or not path.is_file():
        return None
    config = records.read(path, dict)
    if config.get("format") == OURS and "kind" in config:  # what `ogdm export --card` writes
        return {name: value for name, value in config.items() if name != "format"}
    listed = config.get("architectures")
    name = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else "")
    if not isinstance(name, str) or (name := name.removeprefix("Flax")) not in _CLASSES:
        return None
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ValueError(
            f"{path}: latents_mean and latents_std given; expected one scaling_factor for all "
            "channels"
        )
    kind, fields = _CLASSES[name]
    only = _ONLY | ({"norm_eps": (1e-5, 1e-6)} if kind == "dit" else {})  # the authors' is 1e-6
    for field, allowed in only.items():
        value = config.get(field, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{path}: {field} {value!r} given; expected {' or '.join(map(repr, allowed))}"
            )
    given = {theirs: value for theirs, value in config.items() if value is not None}
    told = {ours: given.get(theirs, default) for theirs, (ours, default) in fields.items()}
    if kind == "sd_unet":
        heads, widths = config.get("num_attention_heads"), config.get("block_out_channels")
        heads = told["heads"] if heads is None else heads
        levels = len(widths) if isinstance(widths, list) else 4
        told["heads"] = [heads] * levels if isinstance(heads, int) else heads
    if kind == "clip_text":
        told["quick"] = told["quick"] == "quick_gelu"
        if (depth := given.get("num_hidden_layers")) is not None:  # a file may have more
            told["depth"] = depth
    return {"kind": kind, "settings": told}


def write(
    folder: str | os.PathLike, network: nn.Module, state: Mapping[str, np.ndarray], **fields: Any
) -> epath.Path:
    """Writes a network as the `from_pretrained(folder)` of its class in diffusers or transformers
    (CLIPTextModel) reads it.

    Args:
      folder: made where it is missing.
      network: a DiT, UNet2DCondition, AutoencoderKL or CLIPText.
      state: {name: array}, as `export.to_torch` gives it.
      **fields: of the JSON file, beside those that follow from the network.

    Returns:
      The file of weights.

    Raises:
      ValueError: another network, or a DiT without what diffusers' has: a row for no class.
    """
    folder, config = places.place(folder), _config(network) | fields
    if isinstance(network, DiT):
        state = names_latent.dit_to_diffusers(state, network.depth)
    file = folder / (TEXT_WEIGHTS if isinstance(network, CLIPText) else WEIGHTS)
    with places.written(file) as new:
        tensors = {name: np.ascontiguousarray(value) for name, value in state.items()}
        save_file(tensors, new, metadata={"format": "pt"})
    records.write(folder / CONFIG, config, indent=1)
    return file


def _config(network: nn.Module) -> dict[str, Any]:
    """What config.json says of a network."""
    if isinstance(network, AutoencoderKL | UNet2DCondition):
        return _levelled(network)
    if isinstance(network, DiT):
        if not network.label_dim or not network.no_class or network.mlp_ratio != 4:
            raise ValueError(
                "network: this DiT has no classes, no row for images of no class, or another "
                "mlp_ratio than 4; expected what diffusers' DiTTransformer2DModel has"
            )
        return {
            "_class_name": "DiTTransformer2DModel",
            "attention_head_dim": network.width // network.heads,
            "in_channels": network.img_channels,
            "num_attention_heads": network.heads,
            "num_embeds_ada_norm": network.label_dim,
            "num_layers": network.depth,
            "out_channels": network.out_channels or network.img_channels,
            "patch_size": network.patch,
            "sample_size": network.img_resolution,
        }
    if isinstance(network, CLIPText):
        return {
            "architectures": ["CLIPTextModel"],
            "hidden_act": "quick_gelu" if network.quick else "gelu",
            "hidden_size": network.width,
            "intermediate_size": network.hidden,
            "max_position_embeddings": network.positions,
            "model_type": "clip_text_model",
            "num_attention_heads": network.heads,
            "num_hidden_layers": network.depth,
            "vocab_size": network.vocabulary,
        }
    raise ValueError(
        f"network: {type(network).__name__} given; expected DiT, UNet2DCondition, AutoencoderKL or "
        "CLIPText"
    )


def _levelled(network: AutoencoderKL | UNet2DCondition) -> dict[str, Any]:
    common = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(network.widths),
        "in_channels": network.img_channels,
        "layers_per_block": network.num_blocks,
        "norm_num_groups": network.groups,
        "out_channels": network.img_channels,
    }
    if isinstance(network, AutoencoderKL):
        levels = len(network.widths)
        return common | {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "latent_channels": network.latent_channels,
            "scaling_factor": network.scale,
            "shift_factor": network.shift or None,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    named = lambda way: [f"CrossAttn{way}" if attends else way for attends in network.attends]
    return common | {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": list(network.heads),
        "cross_attention_dim": network.context_dim,
        "down_block_types": named("DownBlock2D"),
        "out_channels": network.out_channels or network.img_channels,
        "sample_size": network.img_resolution,
        "up_block_types": named("UpBlock2D")[::-1],
        "use_linear_projection": network.linear_projection,
    }
