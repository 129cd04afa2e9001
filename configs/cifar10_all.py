"""OGDM, the stable target field and the self-perceptual loss together, fine-tuning a trained EDM on
CIFAR-10.

    python train.py --config configs/cifar10_all.py --config.init.workdir=runs/cifar10_edm
        --workdir runs/cifar10_all

No published figure: the five papers were never combined before.
"""

from ogdm_jax.configs import cifar10_sp


def get_config():
    config = cifar10_sp.get_config()
    config.methods = ("ogdm", "stf", "sp")
    config.noise.clip = True
    return config
