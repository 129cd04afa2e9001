"""An autoencoder of the shipped digits for a latent model: 8x8 pixels to 4x4 latents of 2 channels.
Under a minute on two CPU cores.

python train.py --config configs/digits_vae.py

runs/digits_vae/vae is a folder of diffusers, which `ogdm data encode --vae` takes.
"""

import dataclasses

from ml_collections import ConfigDict

from ogdm_jax.configs import base
from ogdm_jax.methods import discovery
from ogdm_jax.training.autoencoder import Settings


def get_config():
    config = base.get_config().unlock()
    for name in ("noise", "precondition", *discovery.training()):
        del config[name]  # a denoiser's
    for name in ("conditional", "label_dropout", "augment"):
        del config.data[name]
    config.task = "autoencoder"
    config.vae = ConfigDict(dataclasses.asdict(Settings()))
    config.vae.latent_channels = 2
    config.vae.groups = 8
    config.vae.kl = 1e-3  # so few numbers: 1e-6 leaves them far from centred
    config.data.source = "digits"
    config.data.batch = 64
    config.network = ConfigDict()
    config.network.model_channels = 16
    config.network.channel_mult = (1, 2)  # a level halves the sides, but for the last one
    config.network.num_blocks = 1
    config.network.dtype = "float32"
    config.network.remat = False
    config.optim.learning_rate = 2e-3
    config.optim.ramp = "0 steps"
    config.optim.decay = "train.duration"
    config.ema.halflife = "2 kimg"
    config.ema.stds = ()
    config.train.duration = "1000 steps"
    config.train.save_every = "500 steps"
    config.log.every = "100 steps"
    config.sample = ConfigDict()  # images above their reconstructions
    config.sample.every = "500 steps"
    config.sample.num = 32
    config.evaluate.features = "digits"
    return config.lock()
