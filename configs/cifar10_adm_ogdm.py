"""OGDM from scratch on CIFAR-10 with the ADM U-Net (2310.04041, the authors' guided-diffusion
code, switch by switch).

    python train.py --config configs/cifar10_adm_ogdm.py --workdir runs/cifar10_adm_ogdm
        --config.data.data_dir=DIR

Aim: FID 20.56 -> 11.84 at DDIM-10 and 11.73 -> 7.93 at DDIM-20 against configs/cifar10_adm.py, at
210,000 steps [authors' logs; not reproduced here]. The authors' fine-tuning, 20.56 -> 10.70 at
DDIM-10: --config.init.workdir=runs/cifar10_adm --config.ogdm.gamma=0.025 --config.ogdm.k=0.2
--config.ogdm.decay=15000 '--config.train.duration=15000 steps'. The samplers: cifar10_adm.py.
"""

from ogdm_jax.configs import cifar10_adm
from ogdm_jax.methods import ogdm


def get_config():
    config = cifar10_adm.get_config()
    config.methods = ("ogdm",)
    # gamma 0.01, k 0.1, pairs of indices, one shared network call, R1 0.25
    config.ogdm.update(ogdm.preset("adm"))
    config.ogdm.decay = 300_000
    return config
