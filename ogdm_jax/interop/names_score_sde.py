"""PyTorch names of score_sde's NCSN++ and DDPM++ (2011.13456) -> variables of SongUNet.

Their code is yang-song/score_sde_pytorch. It numbers layers in the order in which they run
(all_modules.7.Conv_0.weight), attention apart from its block, with q, k and v as three layers whose
matrices are [in, out]. EDM's SongUNet is the same network under other names: the tensors get these,
and EDM's map does the rest. Not offered: unconditional networks, DDPM's own blocks, and the 'skip'
variants of 256 and 1,024 pixels.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ogdm_jax.interop import names_edm
from ogdm_jax.interop.names_shared import Entry
from ogdm_jax.interop.recognise import Shapes, UnrecognisedError
from ogdm_jax.networks.unet import SongUNet
from ogdm_jax.typing import PyTree

_BLOCK = {
    "norm0": "GroupNorm_0",
    "conv0": "Conv_0",
    "affine": "Dense_0",
    "norm1": "GroupNorm_1",
    "conv1": "Conv_1",
    "skip": "Conv_2",
}
_ATTENTION = {"norm2": "GroupNorm_0", "qkv": "NIN_0 NIN_1 NIN_2", "proj": "NIN_3"}
_ATTENDS_AT = 16  # pixels, in every released configuration


def score_sde_settings(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """SongUNet's attributes.

    Tensors show the level that attends and not the image's size: as published, 16 pixels attend
    unless the caller's settings (given) have img_resolution. The low-pass filter of resampling is
    1-3-3-1 where the image joins every level (NCSN++) and 1-1 elsewhere (DDPM++), as published.

    Raises:
      UnrecognisedError: a variant that is not offered, or a size that nothing shows.
    """
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"all_modules\.(\d{1,6})\.(.+)", name):
            layers.setdefault(int(match[1]), {})[match[2]] = shape
    _offered(layers)
    at = 1 if "W" in layers[0] else 0
    width, channels = layers[at + 2]["weight"][:2]
    emb, noise = layers[at]["weight"]
    blocks = [i for i in sorted(layers) if "Conv_1.weight" in layers[i]]
    resampled = [n for n, i in enumerate(blocks) if _resamples(layers[i])]
    depth = resampled[0] if resampled else (len(blocks) - 3) // 2
    starts = [blocks[level * (depth + 1)] for level in range(len(resampled) // 2 + 1)]
    ends = [blocks[blocks.index(i) + depth - 1] for i in starts]
    attending = [n for n, i in enumerate(starts) if "NIN_3.W" in layers[i + 1]]
    if "img_resolution" not in given and len(attending) != 1:
        raise UnrecognisedError(
            "img_resolution: the tensors of this score_sde network do not show it; give it as a "
            "setting (--set img_resolution=32)"
        )
    side = int(given.get("img_resolution", _ATTENDS_AT << (attending or [0])[0]))
    residual = any("Conv2d_0.weight" in layer for layer in layers.values())
    return {
        "img_resolution": side,
        "img_channels": channels,
        "out_channels": layers[max(layers)]["weight"][0],
        "model_channels": width,
        "channel_mult": tuple(layers[i]["Conv_1.weight"][0] // width for i in ends),
        "channel_mult_emb": emb // width,
        "channel_mult_noise": noise // width,
        "num_blocks": depth,
        "attn_resolutions": tuple(side >> level for level in attending),
        "embedding_type": "fourier" if at else "positional",
        "encoder_type": "residual" if residual else "standard",
        "resample_filter": (1, 3, 3, 1) if residual else (1, 1),
    }


def sigma_max(state: Mapping[str, np.ndarray]) -> float | None:
    """The highest level, for images in [-1, 1]: their `sigmas` are of images in [0, 1]."""
    return 2 * float(np.max(state["sigmas"])) if "sigmas" in state else None


def supposed(network: SongUNet, given: Mapping[str, Any]) -> tuple[str, ...]:
    """What the tensors do not show and was taken as published, as a sentence."""
    words = {
        "img_resolution": f"images of {network.img_resolution} pixels (--set img_resolution=...)",
        "resample_filter": f"the resampling filter {tuple(network.resample_filter)}",
    }
    left = [text for name, text in words.items() if name not in given]
    return (f"not said by the tensors, taken as published: {'; '.join(left)}",) if left else ()


def _offered(layers: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises UnrecognisedError for the variants whose layers SongUNet lacks."""
    for index, layer in layers.items():
        alone = "Conv_0.weight" in layer and "Conv_1.weight" not in layer
        if alone or ("NIN_0.W" in layer and "Conv_1.weight" in layer):
            raise UnrecognisedError(
                f"state: all_modules.{index} is of a variant of score_sde that is not offered "
                "('skip' pyramids, or the blocks of DDPM); expected its NCSN++ or DDPM++ of 32 or "
                "64 pixels"
            )


