"""A tiny Stable Diffusion of random weights as a folder of diffusers, and pictures with captions that
its autoencoder has encoded: what runs on texts need.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import config as configs
from ogdm_jax import models
from ogdm_jax.cli import data as command
from ogdm_jax.data.pictures import save_png
from ogdm_jax.interop import stable_diffusion
from ogdm_jax.latents import Latents
from tests.support import latents
from tests.support.golden_support import FOLDER, Golden
from tests.support.networks import born
from tests.support.tiny import ROOT

TEXTS = ("a photo of a cat", "the dog", "red car", "a cat and the dog")
SMALL = (
    *("network.model_channels=8", "network.channel_mult=(1.0,2.0)", "network.num_blocks=1"),
    *("network.head_channels=4", "network.context=8", "network.groups=4", "network.remat=false"),
    *("network.text_layers=1", "network.text_heads=2", "network.text_hidden=16"),
    *("network.text_vocabulary=604", "network.dtype=float32", "data.batch=8"),
    *("train.duration=2 steps", "train.save_every=0 steps", "log.every=1 steps"),
    *("log.tensorboard=false", "sample.every=0 steps", "sample.num=4", "sample.steps=2"),
    *("parallel.plan=mesh", "parallel.devices=1"),
)


def config(*more: str) -> configs.Config:
    """configs/sd21_sp.py, shrunk."""
    return configs.load(ROOT / "configs" / "sd21_sp.py", (*SMALL, *more))


def pipeline(place: Path) -> Path:
    """The folder: the golden pipelines' tokenizer, an autoencoder of grey pictures."""
    settings, key = config(), jax.random.key(0)
    kept = place / "words" / stable_diffusion.TOKENIZER
    kept.mkdir(parents=True)
    golden = Golden(FOLDER / "sd_pipeline_v2_ztsnr.npz")
    for name, value in golden.arrays.items():
        if name.startswith("file/tokenizer/"):
            (kept / name.rpartition("/")[2]).write_text(str(value))
    model = models.build(settings, (4, 4, 2), 0, Latents((4, 4, 2)))
    params, buffers = jax.eval_shape(model.init, key)
    rng = np.random.default_rng(0)  # of numpy: nothing is compiled
    params, text = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        (params, buffers[models.TEXT]),
    )
    vae = born(jax.eval_shape(latents.NETWORK.init, key, jnp.zeros((1, 8, 8, 1))))
    networks = {
        "unet": (model.network, {"params": params}),
        "text_encoder": (model.text, text),
        "vae": (latents.NETWORK, vae),
    }
    stable_diffusion.write(place / "sd", settings, networks, place / "words")
    return place / "sd"


def pictures(folder: Path, n: int = 12, seed: int = 0, side: int = 8) -> str:
    """Grey pictures in two folders, each beside its caption; the source's name."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        save_png(place / f"{i:02d}.png", rng.uniform(-1, 1, (side, side, 1)).astype(np.float32))
        (place / f"{i:02d}.txt").write_text(f"{TEXTS[i % len(TEXTS)]}\n")
    return f"folder:{folder}?caption=txt"


def encoded(source: str, vae: Path, out: Path) -> str:
    """The source's latents; their name."""
    words = ["encode", source, "--vae", str(vae), "--out", str(out), "--batch", "4"]
    assert command.main(words) == 0
    return f"latents:{out}"
