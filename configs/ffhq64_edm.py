"""EDM on FFHQ at 64x64, unconditional, DDPM++ (2206.00364, config F).

    python train.py --config configs/ffhq64_edm.py --config.data.source=zip:ffhq-64x64.zip
        --workdir runs/ffhq64_edm

Aim: FID 2.39 at 79 evaluations (Heun, 40 steps) [stated by another paper's README; not yet
reproduced here].
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.source = "zip:ffhq-64x64.zip"
    config.data.batch = 256
    config.data.augment = 0.15
    config.network.channel_mult = (1, 2, 2, 2)
    config.network.dropout = 0.05
    config.optim.learning_rate = 2e-4
    config.sample.steps = 40
    return config
