"""Training DG's discriminator: the loss, the data, the loop, and what sampling opens afterwards."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from PIL import Image

from ogdm_jax import config as configs
from ogdm_jax import parallel, randomness
from ogdm_jax.config import Sample
from ogdm_jax.data import from_arrays, open_source, output
from ogdm_jax.diffusion import grids
from ogdm_jax.discriminator import generated
from ogdm_jax.discriminator import guidance as guiding
from ogdm_jax.discriminator import loss as losses
from ogdm_jax.discriminator.evaluation import GuidedEvaluation
from ogdm_jax.discriminator.guidance import Use, open_guidance
from ogdm_jax.discriminator.loss import _images, cross_entropy, training_loss
from ogdm_jax.discriminator.network import SETTINGS, open_network, ratio_of
from ogdm_jax.discriminator.pairs import Pairs, split
from ogdm_jax.discriminator.run import build as build_run
from ogdm_jax.discriminator.run import optimiser
from ogdm_jax.discriminator.train import TASK
from ogdm_jax.interop import export
from ogdm_jax.latents import Latents
from ogdm_jax.methods import dg
from ogdm_jax.networks import ADMEncoder
from ogdm_jax.networks.feature_discriminator import build
from ogdm_jax.sampling import generate
from ogdm_jax.sampling.churn import Churn
from ogdm_jax.sampling.sampler import sample
from ogdm_jax.training import evaluate, loop
from ogdm_jax.training.checkpoint import CheckpointError, Snapshot
from ogdm_jax.training.workdir import TrainedModel, open_workdir
from tests.support import networks, tiny
from tests.support.oracles import Mixture

SMALL = (
    "train.duration=4 steps",
    "data.batch=8",
    "log.every=2 steps",
    "log.tensorboard=false",
    "sample.every=2 steps",
)
SMALL += (
    "sample.solver=heun",
    "sample.steps=3",
    "dg.weight=2.0",
    "dg.weights=()",
    "evaluate.features=",
    "evaluate.every=0 steps",
    "dg.num=60",
    "network.channel_mult=(1,)",
)
SMALL += (
    "network.attn_resolutions=()",
    "optim.decay=0 steps",
    "train.save_every=2 steps",
    "parallel.devices=1",
)


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A denoiser's training folder with fresh weights and classes."""
    run = tiny.build("methods=()", *tiny.SMALLEST, "data.conditional=true")
    return tiny.folder(tmp_path_factory.mktemp("prior"), run)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """An exported classifier of noisy digits, 4x4 features."""
    network = ADMEncoder(
        img_resolution=8,
        img_channels=1,
        out_channels=10,
        model_channels=32,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        head_channels=32,
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    variables = networks.born(shapes, 5)
    path = tmp_path_factory.mktemp("extractor") / "classifier.safetensors"
    about = {"kind": "adm_encoder", "settings": export.network_settings(network)}
    return export.write(path, export.to_torch(network, variables), about)


def config(prior, *more: str):
    return configs.load(
        tiny.ROOT / "configs" / "digits_dg.py", (*SMALL, f"dg.prior={prior}", *more)
    )


@pytest.fixture(scope="module")
def trained(prior, extractor, tmp_path_factory):
    """(folder, run, state, lines) of a conditional head on an extractor, evaluated at every
    checkpoint.
    """
    folder, lines = tmp_path_factory.mktemp("trained"), []
    more = (
        "evaluate.features=digits",
        "evaluate.num=40",
        "evaluate.every=2 steps",
        "dg.weights=(50.0,)",
    )
    settings = config(prior, f"dg.extractor={extractor}", "data.conditional=true", *more)
    run, state = loop.train(settings, folder, lines.append, TASK)
    return folder, run, state, lines


# The loss


@pytest.mark.fast
def test_cross_entropy_is_that_of_the_sigmoid():
    logit, real = jnp.asarray([-2.0, 0.5, 3.0]), jnp.asarray([1, 0, 1])
    d = jax.nn.sigmoid(logit)
    value, right = cross_entropy(logit, real)
    np.testing.assert_allclose(value, -jnp.where(real == 1, jnp.log(d), jnp.log(1 - d)), rtol=1e-6)
    assert right.tolist() == [0, 0, 1]


@pytest.mark.fast
@pytest.mark.parametrize("latents", [None, Latents((1, 2, 1), moments=False, scaled=True)])
def test_real_images_alone_are_mirrored(latents):
    """A prior that saw mirrored images makes such by itself: the real side has them half of the
    time, and the generated one stays as it is.
    """
    plain = np.array([[[0.0], [1.0]]], np.float32)
    items = np.stack([plain, plain[:, ::-1]]) if latents else (255 * plain).astype(np.uint8)
    batch = {"image": jnp.asarray(np.stack([items] * 400)), "real": jnp.arange(400) % 2}
    keys = lambda purpose: randomness.example_keys(jax.random.key(0), purpose, jnp.arange(400))
    for xflip, share in ((False, 0.0), (True, 0.5)):
        x = np.asarray(_images(latents, batch, keys, xflip))
        mirrored = x[:, 0, 0, 0] > x[:, 0, 1, 0]
        assert not mirrored[::2].any() and abs(mirrored[1::2].mean() - share) < 0.15


def test_logistic_regression_finds_the_ratio_of_gaussians():
    """real N(.5, 1), generated N(-.5, 1), sigma 1: c = (mu_r - mu_f) / (s^2 + sigma^2) = 0.5,
    intercept 0.
    """
    rng = np.random.default_rng(0)
    real = np.tile([1, 0], 100_000)
    x = jnp.asarray(real - 0.5 + rng.normal(size=real.shape) * np.sqrt(2))

    def loss(p):
        return cross_entropy(p[0] * x + p[1], jnp.asarray(real))[0].mean()

    p = jnp.zeros(2)
    for _ in range(6):  # Newton
        p = p - jnp.linalg.solve(jax.hessian(loss)(p), jax.grad(loss)(p))
    np.testing.assert_allclose(p, [0.5, 0.0], atol=0.02)


@pytest.mark.fast
def test_coupled_l2_is_pytorchs_adam():
    """torch.optim.Adam(weight_decay): the decay joins the gradient before the moments."""
    words = (f"optim.{w}" for w in ("weight_decay=0.1", "learning_rate=0.01", "ramp=0 steps"))
    tx = optimiser(tiny.config(*words, "optim.betas=(0.9,0.999)", "optim.eps=1e-8"))
    p, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    q = jnp.asarray(p)
    state = tx.init(q)
    for t, g in enumerate(([0.3, 0.0], [-0.1, 0.2], [0.5, 0.5]), start=1):
        updates, state = tx.update(jnp.asarray(g), state, q)
        q = optax.apply_updates(q, updates)
        g = np.array(g) + 0.1 * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(q, p, rtol=1e-5)


@pytest.mark.slow
def test_a_trained_ratio_moves_the_samples_to_the_data():
    """spec/dg.md 10: a small perceptron, cosine decay; Wasserstein distance from 0.5 to under
    0.1.
    """
    bumps = lambda w, m, s: Mixture(w, [s, s], np.reshape(m, (2, 1, 1, 1)))
    data, model = bumps([0.5, 0.5], [-1, 1], 0.2), bumps([0.8, 0.2], [-0.9, 1.1], 0.25)
    widths, count, half = (3, 64, 64, 1), 2000, 512

    def perceptron(params, x_vp, t, label=None):
        sigma, x_vp = dg.vp_sigma(t)[:, None], x_vp.reshape(-1, 1)
        x = x_vp * jnp.sqrt(1 + sigma**2)
        h = jnp.concatenate([x_vp, x / jnp.sqrt(0.05 + sigma**2), jnp.log(sigma) / 4], axis=1)
        for i, (w, b) in enumerate(params):
            h = h @ w + b[None]
            h = jax.nn.silu(h) if i < len(params) - 1 else h
        return h[:, 0]

    keys = jax.random.split(jax.random.key(0), 3)
    sizes = list(zip(widths, widths[1:], strict=False))
    params = [
        (jax.random.normal(k, s) / np.sqrt(s[0]), jnp.zeros(s[1]))
        for k, s in zip(keys, sizes, strict=True)
    ]
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, count))
    real = jnp.tile(jnp.asarray([1, 0]), half)

    def step(carry, key):
        params, state = carry
        k = jax.random.split(key, 4)
        x0 = jnp.stack([data.draw(k[0], half), model.draw(k[1], half)], 1).reshape(-1, 1, 1, 1)
        sigma = dg.training_sigma(jax.random.uniform(k[2], (2 * half,)))
        x = x0 + sigma[:, None, None, None] * jax.random.normal(k[3], x0.shape)
        ratio = lambda p: dg.log_ratio(functools.partial(perceptron, p), clip=0.0)(x, sigma)
        loss = lambda p: cross_entropy(ratio(p), real)[0].mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(
        lambda p: jax.lax.scan(step, (p, tx.init(p)), jax.random.split(jax.random.key(1), count))
    )
    (params, _), losses = run(params)
    np.testing.assert_allclose(
        losses[-1000:].mean(), 0.6508, atol=4e-3
    )  # the Bayes value; 1,000 fresh points a step
    ratio = dg.log_ratio(functools.partial(perceptron, params))
    latents = jax.random.normal(jax.random.key(2), (10_000, 1, 1, 1))
    truth = np.sort(np.asarray(data.draw(jax.random.key(3), 10_000)).ravel())
    away = lambda d: np.abs(
        np.sort(np.asarray(sample(d, latents, grids.edm(18))).ravel()) - truth
    ).mean()
    plain, guided = away(model.denoise), away(dg.guide(model.denoise, ratio))
    assert plain > 0.4 and guided < 0.1, (plain, guided)


