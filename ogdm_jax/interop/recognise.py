"""What network a state dict belongs to, from the names and shapes of its tensors.

Shapes show widths, depths, attention, classes and resampling. They cannot show the number of
attention heads, OpenAI's order of qkv channels, a U-Net's image size (except in EDM's names) or
dropout: for the published OpenAI and OGDM_adm models these stand in a table; for others they are
settings that the user gives.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ogdm_jax.interop.inert import quote

Shapes = Mapping[str, tuple[int, ...]]
_MOST_TAPS = 64  # of a resampling filter
KINDS = ("edm", "adm", "score_sde", "adm_encoder", "ogdm_discriminator", "inception")
KINDS += ("dit", "sd_unet", "autoencoder", "clip_text")
DENOISERS = ("edm", "adm", "score_sde", "dit", "sd_unet")
# kind -> names that tell it, without what may stand in front of them
_SIGNS = {
    "edm": (r"(model\.)?enc\.\d{1,6}x\d{1,6}_conv\.weight",),
    "adm": (r"time_embed\.0\.weight", r"input_blocks\.0\.0\.weight"),
    "score_sde": (r"all_modules\.\d{1,6}\.NIN_3\.W", r"all_modules\.\d{1,6}\.Dense_0\.weight"),
    "ogdm_discriminator": (r"mapping\.embed\.weight", r"b4\.out\.weight"),
    "inception": (
        r"(base\.)?((Conv2d_1a_3x3|blocks\.0\.0)\.conv|layers\.mixed(\.tower)?\.conv)\.weight",
    ),
    "dit": (  # the authors' names, and diffusers'
        r"(x_embedder|pos_embed)\.proj\.weight",
        r"(blocks\.0\.adaLN_modulation\.1|transformer_blocks\.0\.norm1\.emb\.class_embedder\."
        r"embedding_table)\.weight",
    ),
    "sd_unet": (r"time_embedding\.linear_1\.weight", r"down_blocks\.0\.resnets\.0\.norm1\.weight"),
    "autoencoder": (r"post_quant_conv\.weight", r"decoder\.conv_in\.weight"),
    "clip_text": (
        r"((text_model\.)?encoder\.layers|transformer\.resblocks)\.0\."
        r"(layer_norm1|ln_1)\.weight",
        r"((text_model\.)?embeddings\.)?token_embedding\.weight",
    ),
}
_FOUND = {
    kind: [re.compile(rf"(?:^|\.)({sign})$") for sign in signs] for kind, signs in _SIGNS.items()
}
# the frequencies of score_sde's Fourier features, a parameter without gradient
_FREQUENCIES = re.compile(r"(.*\.)?all_modules\.0\.W")
_BUFFERS = ("resample_filter", "freqs", "running_mean", "running_var", "num_batches_tracked")
# What training programs keep among the tensors of a network and no network computes with.
_EXTRA = re.compile(
    r"total_(ops|params)|num_batches_tracked|n_averaged|num_updates|decay|initted|logvar|snr|"
    r"((global|num)_)?(step|epoch|iter|iteration)s?|lvlb_weights|timesteps|(p2_)?loss_weights?|"
    r"position_ids|"  # counts from 0, in text encoders
    r"(\w+_)?(alphas|betas|sigmas)(_\w+)?|(\w+_)?alpha_(cumprod|bar)\w*|posterior_\w+"
)
_WEIGHTS = ("weight", "bias", "scale", "gamma", "beta", "mean", "var")

# (model_channels, channel_mult, blocks a level, downsampling factors with attention, input
# channels) -> the hidden. Sources: the flags published beside the checkpoints
# (openai/guided-diffusion, Junoh-Kang/OGDM_adm, DSG's yaml files).
_PUBLISHED: dict[tuple, dict[str, Any]] = {
    (192, (1, 2, 3, 4), 3, (2, 4, 8), 3): {
        "img_resolution": 64,
        "head_channels": 64,
        "qkv_order": "new",
    },
    (256, (1, 1, 2, 3, 4), 2, (4, 8, 16), 3): {"img_resolution": 128, "num_heads": 4},
    (256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), 3): {"img_resolution": 256, "head_channels": 64},
    (256, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), 3): {
        "img_resolution": 512,
        "head_channels": 64,
    },
    (192, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), 6): {"img_resolution": 256, "num_heads": 4},
    (192, (1, 1, 2, 2, 4, 4), 2, (16, 32), 6): {"img_resolution": 512, "head_channels": 64},
    (128, (1, 1, 2, 2, 4, 4), 1, (16,), 3): {"img_resolution": 256, "head_channels": 64},
    (128, (1, 2, 2, 2), 3, (2, 4), 3): {"img_resolution": 32, "num_heads": 1},
    (128, (1, 2, 3, 4), 3, (4, 8), 3): {"img_resolution": 64, "num_heads": 1},
}


# the one published with cosine betas
_COSINE = {"model_channels": 192, "img_channels": 3, "img_resolution": 64}


def schedule_of(network: Any) -> str:
    """The betas that an OpenAI U-Net was trained with, as published.

    "cosine" of the 64-pixel model, "linear" of all others: the default of that code.
    """
    cosine = all(getattr(network, name, None) == value for name, value in _COSINE.items())
    return "cosine" if cosine else "linear"


class UnrecognisedError(ValueError):
    """A state dict of no known network, or one whose tensors do not determine its settings.

    The text is one sentence.
    """


def places(names: Iterable[str]) -> list[tuple[str, str]]:
    """(prefix, kind) of each known network among the names; a prefix ends in a dot or is ""."""
    names, found = list(names), []
    for kind, signs in _FOUND.items():
        prefixes = [
            {name[: match.start(1)] for name in names if (match := sign.search(name))}
            for sign in signs
        ]
        for prefix in sorted(set.intersection(*prefixes)):
            found.append((prefix, _of_ldm(names, prefix) if kind == "adm" else kind))
    return found


def _of_ldm(names: list[str], prefix: str) -> str:
    """Of networks with OpenAI's names: a U-Net, one with attention to a text, or half of one."""
    here = [name for name in names if name.startswith(prefix)]
    if any(name.endswith("transformer_blocks.0.attn2.to_k.weight") for name in here):
        return "sd_unet"
    whole = any(name.startswith(f"{prefix}output_blocks.") for name in here)
    return "adm" if whole else "adm_encoder"


