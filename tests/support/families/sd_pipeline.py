"""Whole Stable Diffusion pipelines, from prompts to pictures, against diffusers'."""

import functools
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ogdm_jax.methods import cfg
from ogdm_jax.models import VAE
from ogdm_jax.sampling.decode import decode
from ogdm_jax.sampling.generate import noise_levels
from ogdm_jax.sampling.sampler import sample
from ogdm_jax.training import foreign
from tests.support import sd_folder
from tests.support.golden_support import Golden, family, nchw, nhwc


@family("sd_pipeline_")
def check_pipeline(golden: Golden):
    with tempfile.TemporaryDirectory() as folder:
        trained = foreign.open_model(sd_folder.write(golden, Path(folder)), size=0)
    model, start = trained.model, jnp.asarray(nhwc(golden["latents"]))
    prompts = golden.json("prompts") if "prompts" in golden else golden.config["prompts"]
    encode = functools.partial(model.condition, trained.buffers)
    ids = trained.texts(prompts, "", len(start))
    np.testing.assert_array_equal(ids["prompt"], golden["input_ids"])
    golden.assert_close("prompt_embeds", encode(ids)["prompt"])
    for key, given in golden.json("settings").items():
        negative = given.get("negative_prompt", "")
        none = trained.texts([negative] if isinstance(negative, str) else negative, "", len(start))
        label = encode({"prompt": ids["prompt"], "none": none["prompt"]})
        settings = trained.settings(steps=given["num_inference_steps"])
        levels = noise_levels(model, settings)
        weight, phi = given["guidance_scale"], given.get("guidance_rescale", 0.0)
        x = sample(
            trained.denoiser,
            start * float(np.sqrt(1 + levels[0] ** -2)),
            levels,
            settings.solver,
            label=label,
            guidance=[cfg.guidance(weight, rescale=phi)] if weight > 1 else [],
        )
        latents = x / np.sqrt(1 + levels[-1] ** 2)
        # diffusers' tables are float32: see the README of the golden files
        golden.assert_close(
            f"latents_{key}", nchw(latents), atol=2e-5 * float(np.abs(latents).max())
        )
        if f"decoded_{key}" in golden:
            decoded = decode(model.autoencoder, trained.buffers[VAE], latents)
            golden.assert_close(f"decoded_{key}", nchw(decoded), atol=2e-4)