def _resamples(block: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a block halves or doubles the resolution: a shortcut between equal widths."""
    out, inputs = block["Conv_0.weight"][:2]
    return "Conv_2.weight" in block and out == inputs


def _layers(network: SongUNet) -> Iterator[dict[str, str]]:
    """{EDM's name of a module: what theirs adds to all_modules.N} of each of their layers."""
    top = f"{network.img_resolution}x{network.img_resolution}"
    if network.embedding_type == "fourier":
        yield {"map_noise": ""}
    yield from ({"map_layer0": ""}, {"map_layer1": ""}, {f"enc.{top}_conv": ""})
    for step in network.plan():
        block = step.name.replace("_", ".", 1)
        yield {f"{block}.{ours}": theirs for ours, theirs in _BLOCK.items()}
        if step.attend:
            yield {f"{block}.{ours}": theirs for ours, theirs in _ATTENTION.items()}
        if step.down and network.encoder_type == "residual":
            yield {block.replace("down", "aux_residual"): "Conv2d_0"}
    yield from ({f"dec.{top}_aux_norm": ""}, {f"dec.{top}_aux_conv": ""})


def _names(network: SongUNet) -> Iterator[tuple[Entry, list[str]]]:
    """Every tensor of the network with its names in their files: one, or three of qkv."""
    modules = {
        f"model.{ours}": [f"all_modules.{i}.{part}".rstrip(".") for part in theirs.split(" ")]
        for i, layer in enumerate(_layers(network))
        for ours, theirs in layer.items()
    }
    for entry in names_edm.edm_entries(network):
        module, _, leaf = entry.name.rpartition(".")
        matrix = module.endswith((".qkv", ".proj"))
        leaf = {"weight": "W", "bias": "b"}[leaf] if matrix else {"freqs": "W"}.get(leaf, leaf)
        yield entry, [f"{theirs}.{leaf}" for theirs in modules[module]]


def score_sde_shapes(network: SongUNet) -> dict[str, tuple[int, ...]]:
    """{their name: shape} of every tensor that the network needs."""
    found = {}
    for entry, names in _names(network):
        shape = entry.torch_shape
        shape = shape[:2] if ".NIN_" in names[0] else shape
        found |= {name: (shape[0] // len(names), *shape[1:]) for name in names}
    return found


def score_sde_to_flax(state: Mapping[str, np.ndarray], network: SongUNet) -> PyTree:
    """Variables of the network from a state dict without prefix.

    The frequencies of Fourier features, a parameter without gradient there, are a buffer.

    Raises:
      ValueError: a tensor is missing or has another shape.
    """
    return names_edm.edm_to_flax(
        {entry.name: _joined(state, entry, names) for entry, names in _names(network)}, network
    )


def _joined(state: Mapping[str, np.ndarray], entry: Entry, names: list[str]) -> np.ndarray:
    """Their tensors as EDM's: matrices transposed, q, k and v in turn for each channel."""
    parts = [np.asarray(state[name]) for name in names]
    if ".NIN_" not in names[0]:
        return parts[0]
    rows = np.stack([part.T for part in parts], axis=1)
    return rows.reshape(entry.torch_shape)
