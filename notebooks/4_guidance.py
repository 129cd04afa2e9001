# %% [markdown]
# # 4 · Guidance: inpainting with DPS and DSG, side by side
#
# A part of a picture is hidden; a diffusion model fills it in. Nothing is trained for that: while
# the sampler walks from noise to an image, *guidance* pulls it towards images that agree with the
# pixels that are seen. Here are two rules for that pull, beside the exact answer.
#
# The model is again a formula (notebook 1): a mixture of narrow Gaussians around real digits. Its
# posterior given the seen pixels is known, so one sees how near each method comes.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax import data, startup
from ogdm_jax.data import pictures
from ogdm_jax.data.pictures import show
from ogdm_jax.diffusion import grids
from ogdm_jax.inverse import given
from ogdm_jax.inverse.operators import inpaint, measurement_loss
from ogdm_jax.methods import dps, dsg
from ogdm_jax.sampling import sample

startup.prepare()

# %% [markdown]
# ## The model
#
# 1,500 digits are the means of the mixture; the others were left out, and one of those is restored.
# The formula is that of notebook 1 for means of 8x8 pixels. (A trained model's `denoiser` takes its
# place without another change: `open_workdir("runs/digits").denoiser`.)

# %%
STD = 0.15
source = data.open_source("digits")
means = jnp.asarray(source.images[:1500] / 127.5 - 1, jnp.float32)


def denoise(x, sigma, label=None):
    s2 = sigma[:, None] ** 2
    squared = jnp.sum((x[:, None] - means) ** 2, (2, 3, 4))
    likely = jax.nn.softmax(-squared / (2 * (STD**2 + s2)))
    mean, s2 = jnp.einsum("bk,khwc->bhwc", likely, means), s2[..., None, None]
    return (STD**2 * x + s2 * mean) / (STD**2 + s2)


# %% [markdown]
# ## A picture and a mask
#
# People bring files: a picture, and a mask that is white where pixels are seen. They are written
# here first. `pictures.read` and `given.mask` are the readers of the commands (16-bit, grey or
# colour, turned by EXIF, masks of 0 and 1 or of 0 and 255).

# %%
pictures.save_png("picture.png", source.images[1503])
hole = np.full((8, 8, 1), 255, np.uint8)
hole[3:] = 0
pictures.save_png("mask.png", hole)

x0 = pictures.read("picture.png")[None] / np.float32(127.5) - 1
mask = given.mask("mask.png", side=8)
operator = inpaint(mask)
y = operator.forward(x0)
show(np.concatenate([x0, y, 2 * mask[None] - 1]), 3, ["picture", "measured", "mask"])

# %% [markdown]
# ## Two rules
#
# `measurement_loss(operator, y)` is the squared distance between the seen pixels and those of an
# `x0_hat`. Both methods take a random step of the sampler and use the loss's gradient:
#
# - **DPS** ([2209.14687](https://arxiv.org/abs/2209.14687)) takes the step, then moves by `scale`
#   times the gradient. The right scale depends on the loss, the model and the number of steps.
# - **DSG** ([2402.03201](https://arxiv.org/abs/2402.03201)) replaces the step's *noise*: the step
#   keeps its length, and `rate` (0 to 1) says how much of its direction is the gradient's. So the
#   state stays at the noise level that the denoiser expects, however strong the guidance is.
#
# Eight seeds each, 50 random steps (`ancestral`).

# %%
loss = measurement_loss(operator, jnp.repeat(y, 8, 0))
latents = jax.random.normal(jax.random.key(0), (8, *x0.shape[1:]))
sigmas = grids.edm(50, sigma_max=20.0)


def restore(guidance):
    return sample(denoise, latents, sigmas, "ancestral", jax.random.key(1), guidance=guidance)


by_dps = jax.jit(lambda scale: restore(dps.guidance(loss, scale)))
by_dsg = jax.jit(lambda rate: restore(dsg.guidance(loss, rate)))

# %% [markdown]
# ## The exact answer
#
# Given the seen pixels, each Gaussian of the mixture is likely by how well its mean agrees with
# them. Draw one of them by these weights, and the hidden pixels from it: samples of the posterior,
# which no sampler has touched.

# %%
squared = jnp.sum(jnp.square(operator.forward(means) - y), (1, 2, 3))
chosen = jax.random.categorical(jax.random.key(2), -squared / (2 * STD**2), shape=(8,))
drawn = means[chosen] + STD * jax.random.normal(jax.random.key(3), latents.shape)
exact = jnp.where(mask[None] > 0, y, drawn)

# %% [markdown]
# ## Side by side
#
# The upper three rows of pixels are given and the rest is free: several digits agree with them, so
# the images of a row may differ. DPS and DSG keep what was given; without guidance anything comes.

# %%
rows = [restore(()), by_dps(0.3), by_dsg(0.4), exact]
names = ("no guidance", "DPS", "DSG", "exact")
captions = [word for name in names for word in [name, *[""] * 7]]
show(np.clip(np.concatenate(rows), -1, 1), 8, captions)

# %% [markdown]
# ## What their numbers do
#
# Two figures say how good a row is. *Seen* is the error at the given pixels (0 is right). *Strange*
# is the squared distance to the nearest digit of the model: less than that of exact samples is
# smoother than the data, much more is no digit. DPS needs its scale: too small ignores the picture,
# too large leaves the data and then breaks down. DSG's rate may be anything from 0.2 up; large
# rates agree best and vary least.


# %%
def figures(images):
    seen = np.sqrt(np.mean(np.square(images - y) * mask) / mask.mean())
    to_digits = np.square(np.asarray(images)[:, None] - means).sum((2, 3, 4))
    return f"seen {seen:8.2g}   strange {to_digits.min(1).mean():8.2g}"


print("exact     ", figures(exact))
for scale in (0.03, 0.1, 0.3, 1.0, 3.0):
    print(f"DPS {scale:5} ", figures(by_dps(scale)))
for rate in (0.05, 0.1, 0.2, 0.4, 0.8):
    print(f"DSG {rate:5} ", figures(by_dsg(rate)))

# %% [markdown]
# ## From the command line, with a trained model
#
# The same picture and mask, and a folder that training made. The sheet has picture, measurement and
# result; a JSON file beside it has the errors.
#
# ```sh
# ogdm sample --workdir runs/digits --guidance dsg --dsg.rate 0.4 --task inpaint \
#     --task.mask mask.png --input picture.png --solver ancestral --steps 50 --out restored.png
# ```
#
# Blur, super-resolution, phase retrieval, and eleven more methods: [guidance](../docs/guidance.md).
