"""Classifier guidance against Bayes' rule, the released recursion and the released classifier, and
by the command line.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ogdm_jax import config as configs
from ogdm_jax import parallel
from ogdm_jax.cli import guidance as words_of
from ogdm_jax.cli import sample as command
from ogdm_jax.config import ConfigError
from ogdm_jax.diffusion import grids, precondition
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.discriminator import generated
from ogdm_jax.discriminator import run as discriminator
from ogdm_jax.interop import export, from_torch
from ogdm_jax.methods import cfg, classifier, dg
from ogdm_jax.networks import ADMEncoder
from ogdm_jax.sampling import guidance as parts
from ogdm_jax.sampling.sampler import sample
from ogdm_jax.training.workdir import open_workdir
from tests.reference.gaussian import Chain
from tests.support import golden_support, networks, tiny
from tests.support.commands import ogdm
from tests.support.oracles import column, two_bumps

DATA = two_bumps()
ADM = (
    *("network.kind=openai", "network.model_channels=32", "network.channel_mult=(1,)"),
    *("network.attn_resolutions=()", "precondition.kind=adm", "noise.distribution=ddpm"),
    *("precondition.learned_variance=true", "data.augment=0", "methods=()"),
)


def bayes(x, sigma, label):
    """log p(component | x) of the mixture."""
    logs = jax.nn.log_softmax(DATA._parts(x, sigma)[0], axis=1)
    return jnp.take_along_axis(logs, label[:, None], axis=1)[:, 0]


@pytest.mark.fast
def test_an_exact_classifier_makes_the_unconditional_denoiser_conditional():
    """E[x0 | x, y] by Bayes' rule; the window leaves the other levels alone."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (6, 2, 2, 1), jnp.float64)
        sigma, label = jnp.asarray([0.05, 0.3, 0.8, 1.0, 3.0, 20.0]), jnp.arange(6) % 3
        x = x * column(sigma, x)
        means = DATA._parts(x, sigma)[1]
        conditional = means[jnp.arange(6), label]

        def under(guidance):
            return parts.combine(guidance).transform(Denoiser(DATA.denoise))(x, sigma, label)

        np.testing.assert_allclose(under(classifier.guidance(bayes)), conditional, atol=1e-6)
        once, twice = under(classifier.guidance(bayes)), under(classifier.guidance(bayes, 2.0))
        plain = DATA.denoise(x, sigma)
        np.testing.assert_allclose(twice - plain, 2 * (once - plain), atol=1e-6)
        windowed = under(classifier.guidance(bayes, window=(0.2, 2.0)))
        inside = column(np.array([0, 1, 1, 1, 0, 0]), x) > 0
        np.testing.assert_allclose(windowed, jnp.where(inside, once, plain), atol=1e-6)


@pytest.mark.fast
def test_no_class_has_no_gradient():
    logits = lambda x, t: jnp.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], -1)
    log_prob = classifier.log_probability(logits, Discrete.make())
    x, label = jnp.zeros((3, 2, 2, 1)), jnp.asarray([0, 1, -1])
    grad = jax.grad(lambda x: log_prob(x, jnp.full(3, 1e-3), label).sum())(x)
    np.testing.assert_allclose(grad[:, 0, 0, 0], [1, -1, 0], rtol=1e-5)


@pytest.mark.parametrize("rule,solver", [("score", "heun"), ("mean", "ancestral")])
def test_samples_are_of_the_class(rule, solver):
    grid = grids.edm(200, 0.01, 20.0)

    @jax.jit
    def draw(z, label):
        guidance = classifier.guidance(bayes, rule=rule)
        key = jax.random.key(1)
        return sample(DATA.denoise, z, grid, solver, key=key, label=label, guidance=guidance)

    z = jax.random.normal(jax.random.key(0), (3000, 2, 2, 1))
    drawn = draw(z, jnp.full(3000, 1))
    np.testing.assert_allclose(drawn.mean(0), DATA.mu[1], atol=0.06)
    np.testing.assert_allclose(drawn.std(0).mean(), DATA.scales[1], rtol=0.06)


