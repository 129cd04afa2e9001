"""STF on latents: references are fresh samples of moments, the target is brute force's."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import data, parallel, randomness
from ogdm_jax.data import moments
from ogdm_jax.latents import Latents
from ogdm_jax.methods import contract, stf
from ogdm_jax.training import run as runs
from tests.support import latents as support
from tests.support import tiny
from tests.support.oracles import brute_force

LATENTS = Latents((4, 4, 2), scale=0.6, shift=0.2)
ITEMS = support.moments(40, LATENTS)
CLASSES = np.random.default_rng(1).integers(0, 3, 40).astype(np.int32)
SOURCE = data.Source(
    "forty", LATENTS.shape, num_classes=3, images=ITEMS, labels=CLASSES, latents=LATENTS
)
KEY = jax.random.key(5)


def samples(view=0):
    """Those of one step, of all rows."""
    keys = randomness.example_keys(KEY, "latent", jnp.arange(40))
    return moments.draw(LATENTS, jnp.asarray(ITEMS), keys, jnp.full(40, bool(view)))


def fill(sigma, xflip=False, mates=None, **settings):
    clean, sigma = samples()[:8], jnp.full(8, sigma, jnp.float32)
    eps = jnp.asarray(np.random.default_rng(0).normal(size=clean.shape), jnp.float32)
    xt = clean + sigma[:, None, None, None] * eps
    label, index = jnp.asarray(CLASSES[:8]), jnp.arange(8, dtype=jnp.int32)
    example = contract.Example(
        clean, clean, label, None, sigma, eps, xt, index, KEY, KEY, mates=mates
    )
    context = {"batch": 8, "device_batch": 8, "devices": 1, "axis": None, "mesh": None}
    context |= {"image_shape": LATENTS.shape, "xflip": xflip, "augment": None, "label_dim": 3}
    context |= {"text": False}
    slot = stf.training(stf.Settings(**settings), types.SimpleNamespace(**context, source=SOURCE))
    constants = None if slot.constants is None else slot.constants.make()
    return example, jax.jit(slot.target)(example, contract.Own(constants))[0]


@pytest.mark.parametrize("xflip", [False, True])
def test_the_whole_set_is_this_steps_samples(xflip):
    example, target = fill(1.5, xflip, source="full")
    for i in range(8):
        same = CLASSES == CLASSES[i]
        known = np.concatenate([np.asarray(samples(view))[same] for view in range(1 + xflip)])
        mean, _ = brute_force(example.xt[i : i + 1], example.sigma[i : i + 1], known)
        np.testing.assert_allclose(np.ravel(target[i]), np.ravel(mean), atol=2e-5)


@pytest.mark.parametrize("source", ["full", "cache", "class"])
def test_low_noise_gives_the_latent_itself(source):
    example, target = fill(1e-3, source=source, **({} if source == "full" else {"n": 64}))
    np.testing.assert_allclose(target, example.x0, atol=1e-5)


@pytest.mark.slow_cases("resident-True", "read-False")
@pytest.mark.parametrize("xflip", [False, True])
@pytest.mark.parametrize("bank", ["resident", "read"])
def test_many_draws_have_the_posteriors_of_the_class(bank, xflip):
    count = 20_000
    mates = None
    if bank == "read":
        rng = np.random.default_rng(2)
        own = [rng.choice(np.flatnonzero(CLASSES == c), count - 1) for c in CLASSES[:8]]
        mates = jnp.asarray(ITEMS)[np.stack(own)]
    _, target = fill(1e4, xflip, mates, source="class", bank=bank, n=count)
    means, stds = np.split(np.asarray(ITEMS, np.float64), 2, axis=-1)
    for i in range(8):
        same = CLASSES == CLASSES[i]
        here = (means[same][:, : 1 + xflip] - 0.2) * 0.6
        error = np.abs(target[i] - here.mean((0, 1)))
        spread = np.sqrt(here.var((0, 1)) + (0.36 * stds[same] ** 2).max())
        assert (error < 5 * spread / count**0.5).all()


@pytest.mark.slow_cases("settings1")
@pytest.mark.parametrize("settings", [("full",), ("class", "stf.bank=read", "stf.n=4")])
def test_runs_train(settings):
    config = tiny.config(
        *("methods=stf", f"stf.source={settings[0]}", *settings[1:], "network.kind=dit"),
        *("network.model_channels=16", "network.num_heads=2", "network.num_blocks=1"),
        *("data.source=latents:none", "data.batch=8", "data.conditional=true", "data.augment=0"),
        *("network.dropout=0", "data.xflip=true"),
    )
    run = runs.build(config, SOURCE, parallel.make_plan("mesh", 2))
    state, metrics = tiny.train(run, 2)
    assert np.isfinite(metrics["loss"]) and int(state.step) == 2
