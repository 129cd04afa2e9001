"""Self-perceptual fine-tuning of a trained EDM on CIFAR-10 (2401.00110, the pixel-space recipe).

    python train.py --config configs/cifar10_sp.py --config.init.workdir=runs/cifar10_edm
        --workdir runs/cifar10_sp

The teacher is the starting point's moving average. No published figure exists for this data set.
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.methods = ("sp",)
    config.init.workdir = "runs/cifar10_edm"
    config.optim.learning_rate = 1e-4
    config.optim.ramp = "0 steps"
    config.ema.rampup = 0.0
    config.train.duration = "20 Mimg"
    return config
