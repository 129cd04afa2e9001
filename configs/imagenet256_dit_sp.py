"""Self-perceptual fine-tuning (2401.00110) of a trained DiT-XL/2 on its latents.

    python train.py --config configs/imagenet256_dit_sp.py --config.data.source=latents:DIR
        --config.init.workdir=DIT --workdir SHARED_DIR

DIT is a run of configs/imagenet256_dit.py. Published, for Stable Diffusion 2.1 and not for DiT [a
third party's note of the paper]: features alone, uniform t, rate 3e-5, average 0.9995, 50,000
steps, sampling without guidance. Our choice: batch 256 (there 896); the features are the tokens
behind block 14, the middle, over their mean square, as a transformer's are large; t' as wide as
Stable Diffusion's. The variance's term stays.
"""

from ogdm_jax.configs import imagenet256_dit
from ogdm_jax.methods import sp


def get_config():
    config = imagenet256_dit.get_config()
    config.methods = ("sp",)
    config.init.workdir = "runs/imagenet256_dit"
    config.sp.update(sp.preset("paper"))
    config.sp.feature_norm = "relative"
    config.optim.learning_rate = 3e-5
    config.ema.halflife = "1386 steps"  # 0.5^(1 / 1386) = 0.9995
    config.train.duration = "50000 steps"
    return config
