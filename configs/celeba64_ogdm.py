"""OGDM from scratch on CelebA at 64x64 with the ADM U-Net: the authors' guided-diffusion code,
switch by switch.

    python train.py --config configs/celeba64_ogdm.py --config.data.source=folder:DIR --workdir
        runs/celeba64_ogdm

DIR holds the images; they are cropped to squares and resized to 64x64. Aim: FID 11.92 -> 7.91 at
DDIM-10 and 7.88 -> 3.94 at DDIM-20 against the same training without OGDM (--config.methods=)
[authors' logs; not reproduced here]. The authors' fine-tuning: --config.init.workdir=runs/BASELINE
--config.ogdm.gamma=0.025 --config.ogdm.k=0.2 and 15,000 steps in place of the three 300,000.
"""

from ogdm_jax.configs import base
from ogdm_jax.methods import ogdm


def get_config():
    config = base.get_config()
    config.methods = ("ogdm",)
    # gamma 0.01, k 0.1, pairs of indices, one shared network call, R1 0.25
    config.ogdm.update(ogdm.preset("adm"))
    config.ogdm.decay = 300_000
    config.data.source = "folder:data/celeba64"
    config.data.resolution = 64
    config.data.batch = 128  # 4 GPUs with 32 images each, whose minibatch statistics stay their own
    config.data.augment = 0.0
    config.data.xflip = True
    config.network.kind = "openai"
    config.network.channel_mult = (1, 2, 3, 4)
    config.network.num_blocks = 3
    config.network.attn_resolutions = (16, 8)
    config.network.dropout = 0.0
    config.precondition.kind = "adm"
    config.noise.distribution = "ddpm"
    config.optim.learning_rate = 1e-4
    config.optim.ramp = "0 steps"
    config.optim.decay = "300000 steps"
    config.ema.halflife = "6931 steps"  # 0.5^(1 / 6931) = 0.9999
    config.ema.rampup = 0.0
    config.train.duration = "300000 steps"
    config.train.save_every = "10000 steps"
    config.sample.solver = "ddim"
    config.sample.steps = 20
    config.sample.grid = "ddim"
    return config
