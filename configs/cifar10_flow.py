"""Flow matching on CIFAR-10, unconditional: EDM's network, augmentation and optimiser (2206.00364,
config F) with the straight path and logit-normal times (2209.03003, 2403.03206).

    python train.py --config configs/cifar10_flow.py --workdir runs/cifar10_flow
        --config.data.data_dir=DIR

Aim: beside cifar10_edm at equal length; the recipe is ours, no figure of it is published.
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.precondition.kind = "flow"
    config.noise.distribution = "logit_normal"
    config.noise.mean = 0.0
    config.noise.std = 1.0
    config.sample.solver = "euler"
    config.sample.grid = "flow"
    config.sample.steps = 35  # as many evaluations as EDM's 18 Heun steps
    return config
