"""ADM on CIFAR-10, unconditional: the baseline of OGDM-ADM (2310.04041, the authors'
guided-diffusion code).

    python train.py --config configs/cifar10_adm.py --workdir runs/cifar10_adm
        --config.data.data_dir=DIR

The published samplers, 50,000 images each: `ogdm sample --workdir runs/cifar10_adm --num 50000
--out FILE.npz` and one of
    --solver ddim --grid ddim --steps 10 --clip        also 20 and 50; --eta 1: the random one
    --solver ddim --grid quad --steps 10 --clip        also 20 and 50
    --solver spndm --grid pndm --steps 9 --no-clip     10 evaluations; also 19 and 49
    --solver fpndm --grid pndm --steps 11 --no-clip    20 evaluations; also 41
    --solver ancestral --variance large --grid respaced --steps 1000 --clip

Aim: FID 20.56 / 11.73 / 7.70 at DDIM-10 / 20 / 50 after 280,000 steps [authors' logs; not
reproduced here]. Batch and decay are those of the released settings; the logged runs had a constant
rate [authors' history].
"""

from ogdm_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.batch = 128  # 4 GPUs with 32 images each
    config.data.augment = 0.0
    config.data.xflip = True
    config.network.kind = "openai"
    config.network.channel_mult = (1, 2, 2, 2)
    config.network.num_blocks = 3
    config.network.attn_resolutions = (16, 8)
    config.network.dropout = 0.1
    config.precondition.kind = "adm"
    config.noise.distribution = "ddpm"
    config.optim.learning_rate = 1e-4
    config.optim.ramp = "0 steps"
    config.optim.decay = "train.duration"
    config.ema.halflife = "6931 steps"  # 0.5^(1 / 6931) = 0.9999
    config.ema.rampup = 0.0
    config.train.duration = "300000 steps"
    config.train.save_every = "10000 steps"
    config.sample.solver = "ddim"
    config.sample.steps = 20
    config.sample.grid = "ddim"
    config.sample.clip = True
    return config
