# %% [markdown]
# # 6 · Latents: encode, train a DiT, sample, decode, measure
#
# A latent diffusion model ([2112.10752](https://arxiv.org/abs/2112.10752)) is trained on what an
# autoencoder makes of the images. The whole chain on scikit-learn's digits, in small: 8x8 pixels
# become 4x4 latents of two channels. In a shell each part is one line
# ([latent models](../docs/latents.md)).

# %%
import numpy as np

from ogdm_jax import config, metrics, startup
from ogdm_jax.cli import data as data_commands
from ogdm_jax.data.pictures import show
from ogdm_jax.interop.autoencoder import open_autoencoder
from ogdm_jax.pixels import to_uint8
from ogdm_jax.training import autoencoder, loop
from ogdm_jax.training.workdir import open_source, open_workdir

startup.prepare()

# %% [markdown]
# ## An autoencoder
#
# Stable Diffusion's `AutoencoderKL`, narrow, without a discriminator. `task=autoencoder` is trained
# by the loop that trains everything.

# %%
brief = ["log.tensorboard=false", "sample.every=0 steps", "evaluate.features="]
coder = config.load("digits_vae", ["train.duration=400 steps", "log.every=200 steps", *brief])
_, state = loop.train(coder, "runs/digits_vae", task=autoencoder.TASK)

# %% [markdown]
# Digits, and what is left of them after 32 numbers:

# %%
real = open_source(coder).images
vae = open_autoencoder("runs/digits_vae")
mean, std = vae.encode(real[:12])
again = to_uint8(np.asarray(vae.network.apply(vae.variables, mean, method="decode")))
show(np.concatenate([real[:12], again]), columns=12)

# %% [markdown]
# ## Latents of the whole set
#
# `ogdm data encode digits --vae runs/digits_vae --out runs/digits_latents` in a shell. Mean and
# deviation of each image and of its mirrored one are kept: training draws a fresh sample each time.

# %%
words = "encode digits --vae runs/digits_vae --out runs/digits_latents"
assert data_commands.main(words.split()) == 0

# %% [markdown]
# ## A DiT on them
#
# All five methods take latents as they take pixels; here is plain training.

# %%
dit = config.load("digits_latent", ["train.duration=600 steps", "log.every=200 steps", *brief])
_, state = loop.train(dit, "runs/digits_latent")

# %% [markdown]
# ## Sample, decode, measure
#
# `sample` decodes: these are pixels. The autoencoder sets a floor of its own, so its
# reconstructions are measured beside the samples: no latent model can be expected below them.

# %%
space = metrics.feature_space("digits")
model = open_workdir("runs/digits_latent")
images = to_uint8(model.sample(500, batch=250))
mean, _ = vae.encode(real[:500])
decoded = to_uint8(np.asarray(vae.network.apply(vae.variables, mean, method="decode")))
for name, what in (("samples", images), ("reconstructions", decoded)):
    report = metrics.distance_report(space, what, real[500:])
    print("{}: {features} {fd:.1f}, floor {floor:.1f}".format(name, **report))
show(images[:24], columns=12)

# %% [markdown]
# After so little training the DiT, not the autoencoder, is what limits them;
# [results](../docs/results.md#the-methods-on-latents) has longer runs, three seeds and the methods.
