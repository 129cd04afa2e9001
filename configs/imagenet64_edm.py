"""EDM on ImageNet at 64x64, class-conditional, the ADM network (2206.00364, config F), for a pod.

    python train.py --config configs/imagenet64_edm.py
        --config.data.source=zip:imagenet-64x64.zip --workdir SHARED_DIR

Aim: FID 1.36 with the stochastic sampler at 511 evaluations [confirmed in the authors' README; not
reproduced here]. bfloat16 replaces the authors' float16 with loss scaling; parameters, statistics
and the loss stay float32.
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.source = "zip:imagenet-64x64.zip"
    config.data.batch = 4096
    config.data.conditional = True
    config.data.augment = 0.0
    config.network.kind = "dhariwal"
    config.network.model_channels = 192
    config.network.channel_mult = (1, 2, 3, 4)
    config.network.num_blocks = 3
    config.network.attn_resolutions = (32, 16, 8)
    config.network.dropout = 0.10
    config.network.dtype = "bfloat16"
    config.optim.learning_rate = 1e-4
    config.ema.halflife = "50 Mimg"
    config.parallel.plan = "sharded"
    config.train.duration = "2500 Mimg"
    config.train.save_every = "10 Mimg"
    return config
