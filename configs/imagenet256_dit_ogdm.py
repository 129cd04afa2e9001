"""OGDM (2310.04041) on DiT-XL/2's latents: nothing of it is published for latents.

    python train.py --config configs/imagenet256_dit_ogdm.py --config.data.source=latents:DIR
        --workdir SHARED_DIR

The recipe is DiT's (configs/imagenet256_dit.py), OGDM's switches those of the authors' code for
discrete processes [authors' code, pixels], with DiT's own betas; that they carry over to latents
and to transformers is our guess. The discriminator sees the latents, 4 channels at 32x32; its rate
falls to 0 over the run, as the authors' does. Few steps are what OGDM is for: compare with
--solver ddim --grid ddim --steps 10, 20 and 50 of both.
"""

from ogdm_jax.configs import imagenet256_dit
from ogdm_jax.methods import ogdm


def get_config():
    config = imagenet256_dit.get_config()
    config.methods = ("ogdm",)
    # gamma 0.01, k 0.1, pairs of indices, one shared network call, R1 0.25
    config.ogdm.update(ogdm.preset("adm"))
    config.ogdm.decay = 400_000
    return config
