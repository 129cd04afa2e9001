"""OGDM from scratch on CelebA at 64x64 with the ADM U-Net: the authors' guided-diffusion code,
switch by switch.

    python train.py --config configs/celeba64_ogdm.py --config.data.source=folder:DIR --workdir
        runs/celeba64_ogdm

DIR holds the images; they are cropped to squares and resized to 64x64. Aim: FID 11.92 -> 7.91 at
DDIM-10 and 7.88 -> 3.94 at DDIM-20 against configs/celeba64_adm.py [authors' logs; not reproduced
here]. The authors' fine-tuning, 11.92 -> 7.04 at DDIM-10: --config.init.workdir=runs/celeba64_adm
--config.ogdm.gamma=0.025 --config.ogdm.k=0.2 --config.ogdm.decay=15000
'--config.train.duration=15000 steps'. The samplers: cifar10_adm.py.
"""

from ogdm_jax.configs import celeba64_adm
from ogdm_jax.methods import ogdm


def get_config():
    config = celeba64_adm.get_config()
    config.methods = ("ogdm",)
    # gamma 0.01, k 0.1, pairs of indices, one shared network call, R1 0.25
    config.ogdm.update(ogdm.preset("adm"))
    config.ogdm.decay = 300_000
    return config
