"""Solvers against their authors' code: score_sde's predictor-corrector, UniPC."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.sampling.sampler import nfe, sample
from tests.support.golden_support import Golden, family
from tests.support.oracles import two_bumps

BUMPS = two_bumps()


@family("sampler_pc")
def predictor_corrector(golden: Golden):
    for sde, count in itertools.product(("ve", "vp"), (1, 2)):
        at = f"{sde}_{count}"
        with jax.enable_x64(True):
            sigmas, noise = golden[f"{sde}_sigmas"], jnp.asarray(golden[f"{at}_noise"])
            z = jnp.asarray(golden[f"{at}_start"]) / sigmas[0]
            how = {"snr": 0.16, "corrector_steps": count, "sde": sde}
            x = sample(BUMPS.denoise, z, sigmas, "pc", noise_fn=noise.__getitem__, **how)
            np.testing.assert_allclose(x, golden[f"{at}_x"], atol=1e-9, err_msg=at)
        assert nfe("pc", len(sigmas) - 1, corrector_steps=count) == golden[f"{at}_nfe"]


@family("sampler_unipc")
def unipc(golden: Golden):
    with jax.enable_x64(True):
        for spacing, n in itertools.product(("time_uniform", "logSNR"), (3, 6, 10)):
            z, sigmas = jnp.asarray(golden["latents"]), golden[f"{spacing}_{n}_sigmas"]
            for order, bh in itertools.product((1, 2, 3), ("bh1", "bh2")):
                x = sample(BUMPS.denoise, z, sigmas, "unipc", order=order, bh=bh)
                at = f"{spacing}_{n}_{order}_{bh}"
                np.testing.assert_allclose(x, golden[at], atol=1e-8, err_msg=at)
