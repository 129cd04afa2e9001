# %% [markdown]
# # 1 · A denoiser and a sampler in 40 lines
#
# A diffusion model is one function. It gets a noisy image `x = x0 + sigma * noise` and the noise
# level `sigma`, and answers with the mean of all clean images that may lie behind it:
#
#     denoise(x, sigma, label) -> x0_hat
#
# Everything in ogdm_jax speaks of this function: training makes one out of a network, sampling
# walks from noise to images by asking it again and again. Here it is known exactly, because the
# "images" come from a mixture of Gaussians. Nothing is trained, and every picture shows the truth.
#
# `startup.prepare()` sets the XLA flags and the cache of compiled programs that the commands have;
# it stands in the first cell of every notebook.

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from ogdm_jax import startup
from ogdm_jax.diffusion import grids
from ogdm_jax.sampling import sample

startup.prepare()

# %% [markdown]
# ## The data and its denoiser
#
# Eight narrow Gaussians on a circle. An image has one pixel with two channels, so that it can be
# drawn as a point of the plane; arrays are `[images, height, width, channels]` as everywhere.
#
# For one Gaussian with mean `m` the best guess lies between `x` and `m`, nearer to `m` the more
# noise there is. For several it is the mean of these guesses, weighted by how likely it is that `x`
# came from each.

# %%
STD = 0.06
ANGLES = 2 * np.pi * np.arange(8) / 8
MEANS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1).astype(np.float32)


def denoise(x, sigma, label=None):
    point, s2 = x[:, 0, 0, None, :], sigma[:, None] ** 2  # [B,1,2], [B,1]
    squared = jnp.sum((point - MEANS) ** 2, -1)  # [B,8], to each mean
    likely = jax.nn.softmax(-squared / (2 * (STD**2 + s2)))
    guesses = (STD**2 * point + s2[..., None] * MEANS) / (STD**2 + s2[..., None])
    return jnp.sum(likely[..., None] * guesses, 1)[:, None, None, :]


# %% [markdown]
# ## What a denoiser says
#
# Arrows go from a noisy point to `x0_hat`. With much noise (left) every answer is the centre of all
# the data: nobody can tell which Gaussian a point came from. With less, each region of the plane
# decides for its own neighbour, and with little noise (right) the answers lie on the data.

# %%
line = np.linspace(-1.6, 1.6, 13, dtype=np.float32)
field = np.stack(np.meshgrid(line, line), -1).reshape(-1, 1, 1, 2)
figure, axes = plt.subplots(1, 3, figsize=(9, 3), dpi=80, sharey=True, layout="constrained")
for panel, level in zip(axes, (2.0, 0.5, 0.15)):
    answer = denoise(field, np.full(len(field), level, np.float32))
    (x, y), (u, v) = field[:, 0, 0].T, (answer - field)[:, 0, 0].T
    panel.quiver(x, y, u, v, angles="xy", scale_units="xy", scale=1, width=0.004, color="0.45")
    panel.plot(*MEANS.T, "o", color="C3", markersize=5)
    panel.set(title=f"sigma = {level}", aspect="equal", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7))
plt.show()

# %% [markdown]
# ## A sampler
#
# Start from pure noise at a high level and follow the slope `(x - x0_hat) / sigma` down a grid of
# levels to 0: Euler's method on the probability-flow ODE
# ([arXiv 2206.00364](https://arxiv.org/abs/2206.00364), eq. 1). That is the whole sampler. The grid
# is EDM's: few large steps first, many small ones near the data.


# %%
def euler(denoise, latents, sigmas):
    x = latents * sigmas[0]
    path = [x]
    for sigma, lower in itertools.pairwise(sigmas):
        slope = (x - denoise(x, jnp.full(len(x), sigma))) / sigma
        x = x + (lower - sigma) * slope
        path.append(x)
    return jnp.stack(path)


