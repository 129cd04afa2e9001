# %% [markdown]
# # 5 · A checkpoint of others: open, sample, fine-tune with OGDM
#
# Weights that another program trained become a denoiser here, without PyTorch and without running
# any code of the file. **No file is downloaded in this notebook**: a small network is trained in
# the first part and written under the tensor names of EDM's PyTorch code, and that file stands for
# one that you have. With `edm-cifar10-32x32-uncond-vp.pkl` or your own `.pt`, begin at *Open*.

# %%
from safetensors.numpy import save_file

from ogdm_jax import config, interop, metrics, startup
from ogdm_jax.data.pictures import show
from ogdm_jax.interop.export import to_torch
from ogdm_jax.pixels import to_uint8
from ogdm_jax.training import convert, loop
from ogdm_jax.training.workdir import open_source, open_workdir

startup.prepare()

# %% [markdown]
# ## The file that stands for a downloaded one

# %%
network = ["network.channel_mult=(1,2)", "network.num_blocks=1", "network.attn_resolutions="]
brief = ["log.tensorboard=false", "sample.every=0 steps", "evaluate.features="]
plain = config.load("digits", ["methods=", "train.duration=300 steps", *network, *brief])
_, state = loop.train(plain, "runs/theirs", log=lambda line: None)
theirs = open_workdir("runs/theirs")
tensors = to_torch(theirs.model.network, {"params": theirs.params, "buffers": theirs.buffers})
save_file(tensors, "theirs.safetensors")
print(len(tensors), "tensors, such as", list(tensors)[20])

# %% [markdown]
# ## Open
#
# What a file holds is recognised from names and shapes. What they cannot show has to be told: the
# width of the data that it was trained with (EDM's pickles do say it).

# %%
found = interop.load_pretrained("theirs.safetensors", sigma_data=0.75)
found

# %% [markdown]
# `found.denoiser()` is all that a sampler needs (notebook 1). For training, the file becomes a
# folder like that of a run: in a shell `ogdm convert FILE --set sigma_data=0.75 --out runs/edm`, or
# here. The settings of the network come from the file, the others (data, optimiser) from a
# configuration.

# %%
settings = config.replace(plain, convert.settings_of(found, plain))
count = convert.write(found, settings, "runs/edm", "theirs.safetensors")
open_workdir("runs/edm")

# %% [markdown]
# ## Sample
#
# Five Euler steps, five evaluations of the network: too few for a plain model. The distance to the
# real digits says so, too (the floor is real against real).

# %%
space, real = metrics.feature_space("digits"), open_source(plain).images


def measure(model):
    images = to_uint8(model.sample(500, solver="euler", steps=5, batch=250))
    report = metrics.distance_report(space, images, real)
    print("{features}: {fd:.1f}, floor {floor:.1f}, {n} images".format(**report))
    return show(images[:24], columns=12)


measure(open_workdir("runs/edm"))

# %% [markdown]
# ## Fine-tune with OGDM
#
# OGDM ([2310.04041](https://arxiv.org/abs/2310.04041)) trains a small discriminator beside the
# network: it judges single sampler steps, and the network learns steps that land on the data. The
# new run starts from the folder's weights (`init.workdir`).

# %%
ogdm = config.load(
    "digits",
    ["methods=ogdm", "init.workdir=runs/edm", "train.duration=200 steps", *network, *brief],
)
_, state = loop.train(ogdm, "runs/edm_ogdm")

# %% [markdown]
# The same seeds and the same five evaluations as above. (A part of the gain is the further training
# itself; [results](../docs/results.md) compares at equal numbers of updates, over five seeds.)

# %%
measure(open_workdir("runs/edm_ogdm"))

# %% [markdown]
# Back to PyTorch's names: `ogdm export runs/edm_ogdm --out ogdm.safetensors`. What can be opened:
# [checkpoints](../docs/checkpoints.md).
