"""ADM on one class of LSUN at 256x256, unconditional, with a learned variance (2105.05233), for a
pod.

    python train.py --config configs/lsun256_adm.py --config.data.source=folder:DIR
        --workdir SHARED_DIR

Aim: FID 1.90 bedroom, 2.57 horse, 5.57 cat with 1,000 ancestral steps [authors' README; not
reproduced here]. The network is that of lsun_{bedroom,cat,horse}.pt (552.8 M; `ogdm convert` reads
them; lsun_horse_nodropout.pt: --config.network.dropout=0). Batch and length are remembered from the
paper's appendix [not verified]: 500,000 steps for bedroom, 250,000 horse, 200,000 cat. bfloat16
replaces float16. OGDM on LSUN church diverged for its authors [their logs].
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.source = "folder:data/lsun_bedroom"
    config.data.resolution = 256
    config.data.batch = 256
    config.data.augment = 0.0
    config.data.xflip = True
    config.network.kind = "openai"
    config.network.model_channels = 256
    config.network.channel_mult = (1, 1, 2, 2, 4, 4)
    config.network.num_blocks = 2
    config.network.attn_resolutions = (32, 16, 8)
    config.network.dropout = 0.1
    config.network.head_channels = 64
    config.network.resblock_updown = True
    config.network.dtype = "bfloat16"
    config.precondition.kind = "adm"
    config.precondition.learned_variance = True
    config.noise.distribution = "ddpm"
    config.optim.learning_rate = 1e-4
    config.optim.ramp = "0 steps"
    config.ema.halflife = "6931 steps"  # 0.5^(1 / 6931) = 0.9999
    config.ema.rampup = 0.0
    config.parallel.plan = "sharded"
    config.train.duration = "500000 steps"
    config.train.save_every = "10000 steps"
    config.sample.solver = "ancestral"
    config.sample.steps = 1000
    config.sample.grid = "respaced"
    config.sample.clip = True
    return config
