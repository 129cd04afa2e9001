"""Names and shapes of the published latent models' files: none missing, none left over."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from ogdm_jax.interop import names_latent
from ogdm_jax.networks.clip_text import CLIPText
from ogdm_jax.networks.dit import SIZES, DiT
from ogdm_jax.networks.sd_unet import UNet2DCondition
from ogdm_jax.networks.vae import AutoencoderKL

FOLDER = Path(__file__).parent / "golden" / "fullsize"


def published(name: str) -> dict[str, tuple[int, ...]]:
    listed = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    return {entry[0]: tuple(entry[1]) for entry in listed["entries"]}


def shapes(entries) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.torch_shape for entry in entries}


@pytest.mark.parametrize(
    "file,size,patch,side,count",
    [
        ("dit-s2-256", "S", 2, 32, 32_963_360),
        ("dit-b2-256", "B", 2, 32, 130_512_416),
        ("dit-b4-256", "B", 4, 32, 130_475_648),
        ("dit-l2-256", "L", 2, 32, 458_102_816),
        ("dit-xl2-256", "XL", 2, 32, 675_129_632),
        ("dit-xl2-512", "XL", 2, 64, 676_014_368),
    ],
)
def test_dit(file, size, patch, side, count):
    width, depth, heads = SIZES[size]
    network = DiT(
        img_resolution=side,
        out_channels=8,
        label_dim=1000,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
    )
    theirs = published(file)
    positions = theirs.pop("pos_embed")
    assert positions == (1, (side // patch) ** 2, width)
    assert shapes(names_latent.dit_entries(network)) == theirs
    assert sum(math.prod(s) for s in theirs.values()) + math.prod(positions) == count


def test_autoencoder():
    network = AutoencoderKL()
    entries = names_latent.vae_entries(network)
    assert shapes(entries) == published("sd-vae-diffusers")
    assert sum(math.prod(e.shape) for e in entries) == 83_653_863
    listed = [n.removeprefix("first_stage_model.") for n in published("sd-vae-ldm")]
    assert {names_latent.vae_name(name, 4) for name in listed} == {e.name for e in entries}


@pytest.mark.slow_cases("sd15*")
@pytest.mark.parametrize(
    "version,count,settings",
    [
        ("sd15", 859_520_964, {}),
        (
            "sd21",
            865_910_724,
            {"heads": (5, 10, 20, 20), "context_dim": 1024, "linear_projection": True},
        ),
    ],
)
def test_unet(version, count, settings):
    network = UNet2DCondition(**settings)
    theirs = published(f"{version}-unet-diffusers")
    squeezed = {n: s[:2] if "proj_in" in n or "proj_out" in n else s for n, s in theirs.items()}
    assert shapes(names_latent.sd_unet_entries(network)) == squeezed
    assert sum(math.prod(s) for s in theirs.values()) == count
    names = names_latent.ldm_unet_names(network)
    listed = published(f"{version}-unet-ldm")
    unprefixed = {n.removeprefix("model.diffusion_model."): s for n, s in listed.items()}
    assert set(names) == set(unprefixed)
    assert all(unprefixed[name] == theirs[ours] for name, ours in names.items())


@pytest.mark.parametrize(
    "file,settings",
    [
        ("clip-l-text", {}),
        (
            "openclip-h-text-23",
            {"width": 1024, "depth": 23, "heads": 16, "hidden": 4096, "quick": False},
        ),
    ],
)
def test_clip_text(file, settings):
    theirs = published(file)
    prefixed = {f"text_model.{n.removeprefix('text_model.')}": s for n, s in theirs.items()}
    prefixed.pop("text_model.embeddings.position_ids", None)
    assert shapes(names_latent.clip_entries(CLIPText(**settings))) == prefixed


def test_a_trained_table_of_positions_is_refused():
    network = DiT(img_resolution=4, patch=2, width=8, depth=1, heads=2)
    with pytest.raises(ValueError, match="pos_embed.*expected a DiT whose positions"):
        names_latent.dit_to_flax({"pos_embed": np.zeros((1, 4, 8), np.float32)}, network)