def kind_of(shapes: Shapes) -> str:
    """One of KINDS. Raises UnrecognisedError naming a few of the tensors."""
    for prefix, kind in places(shapes):
        if not prefix:
            return kind
    some = ", ".join(quote(name) for name in sorted(shapes)[:3])
    raise UnrecognisedError(
        f"state: {len(shapes)} tensors ({some}, ...) of no known network; expected "
        f"{', '.join(KINDS)}"
    )


def is_buffer(name: str) -> bool:
    """Whether a tensor is none of the parameters that are trained and averaged."""
    leaf = name.rpartition(".")[2]
    if leaf in _BUFFERS or name in ("u", "model.u") or _FREQUENCIES.fullmatch(name):
        return True
    return bool(_EXTRA.fullmatch(leaf[:80]))


def is_extra(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor that a network has no place for can be left out: counts, tables of noise."""
    leaf = name.rpartition(".")[2]
    if max(shape, default=1) < math.prod(shape) or leaf in _WEIGHTS:
        return False
    return math.prod(shape) <= 1 or bool(_EXTRA.fullmatch(leaf[:80]))


def edm_settings(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Constructor arguments of EDM's networks, in the authors' words (model_type included).

    Raises:
      UnrecognisedError: an encoder or decoder variant that no published model uses, or levels that
        do not fit together.
    """
    state = {name.removeprefix("model."): value for name, value in state.items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    sides = sorted({int(s) for s in _all(shapes, r"enc\.(\d{1,6})x\d+_.*")}, reverse=True)
    song = "out_conv.weight" not in shapes
    if "emb_noise.weight" in shapes:
        raise UnrecognisedError(
            "state: holds a network of EDM2, whose layers are not offered; expected one of EDM"
        )
    variant = [name for name in shapes if re.search(r"_aux_(down|skip|up)\.", name)]
    if variant or sides != [sides[0] >> i for i in range(len(sides))]:
        odd = (
            f"{quote(variant[0])}: a 'skip' variant" if variant else f"the encoder's sides {sides}"
        )
        raise UnrecognisedError(
            f"state: {odd} is not offered; expected EDM's published encoders and decoders"
        )
    first = shapes[f"enc.{sides[0]}x{sides[0]}_conv.weight"]
    emb, noise = _get(shapes, "map_layer0.weight", 2)
    blocks = len(_all(shapes, rf"enc\.{sides[0]}x{sides[0]}_block(\d+)\.conv0\.weight"))
    width = first[0] if song else noise
    widths = [
        _get(shapes, f"enc.{side}x{side}_block{blocks - 1}.conv1.weight")[0] for side in sides
    ]
    out = _get(shapes, f"dec.{sides[0]}x{sides[0]}_aux_conv.weight" if song else "out_conv.weight")
    settings = {
        "model_type": "SongUNet" if song else "DhariwalUNet",
        "img_resolution": sides[0],
        "img_channels": first[1],
        "out_channels": out[0],
        "label_dim": shapes.get("map_label.weight", (0, 0))[1],
        "augment_dim": shapes.get("map_augment.weight", (0, 0))[1],
        "model_channels": width,
        "channel_mult": tuple(_ratio(w, width) for w in widths),
        "channel_mult_emb": _ratio(emb, width),
        "num_blocks": blocks,
        "attn_resolutions": tuple(s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in shapes),
    }
    if not song:
        return settings
    residual = any("_aux_residual." in name for name in shapes)
    taps = [value for name, value in state.items() if name.endswith(".resample_filter")]
    return settings | {
        "embedding_type": "fourier" if "map_noise.freqs" in shapes else "positional",
        "encoder_type": "residual" if residual else "standard",
        "channel_mult_noise": _ratio(noise, width),
        "resample_filter": _taps(taps[0]) if taps else ((1, 3, 3, 1) if residual else (1, 1)),
    }


def adm_settings(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of OpenAI's U-Net (ADMUNet's attributes, and qkv_order).

    Raises:
      UnrecognisedError: image size or heads of a model outside the table, and not among the
        caller's settings (given).
    """
    output = _blocks(shapes, "output_blocks")
    ends = [i for i, parts in enumerate(output) if any(p in ("up", "conv") for p in parts)]
    depth = (ends[0] if ends else len(output) - 1) or 0
    settings = _encoder(shapes, depth) | {"out_channels": _get(shapes, "out.2.weight")[0]}
    return _hidden(settings, given)


def encoder_settings(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of OpenAI's classifiers and DG's heads (ADMEncoder's attributes, and qkv_order).

    Attention heads have 64 channels unless the caller's settings (given) say otherwise.

    Raises:
      UnrecognisedError: the depth, or without an attention pool the image size, does not follow
        from the tensors.
    """
    blocks = len(_blocks(shapes, "input_blocks"))
    depths = [d for d in range(1, blocks) if blocks % (d + 1) == 0 and _fits(shapes, d)]
    if "num_blocks" in given:
        depths = [int(given["num_blocks"])]
    if len(depths) != 1:
        raise UnrecognisedError(
            f"num_blocks: {depths} all fit the state's tensors; give the number of blocks a level"
        )
    settings = _encoder(shapes, depths[0])
    factor = 2 ** (len(settings["channel_mult"]) - 1)
    if "out.2.positional_embedding" in shapes:
        side = round((shapes["out.2.positional_embedding"][1] - 1) ** 0.5)
        settings |= {"pool": "attention", "img_resolution": side * factor}
        settings["out_channels"] = _get(shapes, "out.2.c_proj.weight")[0]
    elif "out.3.weight" in shapes and "out.0.weight" in shapes:
        settings["pool"] = "adaptive" if len(shapes["out.3.weight"]) == 4 else "spatial_v2"
        settings["out_channels"] = shapes["out.3.weight"][0]
    else:
        settings["pool"], settings["out_channels"] = "spatial", _get(shapes, "out.2.weight")[0]
    if "img_resolution" not in settings | dict(given):
        raise UnrecognisedError(
            "img_resolution: the tensors of this classifier do not show it; give it as a setting"
        )
    settings["img_resolution"] = int(given.get("img_resolution", settings.get("img_resolution", 0)))
    return _completed(settings, {"head_channels": 64, "qkv_order": "legacy"}, given)


def _hidden(settings: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what shapes hide: given by the user, else published."""
    fields = ("model_channels", "channel_mult", "num_blocks", "attention_factors", "img_channels")
    published = _PUBLISHED.get(tuple(settings[field] for field in fields), {})
    heads = {"num_heads", "head_channels"}
    needed = {"img_resolution": {"img_resolution"}}
    if settings["attention_factors"]:
        needed["head_channels (or num_heads)"] = heads
    for field, names in needed.items():
        if not names & (set(given) | set(published)):
            raise UnrecognisedError(
                f"{field}: the tensors do not show it and the model is none of the published ones; "
                "give it as a setting"
            )
    if heads & set(given):
        published = {name: value for name, value in published.items() if name not in heads}
    return _completed(settings, {"qkv_order": "legacy"} | published, given)


def _completed(
    settings: dict[str, Any], hidden: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings, with attention by image side instead of by downsampling factor."""
    settings = {**settings, **hidden, **given}
    factors = settings.pop("attention_factors")
    settings.setdefault("attn_resolutions", tuple(settings["img_resolution"] // f for f in factors))
    return settings


def _encoder(shapes: Shapes, depth: int) -> dict[str, Any]:
    """What OpenAI's input_blocks, embeddings and middle block show."""
    blocks = _blocks(shapes, "input_blocks")
    emb, width = _get(shapes, "time_embed.0.weight", 2)
    starts = range(1, len(blocks), depth + 1)
    widths = [_get(shapes, f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in starts]
    attended = tuple(
        2**level for level, i in enumerate(starts) if f"input_blocks.{i}.1.qkv.weight" in shapes
    )
    block = widths[0], _get(shapes, "input_blocks.1.0.emb_layers.1.weight")[0]
    return {
        "img_channels": _get(shapes, "input_blocks.0.0.weight")[1],
        "label_dim": shapes.get("label_emb.weight", (0,))[0],
        "model_channels": width,
        "channel_mult": tuple(_ratio(w, width) for w in widths),
        "num_blocks": depth,
        "attention_factors": attended,
        "scale_shift": block[1] == 2 * block[0],
        "resblock_updown": not any(
            re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name) for name in shapes
        ),
    } | ({} if emb == 4 * width else {"channel_mult_emb": _ratio(emb, width)})


def _fits(shapes: Shapes, depth: int) -> bool:
    """Whether the input blocks form levels: `depth` blocks of equal kind, then a downsampling."""
    blocks = _blocks(shapes, "input_blocks")
    for start in range(1, len(blocks), depth + 1):
        inside = blocks[start : start + depth]
        down = blocks[start + depth : start + depth + 1]
        if any("op" in parts for parts in inside) or len({"qkv" in parts for parts in inside}) > 1:
            return False
        if any("skip_connection" in parts for parts in inside[1:] + down):
            return False
        if any("qkv" in parts for parts in down):
            return False
    return True


def _blocks(shapes: Shapes, group: str) -> list[set[str]]:
    """The layers that each numbered entry contains: "qkv" (attention), "op" (strided convolution),
    "conv" (upsampling), "up" (upsampling by a block), "skip_connection", and others.
    """
    found: dict[int, set[str]] = {}
    for name in shapes:
        if match := re.fullmatch(rf"{group}\.(\d+)\.(\d+)\.(\w+).*", name):
            inside = found.setdefault(int(match[1]), set())
            upwards = match[3] == "in_layers" and int(match[2]) > 0  # behind the block itself
            inside.add("up" if upwards else match[3])
    if sorted(found) != list(range(len(found))):
        raise UnrecognisedError(
            f"state: {group} has the entries {sorted(found)}; expected 0, 1, 2, ... without a gap"
        )
    return [found[i] for i in sorted(found)]


def _all(shapes: Shapes, pattern: str) -> list[str]:
    return [match[1] for name in shapes if (match := re.fullmatch(pattern, name))]


def _get(shapes: Shapes, name: str, rank: int | None = None) -> tuple[int, ...]:
    if name not in shapes:
        raise UnrecognisedError(
            f"state: {name} is missing, without which the network's size is unknown"
        )
    if rank not in (None, len(shapes[name])):
        raise UnrecognisedError(
            f"state: {name} has shape {shapes[name]}; expected {rank} dimensions"
        )
    return shapes[name]


def _ratio(value: int, unit: int) -> int | float:
    return value // unit if value % unit == 0 else value / unit


def _taps(resample_filter: np.ndarray) -> tuple[int, ...]:
    """[1,1,k,k] = outer(f, f) / sum(f)^2 -> f in whole numbers."""
    shape = np.shape(resample_filter)
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    if not square or not 0 < shape[2] <= _MOST_TAPS:
        raise UnrecognisedError(
            f"resample_filter: the state's has shape {shape}; expected (1, 1, k, k) with k to "
            f"{_MOST_TAPS}"
        )
    row = np.asarray(resample_filter, np.float64)[0, 0].sum(axis=0)
    taps = np.round(row / row.min()).astype(int) if row.min() > 0 else np.ones(len(row), int)
    if not np.allclose(np.outer(taps, taps) / taps.sum() ** 2, resample_filter[0, 0], atol=1e-3):
        raise UnrecognisedError(
            "resample_filter: the state's filter is not an outer product of whole numbers"
        )
    return tuple(int(tap) for tap in taps)
