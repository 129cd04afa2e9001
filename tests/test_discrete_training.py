"""Training on the steps of a discrete process: OpenAI's network, OGDM by the authors'
guided-diffusion code.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import config as configs
from ogdm_jax import data, parallel
from ogdm_jax.diffusion.bound import variance_bound
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.methods import ogdm
from ogdm_jax.training import logs, objective
from ogdm_jax.training import run as runs
from ogdm_jax.training.workdir import open_source
from tests.support import networks, tiny

ADM = (
    "network.kind=openai",
    "network.model_channels=32",
    "network.channel_mult=(1,1)",
    "network.attn_resolutions=(4,)",
    "precondition.kind=adm",
    "noise.distribution=ddpm",
    "data.augment=0.0",
    "data.batch=8",
    "optim.learning_rate=0.001",
    *(f"ogdm.{name}={value}" for name, value in ogdm.PRESETS["adm"].items()),
)


@pytest.fixture(scope="module")
def run():
    return tiny.build(*ADM, "ogdm.decay=1", "train.duration=1 steps")


def test_loss_is_the_mean_squared_error_of_eps_times_the_pixels(run):
    """weight (x0_hat - x0)^2 of the denoiser against (eps_hat - eps)^2 of the network at its
    integer steps.
    """
    chain, t = Discrete.make(), np.array([0, 40, 500, 999])
    rng = np.random.default_rng(1)
    params, _ = networks.born(jax.eval_shape(run.model.init, jax.random.key(0)))
    params = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(p.dtype), params)
    x0, eps = jax.random.normal(jax.random.key(2), (2, 4, 8, 8, 1))
    sigma = jnp.asarray(chain.sigma[t], jnp.float32)
    wide = lambda v: jnp.asarray(v, jnp.float32)[:, None, None, None]

    @jax.jit
    def both(params):
        x0_hat = run.model.denoiser(params)(x0 + wide(sigma) * eps, sigma)
        ours = run.noise.weight(sigma) * jnp.sum(jnp.square(x0_hat - x0), axis=(1, 2, 3))
        xt = wide(np.sqrt(chain.alpha_bar[t])) * x0 + wide(np.sqrt(1 - chain.alpha_bar[t])) * eps
        eps_hat = run.model.network.apply({"params": params}, xt, jnp.asarray(t, jnp.float32))
        return ours, 64 * jnp.mean(jnp.square(eps_hat - eps), axis=(1, 2, 3))

    ours, theirs = both(params)
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)


@pytest.mark.slow
def test_ogdm_trains_on_discrete_pairs_and_its_discriminators_rate_falls(run):
    """Two steps: both networks learn in the first; in the second the discriminator's rate is 0."""
    state = run.init()
    step, constants = run.compile(state), run.constants()
    batches = data.batches(run.source, 8, 0)
    seen = []
    for _ in range(2):
        before = jax.tree.map(np.asarray, (state.params, state.carry["ogdm"]["params"]))
        state, metrics = step(state, constants, run.plan.place_batch(next(batches)), run.key)
        after = jax.tree.map(np.asarray, (state.params, state.carry["ogdm"]["params"]))
        moved = [
            any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
            for pair in zip(before, after, strict=True)
        ]
        seen.append(moved)
        known = (v for n, v in metrics.items() if not n.startswith(logs.LEVELS))
        assert all(np.isfinite(np.asarray(value)).all() for value in known)
    assert seen == [[True, True], [True, False]]


def test_the_celeba_configuration_is_the_authors():
    """Parameters of their U-Net and discriminator (spec of the released code), and the switches
    that are numbers.
    """
    config = configs.load(tiny.ROOT / "configs" / "celeba64_ogdm.py")
    source = data.Source("celeba", (64, 64, 3), images=np.zeros((4, 64, 64, 3), np.uint8))
    built = runs.build(config, source, parallel.make_plan("pmap", 1))
    shapes = jax.eval_shape(built.create, jax.random.key(0))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert (
        count(shapes.params) == 121_060_483 and count(shapes.carry["ogdm"]["params"]) == 28_853_760
    )
    assert abs(0.5 ** (1 / configs.duration(config.ema.halflife, 128)) - 0.9999) < 1e-8
    settings = config.settings("ogdm", ogdm.Settings)
    assert built.steps == settings.decay == config.steps(config.optim.decay) == 300_000
    assert (settings.gamma, settings.k, settings.r1, settings.condition) == (
        0.01,
        0.1,
        0.25,
        "index",
    )


