"""A snapshot as EDM's code pickles it, of hash weights."""

from pathlib import Path

import numpy as np

from ogdm_jax.interop import names_edm
from tests.support import golden_support
from tests.support import torch_files as tf


def published(folder: Path, side: int = 8, labels: int = 10, channels: int = 1) -> Path:
    """A snapshot pickle of hash weights that fits the digits: grey, 8 pixels, 10 classes."""
    settings = {
        "img_resolution": side,
        "img_channels": channels,
        "label_dim": labels,
        "augment_dim": 0,
    }
    settings |= {
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (4,),
    }
    network = names_edm.edm_network(settings | {"model_type": "SongUNet"})
    shapes = {entry.name: entry.torch_shape for entry in names_edm.edm_entries(network)}
    state = {}
    for rank, (name, shape) in enumerate(sorted(shapes.items())):
        hashed = (
            golden_support.hash_values(int(np.prod(shape)), rank).reshape(shape).astype(np.float32)
        )
        fan = np.prod(shape[1:]) if len(shape) > 1 else 100
        state[name] = (
            hashed / np.sqrt(fan) + (len(shape) == 1 and name.endswith("weight"))
        ).astype(np.float32)
    ema = tf.network(state, tf.pickled_tensor, sigma_data=0.5, _init_kwargs={"dropout": 0.1})
    path = folder / "network-snapshot-000001.pkl"
    path.write_bytes(tf.pickled({"ema": ema}))
    return path
