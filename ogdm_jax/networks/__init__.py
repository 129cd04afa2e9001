"""Networks as flax.linen modules; each takes and returns NHWC arrays."""

from ogdm_jax.networks.adm import DhariwalUNet
from ogdm_jax.networks.adm_openai import ADMEncoder, ADMUNet
from ogdm_jax.networks.clip_text import CLIPText
from ogdm_jax.networks.discriminator import StyleGAN2Discriminator
from ogdm_jax.networks.dit import DiT
from ogdm_jax.networks.inception import InceptionV3
from ogdm_jax.networks.sd_unet import UNet2DCondition
from ogdm_jax.networks.unet import SongUNet
from ogdm_jax.networks.vae import AutoencoderKL

__all__ = [
    "ADMEncoder",
    "ADMUNet",
    "AutoencoderKL",
    "CLIPText",
    "DhariwalUNet",
    "DiT",
    "InceptionV3",
    "SongUNet",
    "StyleGAN2Discriminator",
    "UNet2DCondition",
]
