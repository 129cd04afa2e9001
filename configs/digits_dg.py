"""DG's discriminator on the shipped digits: a tiny encoder from scratch, for the model that
train.py leaves behind.

python train.py && python train.py --config configs/digits_dg.py --workdir runs/digits_dg
--config.dg.prior=runs/digits
"""

from ogdm_jax.configs import cifar10_dg


def get_config():
    config = cifar10_dg.get_config()
    config.dg.num = 0  # as many samples as images
    config.dg.weight = 1.0
    config.dg.weights = (2.0, 3.0)
    config.network.model_channels = 32
    config.network.channel_mult = (1, 2)
    config.network.num_blocks = 1
    config.network.attn_resolutions = (4,)
    config.network.head_channels = 32
    config.network.dropout = 0.1  # 1,600 images are soon known by heart
    config.optim.learning_rate = 1e-3
    config.optim.decay = "train.duration"
    config.ema.halflife = "10 kimg"
    config.train.duration = "1000 steps"
    config.train.save_every = "0 steps"
    config.log.every = "100 steps"
    config.sample.every = "100 steps"
    config.sample.solver = (
        "euler"  # as configs/digits.py: samples must come from the sampler that will be guided
    )
    config.sample.steps = 10
    config.evaluate.features = "digits"
    config.evaluate.num = 0
    config.evaluate.every = "200 steps"
    return config