def test_a_whole_ancestral_chain_is_the_released_one():
    """`p_sample_loop` with cond_fn, clamped: 20 kept steps, with the classifier asked at the
    original times. (tests/golden: each step against the released numbers.)
    """
    eps = lambda x, t, label=None: 0.4 * x + 0.3 * jnp.sin(2 * x + column(t, x) / 300)
    chain = Chain.make("linear", 1000, "20", variance="small")
    bend = jnp.asarray([[0.5, -0.7]])

    def logits(x, t):
        return jnp.sum(jnp.sin(x), (1, 2, 3))[:, None] * bend * (1 + t[:, None] / 1000)

    def gradient(x, t):
        log = lambda x: jax.nn.log_softmax(logits(x, t.astype(x.dtype)))[:, 1].sum()
        return 3 * jax.grad(log)(x)

    noise = jax.random.normal(jax.random.key(1), (20, 2, 3, 3, 1))
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
    levels = np.append(chain.table.sigma[::-1], 0.0)
    log_prob = classifier.log_probability(logits, chain.table)
    got = sample(
        precondition.adm(eps, chain.table),
        x * np.sqrt(1 + levels[0] ** 2) / levels[0],
        levels,
        "ancestral",
        label=jnp.ones(2, jnp.int32),
        guidance=classifier.guidance(log_prob, 3.0, rule="mean"),
        noise_fn=lambda step: noise[step],
        clip=True,
    )
    step = jax.jit(lambda x, t, z: chain.p_sample(eps, x, t, z, gradient=gradient))
    for i, t in enumerate(range(19, -1, -1)):
        x = step(x, jnp.full(2, t), noise[i])
    np.testing.assert_allclose(got, x, atol=1e-3)


def test_the_released_classifiers_gradient_in_our_coordinate():
    golden = golden_support.load(str(golden_support.FOLDER / "gd_classifier_a.npz"))
    hidden = {"img_resolution": 16, "head_channels": 16}
    network, variables = from_torch(golden.state_dict(), "adm_encoder", **hidden)
    table = Discrete.make()
    sigma = jnp.asarray(table.sigma[golden["timesteps"]], jnp.float32)
    x = jnp.asarray(golden_support.nhwc(golden["x"]))
    x = x * jnp.sqrt(1 + column(sigma, x) ** 2)
    log_prob = classifier.log_probability(lambda x, t: network.apply(variables, x, t), table)
    grad = jax.jit(jax.grad(lambda x: log_prob(x, sigma, jnp.asarray(golden["y"])).sum()))(x)
    at_vp = grad * jnp.sqrt(1 + column(sigma, grad) ** 2)
    golden.assert_close("grad_log_prob", golden_support.nchw(at_vp))


@pytest.mark.fast
def test_the_mean_is_shifted_in_ancestral_steps_only_and_dg_comes_last():
    z, grid = jnp.zeros((1, 2, 2, 1)), np.array([1.0, 0.5, 0.0])
    by_mean = classifier.guidance(bayes, rule="mean")
    for solver in ("heun", "ddim", "euler"):
        with pytest.raises(ValueError, match="expected solver 'ancestral', or rule 'score'"):
            sample(DATA.denoise, z, grid, solver, guidance=by_mean)
    several = [dg.guidance(bayes, boost=dg.Boost()), classifier.guidance(bayes), cfg.guidance()]
    for order in (several, several[::-1]):
        names = [method.name for method in parts.combine(order).transforms]
        assert names == ["cfg", "classifier", "dg"]


# -- the command line


def save(folder, *more):
    return tiny.folder(folder, tiny.build(*ADM, *more))