# The data


@pytest.mark.fast
def test_pairs_alternate_and_resume():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    source = open_source("digits")
    real, fake = (
        dataclasses.replace(source, images=i, labels=None) for i in (images, images + 100)
    )
    pairs = Pairs(real, fake, 8, 0)
    first = next(pairs)
    assert first["real"].tolist() == [1, 0] * 4 and first["index"].tolist() == list(range(8))
    assert ((first["image"].ravel() >= 100) == (first["real"] == 0)).all()
    assert not np.array_equal(
        first["image"][1::2] - 100, first["image"][::2]
    )  # two orders, not one
    halves = [next(Pairs(real, fake, 8, 0, i, 2)) for i in range(2)]
    for key in first:
        np.testing.assert_array_equal(np.concatenate([h[key] for h in halves]), first[key])
    position, second = pairs.get_state(), next(pairs)
    again = Pairs(real, fake, 8, 0)
    again.set_state(position)
    np.testing.assert_array_equal(next(again)["image"], second["image"])


def test_held_out_images_are_the_same_ones_every_time_and_never_trained_on():
    source = open_source("digits")
    numbered = dataclasses.replace(
        source, images=np.arange(100, dtype=np.int32)[:, None, None, None], labels=None
    )
    (kept, out), (_, again) = split(numbered, 0.1), split(numbered, 0.1)
    assert len(out) == 10 and sorted([*kept.images.ravel(), *out.images.ravel()]) == list(
        range(100)
    )
    np.testing.assert_array_equal(out.images, again.images)
    read = dataclasses.replace(source, images=None, reader=_Digits(source))
    kept, out = split(read, 0.5)
    assert len(kept) + len(out) == len(source)
    np.testing.assert_array_equal(out[3]["image"], split(source, 0.5)[1][3]["image"])


