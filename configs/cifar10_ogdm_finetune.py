"""OGDM fine-tuning of a trained EDM on CIFAR-10 (2310.04041, authors' EDM recipe): 20 Mimg from the
moving average.

    python train.py --config configs/cifar10_ogdm_finetune.py
        --config.init.workdir=runs/cifar10_edm --workdir runs/ft

Aim: better FID than its starting point at 10 to 25 evaluations [authors' logs show it for the ADM
variant: 20.56 to 10.70 at DDIM-10; no figure of the EDM variant was found].
"""

from ogdm_jax.configs import cifar10_ogdm


def get_config():
    config = cifar10_ogdm.get_config()
    config.init.workdir = "runs/cifar10_edm"
    config.init.weights = "ema"
    config.ema.rampup = 0.0
    config.train.duration = "20 Mimg"
    return config
