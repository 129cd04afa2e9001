"""PyTorch names <-> our variables, one pair of functions per kind of network; each kind's map is a
file of its own.
"""

from ogdm_jax.interop.names_adm import (
    adm_encoder_to_flax,
    adm_to_flax,
    flax_to_adm,
    flax_to_adm_encoder,
)
from ogdm_jax.interop.names_discriminator import discriminator_to_flax, flax_to_discriminator
from ogdm_jax.interop.names_edm import edm_network, edm_to_flax, flax_to_edm
from ogdm_jax.interop.names_inception import flax_to_inception, inception_to_flax

__all__ = [
    "adm_encoder_to_flax",
    "adm_to_flax",
    "discriminator_to_flax",
    "edm_network",
    "edm_to_flax",
    "flax_to_adm",
    "flax_to_adm_encoder",
    "flax_to_discriminator",
    "flax_to_edm",
    "flax_to_inception",
    "inception_to_flax",
]
