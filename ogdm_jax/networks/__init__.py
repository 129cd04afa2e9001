"""Networks as flax.linen modules; each takes and returns NHWC arrays."""

from ogdm_jax.networks.adm import DhariwalUNet
from ogdm_jax.networks.adm_openai import ADMEncoder, ADMUNet
from ogdm_jax.networks.discriminator import StyleGAN2Discriminator
from ogdm_jax.networks.inception import InceptionV3
from ogdm_jax.networks.unet import SongUNet

__all__ = [
    "ADMEncoder",
    "ADMUNet",
    "DhariwalUNet",
    "InceptionV3",
    "SongUNet",
    "StyleGAN2Discriminator",
]