@pytest.mark.parametrize(
    "text,words",
    [
        ("data.augment=0.1", "data.augment: 0.1 given; expected 0 with network.kind 'openai'"),
        ("ogdm.schedule=cosine", "config.ogdm.schedule: 'cosine, 1000 steps' given"),
        ("precondition.diffusion_steps=500", "config.ogdm.schedule"),
        ("precondition.schedule=sigmoid", "precondition.schedule: unknown 'sigmoid'"),
        ("precondition.diffusion_steps=1", "precondition.diffusion_steps: 1 given"),
        ("ogdm.decay=-1", "config.ogdm.decay: -1 given"),
        ("network.num_heads=3", "do not divide into heads"),
    ],
)
def test_wrong_settings_are_one_sentence(text, words):
    with pytest.raises(ValueError, match=words) as error:
        config = tiny.config(*ADM, text)
        built = runs.build(config, data.open_source("digits"), parallel.make_plan("pmap", 1))
        jax.eval_shape(built.create, jax.random.key(0))
    assert "\n" not in str(error.value)


def test_images_are_resized_and_coloured_by_configuration():
    assert open_source(tiny.config()).shape == (8, 8, 1)
    assert open_source(tiny.config("data.resolution=16", "data.channels=3")).shape == (
        16,
        16,
        3,
    )
    for text in ("data.resolution=-1", "data.channels=2"):
        with pytest.raises(configs.ConfigError, match=text.split("=")[0]):
            open_source(tiny.config(text))
    older = json.loads(configs.to_json(tiny.config()))
    del older["data"]["resolution"], older["data"]["channels"]
    assert open_source(configs.from_json(json.dumps(older))).shape == (8, 8, 1)


def test_the_variances_share_of_the_loss_knows_how_many_steps_there_are():
    """guided-diffusion's RESCALED_MSE: the bound's term times T / 1000; a sum over pixels here."""
    more = ("precondition.learned_variance=True", "precondition.diffusion_steps=40")
    run = tiny.build(*ADM, "methods=", *more, tiny.ONE_LEVEL, "data.batch=2")
    state, batch = tiny.fresh(run), next(data.batches(run.source, 2, 0))
    key = jax.random.key(3)
    goal = objective.denoising(run.config, run.model, run.noise, run.methods, run.plan.gather)

    @jax.jit
    def both(state, batch):
        _, totals = goal.loss(state.params, state, {}, batch, key)
        example, denoiser = goal.see(state.params, state.buffers, batch, key, key)
        x0_hat, fraction = denoiser("denoise").variance(example.xt, example.sigma, example.label)
        chain = Discrete.make(steps=40)
        return totals["loss/variance"], variance_bound(
            chain, example.x0, x0_hat, example.sigma, fraction
        )

    (total, weight), bound = both(state, batch)
    np.testing.assert_allclose(total / weight, np.mean(bound) * 64 * 40 / 1000, rtol=1e-5)


@pytest.mark.slow_cases("", "ogdm")
@pytest.mark.parametrize("on", ["", "ogdm"])
def test_a_learned_variance_is_trained(on):
    """Its channels get a gradient from their own loss, which the metrics name; beside OGDM, too."""
    more = ("precondition.learned_variance=True", tiny.ONE_LEVEL, "ogdm.channel_max=8")
    run = tiny.build(*ADM, f"methods={on}", *more)
    born = jax.tree.map(np.asarray, run.init().params)
    state, metrics = tiny.train(run, 1)
    moved = np.abs(state.params["out_conv"]["kernel"] - born["out_conv"]["kernel"])
    channels = moved.reshape(-1, moved.shape[-1]).max(axis=0)
    assert channels.shape == (2,) and (channels > 0).all()
    assert np.isfinite(metrics["loss"]) and metrics["loss/variance"] > 0
    parts = ("denoise", "variance", *([on] if on else []))
    assert metrics["loss"] == pytest.approx(sum(metrics[f"loss/{part}"] for part in parts))
