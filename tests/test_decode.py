"""Latents become pictures: in small batches as at once, and inside a compiled sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import models
from ogdm_jax.networks import AutoencoderKL
from ogdm_jax.sampling.decode import decode
from ogdm_jax.training.workdir import TrainedModel
from tests.support import networks, tiny

NETWORK = AutoencoderKL(widths=(4, 4), num_blocks=1, groups=2, latent_channels=1, shift=0.3)


def test_rounds_are_the_whole():
    """Seven latents in rounds of three, with a scale and a shift, as one batch of unscaled ones."""
    latents = jax.random.normal(jax.random.key(0), (7, 4, 4, 1))
    variables = networks.drawn(NETWORK, jnp.zeros((1, 8, 8, 3)))
    whole = networks.run(NETWORK, variables, latents / NETWORK.scale + 0.3, method="decode")
    for batch in (3, None):
        found = jax.jit(decode, static_argnums=(0, 3))(NETWORK, variables, latents, batch)
        np.testing.assert_allclose(found, whole, atol=2e-5 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize(
    "words",
    [
        (),
        (
            *("precondition.kind=adm", "precondition.diffusion_steps=50", "data.augment=0"),
            *("noise.distribution=ddpm", "sample.grid=pndm", "sample.solver=spndm"),
            *("sample.steps=2", "methods="),
        ),
    ],
)
def test_a_sampler_decodes(words):
    """What is drawn with an autoencoder is the decoded latent of the same seed, also by the
    released PNDM, which is a sampler of its own.
    """
    config = tiny.config(*tiny.SMALLEST, *words)
    model = models.build(config, (8, 8, 1), 0)
    params, buffers = networks.born(jax.eval_shape(model.init, jax.random.key(0)))
    plain = TrainedModel(config, model, params, buffers, 0)
    variables = networks.drawn(NETWORK, jnp.zeros((1, 8, 8, 3)))
    both = dataclasses.replace(
        plain,
        model=dataclasses.replace(model, autoencoder=NETWORK),
        buffers={**buffers, models.VAE: variables},
        samplers={},
    )
    alone = jax.devices()[:1]
    latents, pictures = plain.sample(2, devices=alone), both.sample(2, devices=alone)
    assert pictures.shape == (2, 16, 16, 3) == (2, *both.model.picture_shape)
    expected = jax.jit(decode, static_argnums=0)(NETWORK, variables, jnp.asarray(latents))
    np.testing.assert_allclose(pictures, expected, atol=2e-5 * float(jnp.abs(expected).max()))
