"""ADM on CelebA at 64x64, unconditional: the baseline of OGDM-ADM (2310.04041, the authors'
guided-diffusion code).

    python train.py --config configs/celeba64_adm.py --config.data.source=folder:DIR
        --workdir runs/celeba64_adm

DIR holds the images; they are cropped to squares and resized to 64x64. Aim: FID 11.92 / 7.88 / 5.10
at DDIM-10 / 20 / 50 [authors' logs; not reproduced here]; the samplers: cifar10_adm.py. AFHQ has
the same settings with another DIR [released settings; no figure was found].
"""

from ogdm_jax.configs import cifar10_adm


def get_config():
    config = cifar10_adm.get_config()
    config.data.source = "folder:data/celeba64"
    config.data.resolution = 64
    config.network.channel_mult = (1, 2, 3, 4)
    config.network.dropout = 0.0
    return config
