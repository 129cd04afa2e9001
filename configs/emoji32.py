"""OGDM on colour pictures of emoji, 32x32, with a network for CPU cores.

    ogdm study --config baseline=emoji32 --config ogdm=emoji32 --config stf=emoji32
        --baseline.methods= --stf.methods=stf --stf.stf.source=full --seeds 0-2 --steps 5,10,18
        --features lite0 --reference 'npz:emoji32.npz?skin_tone=0&order>=1440' --num 700
        --out runs/emoji32

The file is for you to make. `npm pack` gets emoji-datasource-twitter 16.0.0 (pictures of Twitter,
CC-BY 4.0), emoji-datasource-google 16.0.0 (Google's Noto, Apache-2.0) and @lobehub/fluent-emoji-3d
1.1.0 (Microsoft's Fluent, MIT). Each picture goes onto white, to 64x64 and by the mean of 2x2
pixels to 32x32, into `image`, uint8 [n,32,32,3]. Two more arrays [n] go beside it: `skin_tone`, 1
for the toned variants of a picture, and `order`, a random number of the emoji, the same for all
pictures of it: `np.random.default_rng(0).permutation(1921)[emoji]`. So a quarter of the emoji is
held out whole.
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.methods = ("ogdm",)
    config.data.source = "npz:emoji32.npz?skin_tone=0&order<1440"
    config.data.batch = 32
    config.data.augment = 0.0
    config.network.model_channels = 16
    config.network.channel_mult = (1, 2, 2)
    config.network.num_blocks = 1
    config.network.attn_resolutions = (8,)
    config.network.dropout = 0.0
    config.noise.clip = True
    config.precondition.sigma_data = 0.6  # measured: ogdm data describe
    config.optim.learning_rate = 2e-3
    config.optim.ramp = "3200 images"
    config.optim.decay = "train.duration"
    config.ema.halflife = "5 kimg"
    # By size, between the digits' and the published ones, and not yet chosen by any distance.
    config.ogdm.gamma = 0.1
    config.ogdm.k = 0.3
    config.ogdm.condition = "log_sigma"
    config.ogdm.input_scale = "unit"
    config.ogdm.normalise_condition = True  # a narrow discriminator: see docs/results.md
    config.ogdm.channel_base = 512
    config.ogdm.channel_max = 32
    config.sample.solver = "euler"  # the step that OGDM trains
    config.sample.steps = 10
    config.train.duration = "2000 steps"
    config.train.save_every = "500 steps"
    config.log.every = "100 steps"
    config.sample.every = "500 steps"
    config.evaluate.features = "lite0"
    return config
