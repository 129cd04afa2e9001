"""Clipped sampling, and the samplers that published discrete models were drawn with, by the words of
a command: guided-diffusion's DDIM and DDPM with clip_denoised, and the released S- and F-PNDM.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import models
from ogdm_jax.cli import prompts
from ogdm_jax.cli import sample as command
from ogdm_jax.cli.options import refuse_former
from ogdm_jax.config import ConfigError, Sample
from ogdm_jax.diffusion import grids, precondition, process
from ogdm_jax.methods import apg, autoguidance, cfg, dg
from ogdm_jax.sampling import discrete, generate
from ogdm_jax.sampling.sampler import sample, step_noise
from ogdm_jax.training.workdir import TrainedModel
from tests.reference.gaussian import Chain
from tests.support import golden_support, tiny
from tests.support.oracles import Gaussian, column

ADM = ("precondition.kind=adm", "data.augment=0", tiny.ONE_LEVEL)
RESCALED = (*ADM, "precondition.rescale_timesteps=true", "precondition.diffusion_steps=40")


class Bend(nn.Module):
    """A network of two numbers: eps that bends, depends on the time, and leaves [-1, 1]."""

    @nn.compact
    def __call__(self, x, c_noise, label=None):
        a, b = (self.param(name, nn.initializers.constant(0.6), ()) for name in "ab")
        return a * jnp.sin(3 * x) + b * jnp.cos(column(c_noise, x) / 300)


@pytest.fixture(scope="module")
def trained():
    config = tiny.config(*RESCALED)
    model = dataclasses.replace(models.build(config, (4, 4, 1), 0), network=Bend())
    params = Bend().init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))["params"]
    return TrainedModel(config, model, params, {}, 0)


def eps_of(trained):
    def eps(x, t):
        return trained.model.network.apply({"params": trained.params}, x, t)[..., :1]

    return eps


@pytest.mark.parametrize("kind", ["ddim", "ancestral"])
def test_a_command_clips_as_guided_diffusion(trained, kind):
    """Every step of `ddim_sample` and `p_sample` with clip_denoised, in x_vp, by the chain."""
    settings = trained.settings(solver=kind, steps=40, grid="respaced", clip=True)
    seeds = np.arange(3)
    got = np.concatenate(list(trained.batches(settings, seeds)))
    loose = dataclasses.replace(settings, clip=False)
    assert np.abs(np.concatenate(list(trained.batches(loose, seeds))) - got).max() > 0.05
    assert np.abs(got).max() <= 1

    z, keys = generate.seed_noise(jnp.asarray(seeds, jnp.uint32), (4, 4, 1))
    chain = Chain.make("linear", 40, rescale=True, variance="small")
    top = chain.table.sigma[-1]
    x, model = z * top / np.sqrt(1 + top**2), eps_of(trained)
    for i, t in enumerate(range(39, -1, -1)):
        at = jnp.full(3, t)
        if kind == "ddim":
            x = chain.ddim_sample(model, x, at)
        else:
            x = chain.p_sample(model, x, at, step_noise(keys, z)(jnp.int32(i)))
    np.testing.assert_allclose(got, x, atol=2e-3)


@pytest.mark.parametrize("solver", ["spndm", "fpndm"])
def test_the_released_pndm_is_a_grid(trained, solver):
    """The network is asked at the released times (halves too), in the words that it was told."""
    order, asked = generate.ORDERS[solver], []
    settings = trained.settings(solver=solver, steps=8, grid="pndm")
    got = np.concatenate(list(trained.batches(settings, np.arange(3))))
    z, _ = generate.seed_noise(jnp.arange(3, dtype=jnp.uint32), (4, 4, 1))
    eps = eps_of(trained)

    def model(x, t):
        asked.append(t)
        return eps(x, 25.0 * t)

    with jax.disable_jit():
        want = discrete.pndm(model, z, 8, trained.model.table, order)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
    assert len(asked) == (9 if order == 2 else 17)
    assert any(float(t[0]) % 1 for t in asked) == (order == 4)
    levels = generate.noise_levels(trained.model, settings)
    assert levels[-1] == trained.model.table.sigma[0] and levels[0] == trained.model.table.sigma[36]


@pytest.mark.parametrize("start,end", [("vp", "first"), ("ve", "first"), ("vp", "zero")])
def test_a_state_of_another_scale_starts_and_ends_as_ddim_is_released(trained, start, end):
    """In x_vp, from eps itself (vp) or from sigma eps (ve), to the first step's level or to zero."""
    settings = trained.settings(solver="ddim", steps=4, grid="leading", start=start, end=end)
    got = np.concatenate(list(trained.batches(settings, np.arange(3))))
    x, _ = generate.seed_noise(jnp.arange(3, dtype=jnp.uint32), (4, 4, 1))
    bar, steps = trained.model.table.alpha_bar, [31, 21, 11, 1]
    x = x * np.sqrt(1 - bar[31]) if start == "ve" else x
    ends = [*bar[steps[1:]], bar[0] if end == "first" else 1.0]
    for t, after in zip(steps, ends, strict=True):
        eps = eps_of(trained)(x, jnp.full(3, 25.0 * t))
        x0 = (x - np.sqrt(1 - bar[t]) * eps) / np.sqrt(bar[t])
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * eps
    np.testing.assert_allclose(got, x, atol=1e-4 * np.abs(x).max())