def write_classifier(path, classes=10, side=8, label_dim=0):
    """A classifier in the released layout, whose heads have 64 channels."""
    network = ADMEncoder(
        side, 1, classes, label_dim, 64, (1,), num_blocks=1, attn_resolutions=(), head_channels=64
    )
    label = jnp.zeros(1, jnp.int32) if label_dim else None
    image = jnp.zeros((1, side, side, 1))
    shapes = jax.eval_shape(network.init, jax.random.key(0), image, jnp.zeros(1), label)
    variables = networks.born(shapes)
    save_file({n: np.asarray(v) for n, v in export.to_torch(network, variables).items()}, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder: an unconditional and a conditional ADM model, classifiers, a discriminator."""
    folder = tmp_path_factory.mktemp("classifier")
    save(folder / "plain")
    save(folder / "classes", "data.conditional=true")
    write_classifier(folder / "c.safetensors")
    write_classifier(folder / "large.safetensors", side=16)
    write_classifier(folder / "seven.safetensors", classes=7)
    write_classifier(folder / "head.safetensors", classes=1, label_dim=10)
    more = ("network.channel_mult=(1,)", "network.attn_resolutions=()", "dg.num=4")
    more += (f"dg.prior={folder / 'plain'}", "sample.solver=ddim", "sample.grid=ddim")
    more += ("sample.steps=2", "evaluate.features=", "evaluate.every=0 steps")
    settings = configs.load(tiny.ROOT / "configs" / "digits_dg.py", more)
    about = json.dumps(generated.origin(settings, discriminator.open_prior(settings), 4))
    (folder / "judge").mkdir()
    pictures = {"image": np.zeros((4, 8, 8, 1), np.uint8), "label": np.full(4, -1)}
    np.savez(folder / "judge" / "samples.npz", about=about, **pictures)
    judged = discriminator.build(settings, parallel.make_plan("pmap", 1), folder / "judge")
    tiny.folder(folder / "judge", judged)
    return folder


def drawn(place, *words):
    done = ogdm(place, "sample", "--devices", "1", "--num", "4", "--out", "x.npz", *words)
    assert done.returncode == 0, done.stderr
    with np.load(place / "x.npz") as archive:
        return archive["images"].astype(int), archive.get("labels"), done.stdout


def test_commands_draw_images_of_a_class(place):
    """By the released rule and beside a discriminator; classes of an unconditional model are the
    classifier's.
    """
    guided = ("--guidance", "classifier", "--classifier.checkpoint", "c.safetensors")
    preset = ("--workdir", "plain", "--preset", "adm256_unconditional", "--steps", "2")
    words = (*guided, *preset, "--label", "3")
    images, labels, said = drawn(place, *words)
    assert "(ancestral, 2 steps, class 3)" in said and (labels == 3).all()
    stronger, _, _ = drawn(place, *words, "--classifier.scale", "1e5", "--overwrite")
    assert np.abs(stronger - images).max() > 2
    both = ("--guidance", "classifier,dg", "--dg.discriminator", "judge", *guided[2:])
    sampler = ("--solver", "ddim", "--grid", "ddim", "--steps", "2", "--overwrite")
    _, labels, _ = drawn(place, "--workdir", "plain", *both, *sampler)
    assert len(set(labels.tolist())) > 1 and (labels < 10).all()


def test_the_preset_is_the_released_command(place):
    words = ["--workdir", str(place / "plain"), "--guidance", "classifier", "--preset", "adm512"]
    words += ["--classifier.checkpoint", str(place / "c.safetensors"), "--label", "1"]
    plan = command.read(command.parser().parse_args(words))
    settings = plan.settings
    assert (settings.solver, settings.steps, settings.grid) == ("ancestral", 250, "respaced")
    assert settings.clip and settings.variance == "auto"
    (method,) = plan.guided.guidance
    assert method.shift is not None and method.constants["scale"] == 4.0
    plan = command.read(command.parser().parse_args([*words, "--solver", "ddim", "--no-clip"]))
    (method,) = plan.guided.guidance
    assert method.shift is None and method.denoiser is not None and not plan.settings.clip


@pytest.mark.parametrize(
    "model,words,sentence",
    [
        ("plain", "", "--classifier.checkpoint: not given"),
        ("plain", "nowhere.pt", "nowhere.pt"),
        ("plain", "large.safetensors", r"is for images \(16, 16, 1\), the model's are \(8, 8, 1\)"),
        ("classes", "seven.safetensors", "knows 7 classes, the model 10"),
        ("plain", "head.safetensors", "holds the head of a discriminator"),
        ("classes", "c.safetensors --label -1", "the images have no class"),
        ("plain", "c.safetensors --label 10", "expected 0 to 9"),
        ("plain", "c.safetensors --classifier.scale 0", "a positive number"),
        ("plain", "c.safetensors --classifier.window 3,1", "LOW < HIGH"),
        ("plain", "c.safetensors --classifier.window 1e5,1e6", "where no step of this grid lies"),
        ("plain", "c.safetensors --classifier.schedule sin", "model, linear, cosine"),
        ("plain", "c.safetensors --classifier.rule both", "auto, score, mean"),
        ("plain", "c.safetensors --solver ddim --classifier.rule mean", "solver 'ancestral'"),
    ],
)
def test_mistakes_are_one_sentence(place, monkeypatch, model, words, sentence):
    monkeypatch.chdir(place)
    checkpoint, *more = words.split() or [""]
    given = ["--classifier.checkpoint", checkpoint] if checkpoint else []
    argv = ["--workdir", model, "--guidance", "classifier", *given, *more, "--steps", "4"]
    with pytest.raises(ValueError, match=sentence) as error:
        command.read(command.parser().parse_args(argv))
    assert "\n" not in str(error.value)


def test_a_model_without_steps_needs_the_classifiers_schedule(place, tmp_path):
    tiny.folder(tmp_path, tiny.build("methods=()", tiny.ONE_LEVEL, "network.attn_resolutions=()"))
    run, path = open_workdir(tmp_path), str(place / "c.safetensors")
    words = ["--workdir", "w", "--guidance", "classifier", "--classifier.checkpoint", path]

    def build(*more: str) -> words_of.Guided:
        args: argparse.Namespace = command.parser().parse_args([*words, *more])
        return words_of.build(words_of.read(args), run, run.settings(), np.arange(2), label=1)

    with pytest.raises(ConfigError, match=r"expected linear, or cosine \(64x64_classifier.pt\)"):
        build()
    assert build("--classifier.schedule", "cosine").guidance[0].name == "classifier"
