"""A DiT on latents of the shipped digits: a latent pipeline from end to end, minutes on two cores.

python train.py --config configs/digits_vae.py --workdir runs/digits_vae
ogdm data encode digits --vae runs/digits_vae --out runs/digits_latents
python train.py --config configs/digits_latent.py --workdir runs/digits_latent

docs/latents.md has the whole chain.
"""

from ogdm_jax.configs import base, digits


def get_config():
    config = digits.get_config()
    config.methods = ()
    config.data.source = "latents:runs/digits_latents"
    config.network = base.get_config().network  # not those of a U-Net
    config.network.kind = "dit"
    config.network.model_channels = 32
    config.network.num_blocks = 2
    config.network.num_heads = 2
    config.network.patch = 1
    config.noise.clip = False
    config.precondition.sigma_data = 1.0  # the autoencoder's scale makes it so
    config.sample.solver = "heun"
    config.sample.steps = 18
    config.train.duration = "1000 steps"
    return config
