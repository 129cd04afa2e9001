"""Settings of latent models' networks from the names and shapes of their tensors: DiT, Stable
Diffusion's autoencoder, U-Net and text encoders.

Shapes hide the number of heads, of groups, and the activation: for the published models these
follow from widths; for others they are settings that the user gives.
"""

import re
from collections.abc import Mapping
from typing import Any

from ogdm_jax.interop.names_latent import diffusers_dit
from ogdm_jax.interop.recognise import Shapes, UnrecognisedError
from ogdm_jax.networks.dit import SIZES

_HEADS = {width: heads for width, _, heads in SIZES.values()}
_HEAD_WIDTH = 64  # of Stable Diffusion 2's U-Net and of both text encoders
CONTEXT_1 = 768  # width of the context of Stable Diffusion 1, whose attentions have 8 heads
# U-Nets of the same family with another input, by the channels of their first convolution
_OTHER_INPUTS = {
    5: "a depth-to-image U-Net",
    7: "an upscaling U-Net",
    8: "a U-Net that edits images",
    9: "an inpainting U-Net",
}


def _numbers(shapes: Shapes, pattern: str) -> list[int]:
    """The numbers that a pattern's group has among the names, in order."""
    found = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    if sorted(found) != list(range(len(found))):
        raise UnrecognisedError(
            f"state: its names count {sorted(found)} at {pattern!r}; expected 0, 1, 2, ... without "
            "a gap"
        )
    return sorted(found)


def dit_settings(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """DiT's attributes. The table of classes is taken to have a row for "none", as published."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    rows = shapes.get("y_embedder.embedding_table.weight", (0,))[0]
    positions = shapes["pos_embed"][1] if "pos_embed" in shapes else 0
    side = round(positions**0.5) * patch
    no_class = bool(given.get("no_class", True))
    found = {
        "img_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "label_dim": max(rows - no_class, 0),
        "patch": patch,
        "width": width,
        "depth": len(_numbers(shapes, r"blocks\.(\d{1,4})\.")),
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
        **({"img_resolution": side} if side else {}),
        **({"heads": _HEADS[width]} if width in _HEADS else {}),
    } | dict(given)
    for name in ("img_resolution", "heads"):
        if name not in found:
            raise UnrecognisedError(
                f"{name}: the tensors do not show it and the DiT is none of the published sizes; "
                "give it as a setting"
            )
    return found


def dit_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """What `dit_settings` reads, by the authors' names, of a DiT in diffusers'."""
    blocks = _numbers(shapes, r"transformer_blocks\.(\d{1,4})\.")
    modules = ["x_embedder.proj", "y_embedder.embedding_table", "final_layer.linear"]
    read = [f"{module}.weight" for module in (*modules, *(f"blocks.{i}.mlp.fc1" for i in blocks))]
    return {name: shapes[diffusers_dit(name, 1)[0]] for name in read}


def vae_levels(shapes: Shapes) -> int:
    """Levels of an autoencoder, in diffusers' names or LDM's."""
    return len(_numbers(shapes, r"encoder\.down(?:_blocks)?\.(\d{1,2})\."))


def autoencoder_settings(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """AutoencoderKL's attributes, from names as diffusers has them (`names_latent.vae_name`)."""
    levels = vae_levels(shapes)
    at = "encoder.down_blocks"
    first = rf"{re.escape(at)}\.0\.resnets\.(\d{{1,3}})\."
    return {
        "img_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "widths": tuple(shapes[f"{at}.{i}.resnets.0.conv1.weight"][0] for i in range(levels)),
        "num_blocks": len(_numbers(shapes, first)),
    } | dict(given)


def sd_unet_settings(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """UNet2DCondition's attributes, in diffusers' names or LDM's.

    Raises:
      UnrecognisedError: a U-Net of the family that is not offered, by its name.
    """
    ldm = "time_embed.0.weight" in shapes
    first = shapes["input_blocks.0.0.weight" if ldm else "conv_in.weight"]
    if "add_embedding.linear_1.weight" in shapes or "label_emb.0.0.weight" in shapes:
        raise UnrecognisedError(
            "state: holds a U-Net with further embeddings (Stable Diffusion XL, unCLIP); expected "
            "one of Stable Diffusion 1 or 2"
        )
    if first[1] in _OTHER_INPUTS:
        raise UnrecognisedError(
            f"state: holds {_OTHER_INPUTS[first[1]]} ({first[1]} input channels); expected one of "
            "Stable Diffusion 1 or 2, whose input is the latent alone"
        )
    key = "transformer_blocks.0.attn2.to_k.weight"
    if (cross := next((name for name in shapes if name.endswith(key)), None)) is None:
        raise UnrecognisedError(
            "state: holds a U-Net of diffusers without texts (UNet2DModel), which is not offered; "
            "expected one of Stable Diffusion 1 or 2, or OpenAI's, EDM's or score_sde's own file"
        )
    found = _ldm_levels(shapes) if ldm else _diffusers_levels(shapes)
    projection = cross.replace("transformer_blocks.0.attn2.to_k", "proj_in")
    context, widths = shapes[cross][1], found["widths"]
    heads = [8 if context == CONTEXT_1 else max(width // _HEAD_WIDTH, 1) for width in widths]
    out = shapes["out.2.weight" if ldm else "conv_out.weight"][0]
    return {
        **found,
        "img_channels": first[1],
        "out_channels": out,
        "context_dim": context,
        "heads": tuple(heads),
        "linear_projection": len(shapes[projection]) == 2,
    } | dict(given)


def _diffusers_levels(shapes: Shapes) -> dict[str, Any]:
    levels = _numbers(shapes, r"down_blocks\.(\d{1,2})\.")
    return {
        "widths": tuple(shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in levels),
        "attends": tuple(f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in levels),
        "num_blocks": len(_numbers(shapes, r"down_blocks\.0\.resnets\.(\d{1,3})\.")),
    }


def _ldm_levels(shapes: Shapes) -> dict[str, Any]:
    blocks = len(_numbers(shapes, r"input_blocks\.(\d{1,3})\."))
    halved = [i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in shapes]
    depth = (halved[0] if halved else blocks) - 1
    starts = [1 + level * (depth + 1) for level in range(len(halved) + 1)]
    return {
        "widths": tuple(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in starts),
        "attends": tuple(f"input_blocks.{i}.1.norm.weight" in shapes for i in starts),
        "num_blocks": depth,
    }


def clip_settings(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """CLIPText's attributes, in the names of transformers or of open_clip.

    OpenCLIP's models, and those as wide as its, have the exact GELU. All layers of the file are
    taken: Stable Diffusion 2 leaves out the last of open_clip's (`depth=23`).
    """
    opened = "ln_final.weight" in shapes
    bare = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    at = "" if opened else "embeddings."
    position = "positional_embedding" if opened else "embeddings.position_embedding.weight"
    layer = r"transformer\.resblocks\.(\d{1,3})\." if opened else r"encoder\.layers\.(\d{1,3})\."
    inside = (
        "transformer.resblocks.0.mlp.c_fc.weight" if opened else "encoder.layers.0.mlp.fc1.weight"
    )
    vocabulary, width = bare[f"{at}token_embedding.weight"]
    return {
        "vocabulary": vocabulary,
        "positions": bare[position][0],
        "width": width,
        "depth": len(_numbers(bare, layer)),
        "heads": max(width // _HEAD_WIDTH, 1),
        "hidden": bare[inside][0],
        "quick": not opened and width == CONTEXT_1,
    } | dict(given)
