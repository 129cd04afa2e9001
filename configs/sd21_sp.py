"""Self-perceptual fine-tuning of Stable Diffusion 2.1 on captions, as published (2401.00110), for a
pod.

    ogdm data encode 'folder:DIR?caption=txt' --vae SD --resolution 512 --out LATENTS
    python train.py --config configs/sd21_sp.py --config.data.source=latents:LATENTS
        --config.init.workdir=SD --workdir SHARED_DIR

SD is a folder of diffusers whose U-Net predicts v with zero terminal SNR: the model is trained from
it and judged by it. That of the paper is stabilityai's 2.1-base, trained so by the squared error
first; phase 1 here, from 2.1-base itself (which predicts eps): --config.methods=
--config.init.partial=true, and its folder is phase 2's init.workdir. Published [a third party's
note of the paper, the authors' model cards]: LAION of aesthetic score 6 and more, 512 pixels; v,
zero terminal SNR; features of the middle block alone, their mean square, uniform t and t'; batch
896, rate 3e-5, average 0.9995, 50,000 steps; sampling without guidance. Remembered, not verified:
10 % of the captions dropped. Aim, 10,000 prompts of COCO: FID 24.42 from 29.63, Inception score
28.07 from 22.86 [the note]. Not reproduced here. Our choice: Adam's other settings, no warm-up,
bfloat16, the sharded plan, no mirrored images, 50 DDIM steps.
"""

from ogdm_jax.configs import base
from ogdm_jax.methods import sp


def get_config():
    config = base.get_config()
    config.methods = ("sp",)
    config.init.workdir = "data/sd21_base_zsnr"
    config.data.source = "latents:data/laion_aesthetics6_latents"
    config.data.batch = 896
    config.data.label_dropout = 0.1
    config.data.augment = 0.0
    config.network.kind = "sd"
    config.network.model_channels = 320
    config.network.channel_mult = (1.0, 2.0, 4.0, 4.0)
    config.network.num_blocks = 2
    config.network.head_channels = 64
    config.network.context = 1024
    config.network.text_layers = 23  # of 24: the last one is not used
    config.network.text_heads = 16
    config.network.text_hidden = 4096
    config.network.text_quick = False
    config.network.dtype = "bfloat16"
    config.network.remat = True
    config.precondition.kind = "v"
    config.precondition.schedule = "scaled_linear"
    config.precondition.zero_terminal = True
    config.precondition.interpolate = True  # as such folders are sampled; training meets the steps
    config.precondition.sigma_data = 1.0  # of scaled latents, about
    config.noise.distribution = "v"
    config.sp.update(sp.preset("paper"))
    config.sp.sigma_next = "same"  # t' is uniform over the steps, as t is
    config.optim.learning_rate = 3e-5
    config.optim.ramp = "0 steps"
    config.ema.halflife = "1386 steps"  # 0.5^(1 / 1386) = 0.9995
    config.parallel.plan = "sharded"
    config.train.duration = "50000 steps"
    config.train.save_every = "1000 steps"
    config.sample.every = "1000 steps"
    config.sample.num = 16
    config.sample.solver = "ddim"
    config.sample.steps = 50
    config.sample.grid = "trailing"
    config.sample.start = "vp"
    config.sample.sigma_min = 0.02  # below the first step's level
    config.sample.sigma_max = 2.0**24  # that of pure noise: t' is not clipped
    return config
