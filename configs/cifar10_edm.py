"""EDM on CIFAR-10, unconditional, DDPM++ (2206.00364, config F).

    python train.py --config configs/cifar10_edm.py --workdir runs/cifar10_edm
        --config.data.data_dir=DIR

Aim: FID 1.97 at 35 network evaluations (Heun, 18 steps), minimum of three runs of 50,000 samples
[confirmed in the authors' README; not yet reproduced here].
"""

from ogdm_jax.configs import base


def get_config():
    return base.get_config()