@dataclasses.dataclass
class _Digits:
    source: object

    def __len__(self):
        return len(self.source)

    def read(self, i):
        return self.source.images[i], self.source.labels[i]

    def where(self, i):
        return f"image {i}"


# The network


def test_an_extractor_of_other_images_is_refused():
    network = ADMEncoder(
        img_resolution=16, out_channels=10, model_channels=32, channel_mult=(1,), num_blocks=1
    )
    with pytest.raises(ValueError, match="made for 16 pixels and 3 channels; expected 8 and 1"):
        build(8, 1, extractor=network)
    assert build(16, 3, extractor=network).head.img_channels == 32


def test_the_recipe_builds_the_authors_head():
    """Published sizes: 2,883,841 numbers, 3,395,841 with the table of 1,000 classes."""
    recipe = configs.load(tiny.ROOT / "configs" / "cifar10_dg.py")
    extractor = ADMEncoder(
        img_resolution=32,
        out_channels=1000,
        model_channels=128,
        channel_mult=(1, 2, 4),
        num_blocks=4,
        attn_resolutions=(32, 16, 8),
        head_channels=64,
    )
    settings = {name: getattr(recipe.network, name) for name in SETTINGS} | {"dtype": jnp.float32}
    for classes, count in ((0, 2_883_841), (1000, 3_395_841)):
        network = build(32, 3, classes, extractor, **settings)
        params, _ = jax.eval_shape(network.init, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert open_network(recipe, (32, 32, 3), 10, "")[0].extractor is None


# The loop


def test_one_command_draws_samples_trains_and_saves(trained, extractor):
    folder, run, state, lines = trained
    assert int(state.step) == 4 and any("drawing 60 samples" in line for line in lines)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"2", "4"}
    about = generated.read_origin(folder / "samples.npz")
    assert (about["solver"], about["steps"], about["nfe"], about["num"]) == ("heun", 3, 5, 60)
    drawn = generated.read(folder / "samples.npz")
    assert drawn.images.dtype == np.uint8 and set(drawn.labels) <= set(
        range(10)
    )  # both sides pass through 8 bits
    log = (folder / "metrics.jsonl").read_text()
    assert all(word in log for word in ('"accuracy"', '"held_out/loss"', '"held_out/accuracy"'))
    assert (folder / "extractor.safetensors").read_bytes() == extractor.read_bytes()
    assert run.model.label_dim == 10 and run.model.head.img_channels == 64
    assert all(leaf.shape != () for leaf in jax.tree.leaves(run.extractor))


