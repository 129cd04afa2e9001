# %% [markdown]
# # 3 · A method of your own in 40 lines
#
# Two kinds of methods: one changes **training**, one changes **sampling**. This notebook writes one
# of each, in the notebook. In a package the same lines become a file, and an entry point makes
# `ogdm train` and `ogdm sample` know it ([CONTRIBUTING](../CONTRIBUTING.md)).

# %%
import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp

from ogdm_jax import config, startup
from ogdm_jax.config import check, setting
from ogdm_jax.data.pictures import show
from ogdm_jax.methods import discovery, dsg
from ogdm_jax.methods.contract import Slots
from ogdm_jax.training import loop
from ogdm_jax.training.workdir import open_workdir

startup.prepare()

# %% [markdown]
# ## A training method
#
# A training step minimises `distance(x0_hat, target)` plus penalties. A method fills one of these
# slots (or several), and gets the rest of the step as it is: noise levels, augmentation, devices.
#
# This one fills the distance with the pseudo-Huber loss
# ([2310.14189](https://arxiv.org/abs/2310.14189) uses it for consistency models): squared for small
# errors, absolute for large ones, so that a few odd images pull less. `Settings` says what may be
# set, with a help text and a range; a bad value is refused in one sentence before anything starts.
# What the slot returns beside the loss is logged.


# %%
@dataclasses.dataclass(frozen=True)
class Settings:
    width: float = setting(0.2, "error of a pixel at which squared turns to absolute", above=0)

    def __post_init__(self):
        check(self, "huber")


def training(settings, context):
    def distance(example, x0_hat, target, denoiser, own):
        squared = jnp.sum(jnp.square(x0_hat - target), axis=(1, 2, 3))
        c2 = settings.width**2 * target[0].size
        huber = 2 * c2 * (jnp.sqrt(1 + squared / c2) - 1)  # = squared, while that is below c2
        return context.noise.weight(example.sigma) * huber, {"huber/of_squared": huber / squared}

    return Slots("huber", distance=distance)


discovery.register("huber", Settings, training=training)

# %% [markdown]
# From here on `methods=huber` is a method like any other. A typing error:

# %%
try:
    discovery.check_settings(config.load("digits", ["methods=huber", "huber.width=-1"]))
except config.ConfigError as error:
    print(error)

# %% [markdown]
# Training, with the small network of notebook 2:

# %%
settings = config.load(
    "digits",
    [
        "methods=huber",
        "huber.width=0.2",
        "network.channel_mult=(1,2)",
        "network.num_blocks=1",
        "network.attn_resolutions=",
        "train.duration=300 steps",
        "log.tensorboard=false",
        "sample.every=0 steps",
        "evaluate.features=",
    ],
)
run, state = loop.train(settings, "runs/huber")

# %% [markdown]
# What the slot returned beside the loss is in the folder's numbers, step by step: by how much large
# errors were damped. (`ogdm report` draws it.)

# %%
for line in Path("runs/huber/metrics.jsonl").read_text().splitlines():
    print("step {step}: {huber/of_squared:.2f} of the squared error".format(**json.loads(line)))

# %% [markdown]
# And samples:

# %%
trained = open_workdir("runs/huber")
show(trained.sample(24, solver="heun", steps=18), columns=12)

# %% [markdown]
# It composes with others: `methods=huber,ogdm` trains both, and two methods that fill one slot are
# refused by name.

# %% [markdown]
# ## A guidance
#
# While sampling, a loss of `x0_hat` is enough: DSG and DPS turn it into guidance. This one wants
# digits that equal their mirror image. Above: twelve seeds without it; below: the same with it.


# %%
def asymmetry(x0_hat):
    return jnp.sum(jnp.square(x0_hat - x0_hat[:, :, ::-1]), axis=(1, 2, 3))


how = {"solver": "ancestral", "steps": 50}
plain = trained.sample(12, **how)
mirrored = trained.sample(12, guidance=dsg.guidance(asymmetry, rate=0.3), **how)
print(f"asymmetry {asymmetry(plain).mean():.1f} -> {asymmetry(mirrored).mean():.2f}")
show(jnp.concatenate([plain, mirrored]), columns=12)

# %% [markdown]
# A guidance may also replace the denoiser (as classifier-free guidance does) or the rule of random
# steps; its parts are the fields of `Guidance` ([design](../docs/design.md)).
#
# Next: [restoring a picture](4_guidance.ipynb).