sigmas = grids.edm(18, sigma_max=10.0)
latents = jax.random.normal(jax.random.key(0), (400, 1, 1, 2))
path = euler(denoise, latents, sigmas)
path.shape  # 19 states of 400 images

# %% [markdown]
# ## Trajectories
#
# Left: the paths of sixty images, coloured by where they end. States are divided by
# `sqrt(1 + sigma^2)`, the spread of the noisy data, or the start would be ten times as wide as the
# end. All start as noise, move alike at first, and part when the level is low enough for the
# Gaussians to be told apart. Right: where all 400 end.

# %%
spread = np.sqrt(1 + sigmas**2)[:, None, None]
nearest = np.argmin(((np.asarray(path[-1, :, 0]) - MEANS) ** 2).sum(-1), -1)
colours = [f"C{k}" for k in nearest]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), dpi=80, layout="constrained")
for way, colour in zip(np.swapaxes(path[:, :60, 0, 0] / spread, 0, 1), colours):
    left.plot(*way.T, color=colour, linewidth=0.8)
    left.plot(*way[0], ".", color=colour, markersize=3)
left.set(title="60 trajectories, 18 Euler steps (dot: start)", aspect="equal")
right.scatter(*path[-1, :, 0, 0].T, c=colours, s=4)
right.set(title="400 samples", aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
plt.show()

# %% [markdown]
# ## The same from the package
#
# `sample` takes any such function. It is this loop as one compiled scan, with twelve solvers,
# guidance, and random keys that make every image independent of its batch.

# %%
images, trajectory = sample(denoise, latents, sigmas, solver="euler", trajectory=True)
print("largest difference from the loop above:", float(jnp.abs(images - path[-1]).max()))
trajectory

# %% [markdown]
# ## How many evaluations?
#
# Calling the denoiser is what costs time when it is a network. The curves show how far samples are
# from the exact solution (128 Heun steps stand for it) after a number of evaluations. Euler's error
# falls by 2 where evaluations double; methods of second order fall by about 4 once steps are small.

# %%
draw = jax.jit(
    lambda sigmas, solver: sample(denoise, latents, sigmas, solver), static_argnames="solver"
)
exact = draw(grids.edm(128, sigma_max=10.0), "heun")
figure, axis = plt.subplots(figsize=(5.5, 3.2), dpi=80, layout="constrained")
for solver, evaluations in {"euler": 1, "heun": 2, "dpmpp_2m": 1}.items():
    count, error = [], []
    for n in (4, 8, 16, 32):
        steps = n if evaluations == 1 else n // 2 + 1
        found = draw(grids.edm(steps, sigma_max=10.0), solver)
        count.append(evaluations * steps - (solver == "heun"))
        error.append(float(jnp.sqrt(jnp.mean((found - exact) ** 2))))
    axis.loglog(count, error, "o-", label=solver)
axis.set(xlabel="evaluations of the denoiser", ylabel="error (root mean square)")
axis.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"], minor=False)
axis.minorticks_off()
axis.legend()
plt.show()

# %% [markdown]
# ## Noise on the way
#
# DDPM's sampler (`ancestral`) steps a little too far down and adds fresh noise. Paths become
# random walks: two that start at one point part. Random steps are what guidance by DPS or DSG
# needs (notebook 4).

# %%
same = jnp.repeat(latents[:1], 6, 0)  # six times one start
fine = grids.edm(60, sigma_max=10.0)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), dpi=80, layout="constrained")
for panel, solver in zip(axes, ("euler", "ancestral")):
    _, walk = sample(denoise, same, fine, solver, jax.random.key(1), trajectory=True)
    for i in range(6):
        panel.plot(*(walk.states[:, i, 0, 0] / np.sqrt(1 + fine**2)[:, None]).T, linewidth=0.8)
    panel.plot(*MEANS.T, "o", color="0.6", markersize=4)
    panel.set(title=f"{solver}, six runs from one start", aspect="equal")
plt.show()

# %% [markdown]
# Next: [notebook 2](2_train_on_digits.ipynb) puts a network in the place of the formula.