def test_the_loss_begins_at_chance_and_only_the_head_is_trained(trained):
    _, run, _, _ = trained
    state = run.init()
    batch = next(run.batches(0, 1))
    constants = {"dg": {"extractor": run.extractor}}
    loss = training_loss(run.config, run.model, False)
    value, sums = jax.jit(lambda p: loss(p, state, constants, batch, run.key))(state.params)
    np.testing.assert_allclose(value, np.log(2), atol=0.05)
    assert set(sums) == {"loss", "accuracy"} and sums["loss"][1] == 8
    names = {p[0].key for p, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert "map_label" in names and "enc_8x8_conv" not in names  # 4x4 features come in


def test_the_log_ratio_is_of_real_to_generated(trained, monkeypatch):
    """White real images, black generated ones, and a network that says how white a noisy one is."""
    _, run, _, _ = trained
    white = lambda x, sigma, label: jnp.mean(x, (1, 2, 3))  # noqa: E731
    monkeypatch.setattr(losses, "ratio_of", lambda *_: lambda params: white)
    real = np.tile([1, 0], 200)
    image = np.broadcast_to(255 * real[:, None, None, None], (400, 8, 8, 1)).astype(np.uint8)
    batch = {"image": image, "real": real, "label": 0 * real, "index": np.arange(400)}
    loss = training_loss(run.config, run.model, False)
    constants = {"dg": {"extractor": None}}
    _, sums = jax.jit(lambda b: loss({}, None, constants, b, run.key))(batch)
    assert sums["accuracy"][0] / 400 > 0.7


def test_what_was_trained_guides_the_prior(trained, prior):
    folder, run, _, _ = trained
    model, heard = open_workdir(prior), []
    settings = model.settings(solver="heun", steps=3)
    method = open_guidance(folder, use=Use(model, settings), weight=50.0, log=heard.append)
    assert not heard and method.constants["weight"] == 50.0
    images = generate.sampler(model.model, settings, jax.devices()[:1], guidance=(method,))

    def draw(weight, label):
        chosen = dataclasses.replace(
            method, constants=method.constants | {"weight": np.float32(weight)}
        )
        parts = generate.generate(
            images, model.params, model.buffers, np.arange(4), np.full(4, label), 4, (chosen,)
        )
        return np.concatenate(list(parts))

    plain = generate.sampler(model.model, settings, jax.devices()[:1])
    expected = np.concatenate(
        list(generate.generate(plain, model.params, model.buffers, np.arange(4), np.full(4, 1), 4))
    )
    np.testing.assert_allclose(draw(0.0, 1), expected, rtol=0, atol=1e-5)
    assert np.abs(draw(50.0, 1) - expected).max() > 1e-4
    ratio = jax.jit(ratio_of(run.model, "vp")(method.constants["params"]))
    x, sigma = jnp.ones((1, 8, 8, 1)), jnp.ones((1,))
    assert ratio(x, sigma, jnp.asarray([1])) != ratio(
        x, sigma, jnp.asarray([7])
    )  # the head is told the class
    with pytest.raises(ValueError, match="expects the classes"):
        ratio(x, sigma)
    open_guidance(folder, use=Use(model, model.settings(solver="heun", steps=9)), log=heard.append)
    assert len(heard) == 1 and heard[0].endswith("differ in steps")
    other = model.settings(solver="heun", steps=3, eta=0.5, grid="vp")
    other = dataclasses.replace(other, sigma_max=50.0, rho=5.0)
    use = Use(model, other, Churn(1.0, 0.0, 9.0, 1.0), cfg=2.0)
    open_guidance(folder, use=use, log=heard.append)
    assert heard[1].endswith("differ in eta, grid, sigma_max, rho, churn, cfg")


@pytest.mark.parametrize(
    "more,words",
    [
        (("sample.steps=4",), "drawn with steps 3, now it is 4"),
        (("dg.num=50",), "drawn with num 60, now it is 50"),
        (("dg.cfg=2.0",), "drawn with cfg 1.0, now it is 2.0"),
        (("sample.shift=3.0",), "drawn with shift 1.0, now it is 3.0"),
        (("sample.start=vp",), "drawn with start 've', now it is 'vp'"),
    ],
)
def test_samples_of_another_sampler_are_refused(trained, prior, more, words):
    folder, run, _, _ = trained
    settings = config(prior, *more, f"dg.samples={folder / 'samples.npz'}")
    with pytest.raises(configs.ConfigError, match=words):
        build_run(settings, parallel.make_plan("pmap", 1), folder)


def test_samples_of_other_weights_are_refused(trained, prior):
    folder, run, _, _ = trained
    other = dataclasses.replace(
        run.prior, params=jax.tree.map(lambda p: p + 1e-6, run.prior.params)
    )
    with pytest.raises(configs.ConfigError, match="drawn with weights [0-9a-f]{12}, now it is"):
        generated.read(folder / "samples.npz", generated.origin(run.config, other, 60))


def test_folders_of_the_other_kind_are_named(trained, prior):
    with pytest.raises(
        CheckpointError, match="holds a discriminator; expected the folder of a denoiser"
    ):
        open_workdir(trained[0])
    with pytest.raises(CheckpointError, match="--dg.discriminator: .* holds no discriminator"):
        open_guidance(prior)


def test_a_conditional_discriminator_asks_for_classes(trained):
    with pytest.raises(
        ValueError, match="--label: no class given, but the discriminator is conditional"
    ):
        open_guidance(trained[0], labels=np.array([3, -1]))


@pytest.mark.fast
@pytest.mark.parametrize(
    "text,words",
    [
        ("dg.prior=", "dg.prior"),
        ("dg.prior=/no/such/run", "config.dg.prior: '/no/such/run' holds no checkpoint"),
        ("data.batch=7", "data.batch.*even"),
        ("dg.held_out=1.0", "dg.held_out"),
        ("dg.clock=sine", "dg.clock"),
        ("dg.num=1000000000", "dg.num"),
        ("dg.prior_step=x", "dg.prior_step: 'x' given; expected a number or best"),
        ("dg.prior_step=-1", "dg.prior_step"),
        ("dg.prior_step=7", "dg.prior_step: no checkpoint of step 7"),
        ("dg.cfg=3", "dg.cfg: 3.0 given; expected 1, for the prior never saw"),
        ("dg.churn=40,nan,50,1", "config.dg.churn: '40,nan,50,1' given"),
        ("dg.time_min=1.0", "dg.time_min: 1.0 given; expected less than dg.time_max"),
        ("dg.samples=x.txt", "dg.samples: 'x.txt' given; expected FILE.npz"),
        ("dg.samples=folder", "dg.samples: 'folder' given; expected FILE.npz"),
        ("dg.samples=/proc/x.npz", "^config.dg.samples: '/proc/x.npz' "),
        ("network.model_channels=8", "network.model_channels: 8 given .* divide into 32 groups"),
        ("evaluate.features=digits data.channels=3", "evaluate.features: 'digits' given; expected"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path, prior, text, words):
    with pytest.raises(ValueError, match=words) as error:
        build_run(config(prior, *text.split()), parallel.make_plan("pmap", 1), tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "samples.npz").exists()


@pytest.mark.fast
@pytest.mark.parametrize(
    "trained_with,settings,report,given,solver,weight,said",
    [
        ("euler", (), 2.0, {"corrector_weight": 1.0}, "heun", 3.0, "is 3, which acts alike"),
        ("euler", (), 2.0, {}, "heun", 4.0, "is 4, which acts alike"),
        (
            "heun",
            ("dg.corrector_weight=1.0", "dg.weights=(9.0,)"),
            2.0,
            {},
            "euler",
            1.5,
            "is 1.5, which acts alike",
        ),
        ("ddim", ("dg.weight=1.0",), None, {}, "heun", None, "weight 1 was given for 'ddim'"),
        ("ddim", ("dg.weight=1.0",), None, {}, "euler", None, ""),
        ("ddim", ("dg.weight=1.0",), None, {"weight": 3.0}, "heun", 3.0, ""),
    ],
)
def test_weights_follow_the_solver(trained_with, settings, report, given, solver, weight, said):
    """What acts is the mean of Heun's two weights: of 3 and 1 it is the 2 that was found."""
    settings = settings or ("dg.weights=(9.0,)",)
    words, heard = config("x", f"sample.solver={trained_with}", *settings), []
    report = {} if report is None else {"weight": report}
    found = guiding._chosen(words, report, "", given, solver, heard.append)
    assert found.get("weight") == weight and len(heard) == bool(said)
    assert all(said in line for line in heard)


@pytest.mark.fast
def test_a_discriminator_of_other_images_is_refused():
    config_ = config("x", "data.conditional=true")
    of_latents = {"latents": dataclasses.asdict(Latents((8, 8, 1)))}
    snapshot = lambda shape, classes, data: Snapshot(
        config_, shape, classes, 0, epath.Path(), "", data
    )
    model = types.SimpleNamespace(image_shape=(8, 8, 1), label_dim=10, latents=None, text=None)
    check = lambda *about, labels=None, **more: guiding._check_fits(
        "w",
        snapshot(*about),
        Use(types.SimpleNamespace(model=types.SimpleNamespace(**vars(model) | more)), Sample()),
        labels,
    )
    for about, more, sentence in (
        (
            ((16, 16, 1), 10, {}),
            {},
            r"'w' is for images \(16, 16, 1\), the model's are \(8, 8, 1\)",
        ),
        (((8, 8, 1), 13, {}), {}, "is for 13 classes, the model has 10"),
        (((8, 8, 1), 10, {}), {"label_dim": 0}, "is for 10 classes, the model has 0"),
        (((8, 8, 1), 10, of_latents), {}, r"\(latents in one and pixels|pixels in one and latents"),
    ):
        with pytest.raises(configs.ConfigError, match=sentence):
            check(*about, **more)
    with pytest.raises(configs.ConfigError, match="--guidance: dg given for a model of texts"):
        check((8, 8, 1), 10, {}, text="CLIP", labels={"prompt": np.zeros((2, 77), np.int32)})
    check((8, 8, 1), 10, {})
    check((8, 8, 1), 10, {}, label_dim=0, labels=np.zeros(2, np.int32))  # a classifier's classes


def test_evaluations_choose_checkpoint_and_weight_by_distance(trained, prior):
    folder, _, _, lines = trained
    reports = {r["step"]: r for r in json.loads((folder / "evaluations.json").read_text())}
    assert set(reports) == {2, 4} and all(
        r["weight"] in (2.0, 50.0) and r["unguided"] > 0 for r in reports.values()
    )
    assert reports[2]["unguided"] == reports[4]["unguided"]
    best = min(reports.values(), key=lambda r: r["fd"])
    assert open_guidance(folder).constants["weight"] == np.float32(best["weight"])
    assert open_guidance(folder, weight=0.3).constants["weight"] == np.float32(0.3)
    assert open_guidance(folder, preset="second").constants["corrector_weight"] == 1.0
    assert any("unguided" in line for line in lines)
    heard = []
    model = open_workdir(prior)
    for solver in ("euler", "ddim", "ancestral", "spndm", "dpmpp_2m"):
        use = Use(model, model.settings(solver=solver, steps=3))
        opened = lambda use=use, **more: open_guidance(folder, use=use, log=heard.append, **more)
        assert opened().constants["weight"] == np.float32(best["weight"] / 2)
        assert f"weight {best['weight']:g} is for 'heun'; with {solver!r} it is" in heard[0]
        assert opened(preset="cifar10").constants["weight"] == 1.0
        heard.clear()
        assert opened(preset="second").constants["weight"] == 1.0
        assert opened(weight=2.0).constants["weight"] == 2.0  # what is said stays
        assert not any("acts alike" in line for line in heard)
        heard.clear()
    with pytest.raises(configs.ConfigError, match="--dg.time_min, --dg.time_max: 0.99 and 1 given"):
        opened(time_min=0.99)
    with pytest.raises(configs.ConfigError, match="--dg.boost_churn: 3 given without boosting"):
        opened(boost_churn=3.0)
    assert (
        json.loads((folder / "evaluation.json").read_text()) == reports[4]
    )  # with its weight, whichever came last


def test_only_the_winning_weight_is_written(trained, monkeypatch, tmp_path):
    _, run, state, _ = trained
    changed = configs.replace(run.config, {"dg.weight": 3.0, "dg.weights": (1.0, 2.0)})
    run = dataclasses.replace(run, config=changed)
    monkeypatch.setattr(
        evaluate,
        "distance_report",
        lambda space, images, real: {"fd": float(images[0, 0, 0, 0] != 50)},
    )

    def draw(self, params, buffers, guidance):
        weight = guidance[-1].constants["weight"]
        return np.full((70, 8, 8, 1), int(50 * weight), np.uint8)

    monkeypatch.setattr(evaluate.Evaluator, "_space", None)
    monkeypatch.setattr(evaluate.Evaluator, "_reference", None)
    monkeypatch.setattr(evaluate.Evaluator, "samples", draw)
    report = GuidedEvaluation(run, tmp_path)(state)
    assert (report["weight"], report["fd"], report["unguided"]) == (1.0, 0.0, 1.0)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    with Image.open(tmp_path / "samples.png") as picture:
        assert 50 in np.asarray(picture)


def test_a_resumed_run_goes_on_bit_for_bit(trained, prior, extractor, tmp_path):
    folder, run, state, _ = trained
    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "4")  # as if it had been killed after step 2
    more = (f"dg.extractor={extractor}", "data.conditional=true", "dg.weights=(50.0,)")
    lines: list[str] = []
    resumed, last = loop.train(config(prior, *more), again, lines.append, TASK)
    assert any("resumed from step 2" in line for line in lines) and not any(
        "drawing" in line for line in lines
    )
    tiny.assert_trees(resumed.plan.local_copy(last), run.plan.local_copy(state))


@pytest.mark.slow_cases("mesh", "pmap")
@pytest.mark.parametrize("plan", ["pmap", "mesh"])
def test_four_devices_train_as_one(trained, prior, plan):
    folder, run, _, _ = trained
    more = (
        f"dg.samples={folder / 'samples.npz'}",
        f"dg.extractor={folder / 'extractor.safetensors'}",
    )
    settings = config(prior, *more, "data.conditional=true", "parallel.devices=0")

    def two_steps(run):
        state = run.init()
        step, constants, batches = run.compile(state), run.constants(), run.batches(0, 1)
        for _ in range(2):
            state, metrics = step(state, constants, run.plan.place_batch(next(batches)), run.key)
        return run.plan.local_copy(state.params), {
            k: float(np.asarray(v)) for k, v in metrics.items()
        }

    one, expected = two_steps(run)
    many, found = two_steps(build_run(settings, parallel.make_plan(plan, 4), folder))
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, err_msg=name)
    # Adam makes a full step of a gradient that is float noise (biases in front of a norm): typical
    # weights must agree.
    away = [
        np.abs(np.asarray(a) - np.asarray(b))
        for a, b in zip(*map(jax.tree.leaves, (one, many)), strict=True)
    ]
    assert np.median([a.mean() for a in away]) < 1e-5 and max(a.max() for a in away) < 2.1e-3


@pytest.mark.slow_cases("1", "2")  # output.Output goes on: test_output.py
@pytest.mark.parametrize("stop", [1, 2])
def test_samples_of_a_run_that_was_stopped_are_kept(prior, tmp_path, monkeypatch, stop):
    """Drawn once, whenever it was stopped: the file is that of a run that was not."""
    settings, model, real = config(prior, "dg.num=600"), open_workdir(prior), open_source("digits")
    devices = jax.devices()[:1]
    draw = lambda name: generated.draw_or_read(
        settings, model, real, 600, epath.Path(tmp_path / name), devices, lambda line: None
    )
    draw("whole.npz")
    whole, added = output.Output.add, []

    def add(self, start, images):
        if len(added) == stop:
            raise KeyboardInterrupt
        added.append(start)
        whole(self, start, images)

    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "add", add)
        with pytest.raises(KeyboardInterrupt):
            draw("parted.npz")
    other = configs.replace(settings, {"sample.steps": 4})
    with pytest.raises(output.OutputError, match="drawn with steps 3, now it is 4; .*that .*parts"):
        path = epath.Path(tmp_path / "parted.npz")
        generated.draw_or_read(other, model, real, 600, path, devices, lambda line: None)
    added.clear()
    add = lambda self, *a: (added.append(a[0]), whole(self, *a))
    monkeypatch.setattr(output.Output, "add", add)
    draw("parted.npz")
    assert added == [0, 256, 512][stop:]
    assert (tmp_path / "parted.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"parted.npz", "whole.npz"}


def test_samples_have_the_classes_of_the_real_images_as_often(prior, tmp_path, monkeypatch):
    """A discriminator without labels must not learn how often a class is; files that do not say
    whose labels they have are taken, as runs have begun with them.
    """
    images = np.zeros((60, 8, 8, 1), np.uint8)
    labels = np.array([0] * 50 + [3] * 9 + [9])
    real, path = from_arrays("rare", images, labels), epath.Path(tmp_path / "x.npz")
    seen = []

    def batches(self, settings, seeds, labels, **more):
        seen.append(labels)
        yield np.zeros((len(seeds), 8, 8, 1), np.float32)

    monkeypatch.setattr(TrainedModel, "batches", batches)
    how = config(prior), open_workdir(prior), real, 120, path, jax.devices()[:1], lambda line: None
    drawn = generated.draw_or_read(*how)
    np.testing.assert_array_equal(drawn.labels, seen[0])
    assert np.bincount(drawn.labels).tolist() == [100, 0, 0, 18, 0, 0, 0, 0, 0, 2]
    columns = dict(np.load(path))
    about = json.loads(str(columns.pop("about")))
    assert about.pop("conditions")
    np.savez(path, about=json.dumps(about), **columns)
    assert len(generated.draw_or_read(*how)) == 120


def test_samples_that_are_not_finite_are_refused(prior, tmp_path):
    model = open_workdir(prior)
    broken = dataclasses.replace(
        model, params=jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    )
    path, real = epath.Path(tmp_path / "x.npz"), open_source("digits")
    for _ in range(2):  # and so the second time
        with pytest.raises(output.OutputError, match="^config.dg.samples: 60 of 60 images are not"):
            generated.draw_or_read(config(prior), broken, real, 60, path, jax.devices()[:1])
        assert not path.exists()


GOOD = {
    "image": np.zeros((6, 8, 8, 1), np.uint8),
    "label": np.zeros(6, np.int32),
    "about": '{"num": 6}',
}


@pytest.mark.parametrize(
    "change",
    [
        {"image": np.zeros((6, 8, 8, 1))},
        {"image": np.zeros((6, 8, 8), np.uint8)},
        {"image": np.array(3)},
        {"label": np.zeros(5, np.int32)},
        {"label": np.zeros(6)},
        {"label": np.zeros((6, 2), np.int32)},
        {"about": "no json"},
        {"about": "[1]"},
        {"about": "7"},
        {"about": '{"num": 7}'},
        {"about": np.zeros(3)},
        {"about": None},
        {"image": None},
        {"image": np.array([{"a": 1}], object)},
    ],
    ids=str,
)
def test_files_of_samples_that_are_none_are_refused(tmp_path, change):
    path = epath.Path(tmp_path / "x.npz")
    np.savez(path, **{k: v for k, v in (GOOD | change).items() if v is not None})
    with pytest.raises(ValueError, match="^config.dg.samples: .*x.npz ") as error:
        generated.read(path, {"num": 6})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"<html>", "npy", "cut", "bits"]
)
def test_damaged_files_of_samples_are_refused(tmp_path, content):
    path = epath.Path(tmp_path / "x.npz")
    np.savez_compressed(path, **GOOD)
    whole = path.read_bytes()
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content == "cut":
        path.write_bytes(whole[:-30])
    elif content == "bits":
        path.write_bytes(whole[:60] + bytes(b ^ 0xFF for b in whole[60:70]) + whole[70:])
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="^config.dg.samples: .*x.npz "):
        generated.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="^config.dg.samples: .*x.npz "):
        generated.read(path)
