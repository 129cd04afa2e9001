"""The default: OGDM on scikit-learn's 1,797 real digits, 8x8 grey. Minutes on two CPU cores,
nothing to download.

python train.py
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.methods = ("ogdm",)
    config.data.source = "digits"
    config.data.batch = 64
    config.data.augment = 0.0  # a mirrored or turned digit is another sign
    config.network.model_channels = 16
    config.network.channel_mult = (2, 2)
    config.network.num_blocks = 2
    config.network.attn_resolutions = (4,)
    config.network.dropout = 0.0
    config.noise.clip = True
    config.precondition.sigma_data = 0.75  # measured: ogdm data describe digits
    config.optim.ramp = "6400 images"
    config.optim.decay = "train.duration"
    config.ema.halflife = "5 kimg"
    # OGDM's published settings are for 3,072 numbers an image: R1 and the hinge loss both grow with
    # them. These were chosen by distance on one seed (docs/studies measures them on five).
    config.ogdm.r1 = 0.02
    config.ogdm.gamma = 0.4
    config.ogdm.k = 0.3
    config.ogdm.condition = "log_sigma"
    config.ogdm.input_scale = "unit"
    config.ogdm.channel_base = 256
    config.ogdm.channel_max = 16
    config.sample.solver = "euler"  # the step that OGDM trains
    config.sample.steps = 10
    config.train.duration = "800 steps"
    config.train.save_every = "500 steps"
    config.log.every = "100 steps"
    config.sample.every = "200 steps"
    config.evaluate.features = "digits"
    return config
