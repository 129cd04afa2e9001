"""DiT-XL/2 on latents of ImageNet at 256x256, class-conditional (2212.09748), for a pod.

    python train.py --config configs/imagenet256_dit.py --config.data.source=latents:DIR
        --workdir SHARED_DIR

DIR holds the 32x32x4 latents of Stable Diffusion's autoencoder, of every image and its mirror.
Published and kept [authors' code]: AdamW of 1e-4 without decay, warm-up or clipping, batch 256,
average 0.9999 from the first step on, float32; t uniform; the squared error of eps and the term of
the bound that trains the variance, weight 1; 10 % of the labels hidden. 400,000 steps are those of
the paper's comparisons [remembered, not verified]; the published weights have 7 M: --config.train.
duration='7000000 steps'. Aim, with 250 ancestral steps and the autoencoder's decoder: FID 19.5 at
400,000 steps without guidance [README: JAX; 18.1 in PyTorch]; 2.27 at 7 M with --guidance cfg,
weight 1.5 on channels 0 to 2 [README]. Not reproduced here. Sizes S, B, L: network.model_channels,
num_blocks, num_heads of 384, 12, 6; 768, 12, 12; 1024, 24, 16. Our choice: the sharded plan.
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.source = "latents:data/imagenet256_latents"
    config.data.batch = 256
    config.data.conditional = True
    config.data.label_dropout = 0.1
    config.data.augment = 0.0
    config.data.xflip = True  # the latent of the mirrored image
    config.network.kind = "dit"
    config.network.model_channels = 1152
    config.network.num_blocks = 28
    config.network.num_heads = 16
    config.precondition.kind = "adm"
    config.precondition.sigma_data = 1.0  # of scaled latents, about
    config.precondition.learned_variance = True
    config.noise.distribution = "ddpm"
    config.optim.learning_rate = 1e-4
    config.optim.ramp = "0 steps"
    config.ema.halflife = "6931 steps"  # 0.5^(1 / 6931) = 0.9999
    config.ema.rampup = 0.0
    config.parallel.plan = "sharded"
    config.train.duration = "400000 steps"
    config.train.save_every = "10000 steps"
    config.sample.every = "10000 steps"
    config.sample.solver = "ancestral"
    config.sample.steps = 250
    config.sample.grid = "respaced"
    return config