PUBLISHED = {  # of OGDM-ADM's figures: the words that configs/cifar10_adm.py gives, by golden name
    "ddim10_uniform": "--solver ddim --grid ddim --steps 10 --clip",
    "ddim20_quad": "--solver ddim --grid quad --steps 20 --clip",
    "ddim20_uniform": "--solver ddim --grid ddim --steps 20 --clip",
    "S-PNDM9": "--solver spndm --grid pndm --steps 9 --no-clip",
    "F-PNDM11": "--solver fpndm --grid pndm --steps 11 --no-clip",
}


class Golden(nn.Module):
    """The network of the golden file."""

    @nn.compact
    def __call__(self, x, c_noise, label=None):
        m = GOLDEN.config["eps_model"]
        return m["a"] * x + m["b"] * jnp.sin(x + m["c"] * column(c_noise, x))


GOLDEN = golden_support.load(str(golden_support.FOLDER / "ogdm_adm_samplers.npz"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_commands_draw_what_the_released_code_draws(name, monkeypatch):
    """The numbers of the released code, by the words of a command. Only the first state differs: of
    variance 1 - alpha_bar there and 1 here.
    """
    latents = golden_support.nhwc(GOLDEN["xT"])
    shape = latents.shape[1:]
    config = tiny.config("precondition.kind=adm", "data.augment=0", "sample.clip=true")
    model = dataclasses.replace(models.build(config, (*shape[:2], 3), 0), network=Golden())
    trained = TrainedModel(config, dataclasses.replace(model, image_shape=shape), {}, {}, 0)
    monkeypatch.setattr(prompts, "open_workdir", lambda *_, **__: trained)
    argv = [
        "--workdir",
        "w",
        "--devices",
        "1",
        "--num",
        str(len(latents)),
        *PUBLISHED[name].split(),
    ]
    plan = command.read(command.parser().parse_args(argv))

    with jax.enable_x64(True):
        top = generate.noise_levels(model, plan.settings)[0]
        factor = 1.0 if "PNDM" in name else np.sqrt(1 + top**2) / top
        start = factor * latents.astype(np.float64)
        monkeypatch.setattr(generate, "seed_noise", lambda seeds, _: (jnp.asarray(start), None))
        images = trained.batches(plan.settings, plan.seeds, devices=jax.devices()[:1])
        drawn = np.concatenate(list(images))
    truth = GOLDEN[f"x_{name}"]
    np.testing.assert_allclose(golden_support.nchw(drawn), truth, atol=2e-5 * np.abs(truth).max())
    assert abs(factor - 1) < 1e-3


def test_the_fixed_variances_are_words_of_a_command(trained):
    """DDPM with the variance that OGDM-ADM's models had, `fixed_large`, against the chain."""
    settings = trained.settings(solver="ancestral", steps=40, grid="respaced", variance="large")
    seeds = np.arange(3)
    got = np.concatenate(list(trained.batches(settings, seeds)))
    z, keys = generate.seed_noise(jnp.asarray(seeds, jnp.uint32), (4, 4, 1))
    chain = Chain.make("linear", 40, rescale=True, variance="large")
    top = chain.table.sigma[-1]
    x, model = z * top / np.sqrt(1 + top**2), eps_of(trained)
    for i, t in enumerate(range(39, -1, -1)):
        x = chain.p_sample(model, x, jnp.full(3, t), step_noise(keys, z)(jnp.int32(i)), False)
    np.testing.assert_allclose(got, x, atol=2e-3 * np.abs(x).max())
    for words, sentence in (
        ({"solver": "ancestral", "variance": "learned"}, "expected small, large or diffusion"),
        ({"solver": "ddim", "variance": "large"}, "'large' given; expected auto but with ancest"),
        ({"solver": "ancestral", "variance": "lagre"}, "did you mean large"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            trained.settings(**words, grid="respaced", steps=8)


def test_grids_of_the_released_samplers_refuse_what_they_do_not_use(trained):
    for words, sentence in (
        ({"solver": "heun"}, "sample.solver: 'heun' given; expected spndm or fpndm"),
        ({"solver": "spndm", "clip": True}, "sample.clip: True given; expected False with the"),
        ({"solver": "spndm", "steps": 1}, "at least 2"),
        ({"solver": "fpndm", "steps": 40}, "expected from 4 to 39 steps"),
    ):
        with pytest.raises(ConfigError, match=sentence) as error:
            trained.settings(**({"steps": 8} | words), grid="pndm")
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cfg given with the grid 'pndm'"):
        settings = trained.settings(solver="spndm", steps=8, grid="pndm")
        generate.sampler(trained.model, settings, jax.devices()[:1], guidance=[cfg.guidance(2.0)])
    edm = models.build(tiny.config(tiny.ONE_LEVEL), (4, 4, 1), 0)
    with pytest.raises(ConfigError, match="grid: 'pndm' given.*not a discrete one"):
        generate.check_settings(Sample(grid="pndm", solver="spndm"), edm)


def test_the_words_of_the_command_reach_the_sampler():
    parse = command.parser().parse_args
    at = lambda *words: parse(["--workdir", "w", *words]).clip
    assert (at(), at("--clip"), at("--no-clip")) == (None, True, False)
    for word in command.parser()._option_string_actions:
        refuse_former([word])  # no option is refused as one of before


def test_slopes_follow_the_clamped_image():
    """eps is re-derived from x0_hat, for x0_hat far outside: DDIM's step of a clamped denoiser."""
    data = Gaussian(0.0, 5.0)
    z = 3 * jax.random.normal(jax.random.key(0), (4, 3, 3, 1))
    sigmas = np.array([2.0, 1.0])
    x = z * 2.0
    x0 = jnp.clip(data.denoise(x, jnp.full(4, 2.0)), -1, 1)
    for solver in ("euler", "ddim"):
        got = sample(data.denoise, z, sigmas, solver, clip=True)
        np.testing.assert_allclose(got, x0 + (x - x0) / 2, atol=1e-5)
    table = process.Discrete.make()
    eps = lambda x, t, label=None: -0.3 * x
    clipped = precondition.adm(eps, table, clip=True)
    grid = grids.respaced("10")
    a, b = sample(clipped, z, grid, "ddim"), sample(precondition.adm(eps), z, grid, clip=True)
    np.testing.assert_allclose(a, sample(precondition.adm(eps), z, grid, "ddim", clip=True))
    assert a.shape == b.shape
    x0_hat, noise = clipped.with_noise(x, jnp.full(4, 2.0))
    np.testing.assert_allclose(x0_hat + 2 * noise, x, atol=1e-5)


def test_the_place_of_the_clamp_among_transforms():
    """What classifier-free guidance gives is clamped; what a discriminator adds is not (arXiv
    2105.05233 algorithm 1: after the clamp).
    """
    base = lambda x, sigma, label=None: column(0.8 * (label + 1.0), x) * jnp.ones_like(x)
    z = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
    settings = {"label": jnp.asarray([0, 0]), "clip": True, "solver": "euler"}
    run = lambda *guidance: sample(base, z, np.array([1.0, 0.0]), guidance=guidance, **settings)
    for inner in (cfg.guidance(3.0), apg.guidance(3.0, eta=1.0, momentum=-0.5)):
        np.testing.assert_allclose(run(inner), 1.0)  # 2.4 before
    weak = autoguidance.guidance(lambda x, sigma, label: jnp.zeros_like(x), 3.0)
    np.testing.assert_allclose(run(weak), 1.0)
    pull = dg.guidance(lambda x, sigma, label: 0.5 * jnp.sum(x, (1, 2, 3)))
    np.testing.assert_allclose(run(cfg.guidance(3.0), pull), 1.5, rtol=1e-6)
