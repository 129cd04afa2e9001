"""STF with score SDE's continuous VP process and DDPM++ on CIFAR-10 (2302.00670; 2011.13456).

    python train.py --config configs/cifar10_stf_vp.py --workdir runs/cifar10_stf_vp
        --config.data.data_dir=DIR

Network and training are score SDE's: Adam at 2e-4 with 5,000 steps of warm-up, gradients clipped to
norm 1, batches of 128, mirrored images, EMA of 0.9999 a step, 1.3 million steps. 4,096 references,
as commonly quoted of the paper; its VP and VE code was not published. Without STF:
--config.methods=.
"""

from ogdm_jax.configs import cifar10_stf


def get_config():
    config = cifar10_stf.get_config()
    config.stf.n = 4096
    config.data.batch = 128
    config.data.augment = 0.0
    config.data.xflip = True
    config.network.channel_mult = (1, 2, 2, 2)
    config.network.dropout = 0.1
    config.precondition.kind = "vp"
    config.noise.distribution = "vp"
    config.optim.learning_rate = 2e-4
    config.optim.ramp = "5000 steps"
    config.optim.clip = 1.0
    config.ema.halflife = "6931 steps"  # 0.5^(1 / 6931) = 0.9999
    config.ema.rampup = 0.077  # ln 2 / 9: their decay is at most (1 + n) / (10 + n) at step n
    config.train.duration = "1300000 steps"
    return config
