"""OGDM from scratch on CelebA at 64x64 with DDPM++.

    python train.py --config configs/celeba64_ogdm.py --config.data.source=folder:DIR --workdir runs/celeba64_ogdm

DIR holds 64x64 images. Aim: the direction of the authors' ADM logs, FID 11.92 -> 7.91 at DDIM-10 and 7.88 -> 3.94 at
DDIM-20 [authors' logs, another network; no figure for this one was found].
"""

from configs import ffhq64_edm


def get_config():
    config = ffhq64_edm.get_config()
    config.methods = ("ogdm",)
    config.data.source = "folder:data/celeba64"
    config.noise.clip = True
    config.ogdm.gamma = 0.025
    config.ogdm.k = 0.2
    config.optim.ramp = "0 steps"
    return config
