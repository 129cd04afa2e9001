"""The configurations of ADM, OGDM-ADM and DiT: their networks have the released numbers of
parameters, and each trains.
"""

import gzip
import json

import jax
import numpy as np
import pytest

from ogdm_jax import config as configs
from ogdm_jax import data, models, parallel
from ogdm_jax.methods import ogdm
from ogdm_jax.training import logs
from ogdm_jax.training import run as runs
from tests.support import tiny

# {configuration: (side, classes, list of the released checkpoint's tensors)}
RELEASED = {
    "cifar10_adm": (32, 0, "ogdm-adm-unet-cifar10-32"),
    "cifar10_adm_ogdm": (32, 0, "ogdm-adm-unet-cifar10-32"),
    "celeba64_adm": (64, 0, "ogdm-adm-unet-celeba-afhq-64"),
    "celeba64_ogdm": (64, 0, "ogdm-adm-unet-celeba-afhq-64"),
    "lsun256_adm": (256, 0, "guided-diffusion-lsun_256"),
    "imagenet256_adm": (256, 1000, "guided-diffusion-256x256_diffusion"),
    "imagenet256_dit": (32, 1000, "dit-xl2-256"),
}
REDUCED = (
    *("network.model_channels=32", "network.channel_mult=(1,)", "network.num_blocks=1"),
    *("network.attn_resolutions=()", "network.head_channels=32", "ogdm.channel_max=8"),
    *("data.batch=8", "data.resolution=0", "optim.learning_rate=0.001", "parallel.plan=pmap"),
)


def load(name, *more):
    return configs.load(tiny.ROOT / "configs" / f"{name}.py", more)


@pytest.mark.slow_cases("cifar10_adm_ogdm", "imagenet256_adm", "celeba64_ogdm", "celeba64_adm")
@pytest.mark.parametrize("name", RELEASED)
def test_the_network_has_the_released_number_of_parameters(name):
    side, classes, listed = RELEASED[name]
    config = load(name)
    dit = config.network.kind == "dit"
    model = models.build(config, (side, side, 4 if dit else 3), classes)
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    with gzip.open(tiny.ROOT / "tests" / "golden" / "fullsize" / f"{listed}.json.gz") as file:
        about = json.load(file)
    positions = (side // 2) ** 2 * 1152 if dit else 0  # a table of sines, no parameter of ours
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == about["param_count"] - positions
    dropout = 0.0 if dit else config.network.dropout  # a DiT has none, whatever the settings say
    assert dropout == about.get("constructor", {})["kwargs"].get("dropout", 0.0)
    batch = config.data.batch
    assert abs(0.5 ** (1 / configs.duration(config.ema.halflife, batch)) - 0.9999) < 1e-8
    if config.methods:
        settings = config.settings("ogdm", ogdm.Settings)
        assert settings.decay == config.steps("train.duration") == 300_000


@pytest.mark.slow_cases("cifar10_adm_ogdm", "imagenet256_adm")
@pytest.mark.parametrize("name", ["cifar10_adm_ogdm", "imagenet256_adm", "imagenet256_dit"])
def test_it_takes_a_step_at_a_reduced_width(name):
    """The others are these with another side, without classes or without OGDM."""
    _, classes, _ = RELEASED[name]
    rng = np.random.default_rng(0)
    source = data.Source(
        name=name,
        shape=(8, 8, 3),
        num_classes=classes,
        images=rng.integers(0, 256, (16, 8, 8, 3), np.uint8),
        labels=rng.integers(0, max(classes, 1), 16).astype(np.int32),
    )
    run = runs.build(load(name, *REDUCED), source, parallel.make_plan("pmap", 1))
    before = jax.tree.map(np.asarray, run.init().params)
    state, metrics = tiny.train(run, 1)
    # a bin of noise levels that no image of the batch lies in has no loss
    assert all(np.isfinite(v) for n, v in metrics.items() if not n.startswith(logs.LEVELS))
    assert ("loss/variance" in metrics) == run.config.precondition.learned_variance
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, state.params))))
