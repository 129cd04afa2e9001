# %% [markdown]
# # 2 · Train on digits, watch, sample, measure
#
# A network in the place of notebook 1's formula: trained on scikit-learn's 1,797 real digits (8x8
# grey, nothing to download) in about a minute on two CPU cores, then sampled and measured.

# %%
import base64
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML

from ogdm_jax import config, metrics, startup
from ogdm_jax.data.pictures import save_animation, sheet, show
from ogdm_jax.pixels import to_uint8
from ogdm_jax.training import loop
from ogdm_jax.training.workdir import open_source, open_workdir

startup.prepare()

# %% [markdown]
# ## Settings
#
# `config.load` reads one of the shipped configurations (`configs/digits.py`) and changes single
# settings, as `ogdm train --config.KEY=VALUE` does. The default trains with OGDM; `methods=` trains
# plain EDM, which is quicker. The network is made smaller, too. What is not the default is shown.

# %%
settings = config.load(
    "digits",
    [
        "methods=",
        "network.channel_mult=(1,2)",
        "network.num_blocks=1",
        "network.attn_resolutions=",
        "train.duration=400 steps",
        "log.every=100 steps",
        "log.tensorboard=false",
        "sample.every=0 steps",
    ],
)
settings

# %% [markdown]
# ## Data
#
# `show` displays images: uint8, or floats in [-1, 1], `[images, height, width, channels]`. Small
# ones are enlarged.

# %%
source = open_source(settings)
print(source)
show(source.images[:24], columns=12)

# %% [markdown]
# ## Train
#
# The folder keeps checkpoints, logs and the settings. Running the cell again **resumes**; when the
# run is complete it only measures. Interrupting the kernel (the stop button, Ctrl-C) saves first.
# The first lines say what was understood; then come the loss and the speed; the last ones are a
# Fréchet distance of samples to the real digits, with the *floor* (real against real) beside it.

# %%
run, state = loop.train(settings, "runs/digits")

# %% [markdown]
# `run` has the fixed parts, `state` what changed. Left at the end of a cell, each is one line:

# %%
state

# %% [markdown]
# ## Watch
#
# `metrics.jsonl` in the folder has the numbers of every line, more than the log shows: the loss by
# noise level says where the model still learns. `ogdm report --workdir runs/digits` makes a page of
# all of them; TensorBoard, wandb and trackio are settings (`log.tensorboard`, `log.tracker`).

# %%
lines = [json.loads(line) for line in Path("runs/digits/metrics.jsonl").read_text().splitlines()]
levels = [name for name in lines[0] if name.startswith("level/")]
figure, axis = plt.subplots(figsize=(6, 3), dpi=80, layout="constrained")
for name in levels:
    points = [(line["step"], line[name]) for line in lines if name in line]
    axis.plot(*zip(*points), label=name.removeprefix("level/"))
axis.set(xlabel="step", ylabel="loss")
axis.legend(title="noise level sigma", fontsize=7, title_fontsize=7, ncols=2)
plt.show()

# %% [markdown]
# ## Sample
#
# `open_workdir` gives the trained model with its averaged weights (EMA), here and in any other
# session. An image depends on its seed alone: the first of sixteen is the first of a thousand.

# %%
trained = open_workdir("runs/digits")
trained

# %%
show(trained.sample(24, solver="heun", steps=18), columns=12)

# %% [markdown]
# ## From noise to a digit
#
# `trained.path` keeps what `sample` passes through. Each row is an image on its way: what the
# network takes it to be at the noise levels of ten Euler steps (the numbers below the first row).
# First the mean of all digits, then one digit.

# %%
path = trained.path(range(4), trained.settings(solver="euler", steps=10))
captions = [f"{sigma:.2g}" for sigma in path.sigmas[:10]] + [""] * 30
show(np.swapaxes(path.x0_hats, 0, 1).reshape(-1, 8, 8, 1), 10, captions)

# %% [markdown]
# The same as an animation, of 16 digits in 40 steps: `ogdm sample --animate way.webp` writes one,
# with the noisy states beside it; here are its frames by hand. (Some code hosts do not show it.)

# %%
path = trained.path(range(16), trained.settings(solver="euler", steps=40))
save_animation("way.webp", [sheet(frame, 8) for frame in path.x0_hats], 100)
content = base64.b64encode(Path("way.webp").read_bytes()).decode()
HTML(f'<img src="data:image/webp;base64,{content}" alt="16 digits in 40 steps">')

# %% [markdown]
# ## Measure
#
# A distance falls with the number of images, so it always comes with that number and the floor.
# `fd_digits` compares features of a small classifier (it is no FID); images are measured as files
# have them, uint8. More evaluations help, up to what this network has learnt in a minute.

# %%
space = metrics.feature_space("digits")
for steps in (3, 5, 10):
    images = to_uint8(trained.sample(500, solver="heun", steps=steps, batch=250))
    found = metrics.distance_report(space, images, source.images)
    line = "{fd:6.1f} (floor {floor:.1f}, {n} images)".format(**found)
    print(f"{2 * steps - 1:3} evaluations: {found['features']} {line}")

# %% [markdown]
# Next: the same with the shipped settings (`python train.py`, minutes) trains OGDM, which is better
# at few evaluations: [results](../docs/results.md). Or write
# [a method of your own](3_a_method_of_your_own.ipynb).
