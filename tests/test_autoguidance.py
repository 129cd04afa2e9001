"""Autoguidance on Gaussians, where the guided density is Gaussian again."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.config import ConfigError
from ogdm_jax.diffusion import grids
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.latents import Latents
from ogdm_jax.methods import autoguidance, cfg, dsg
from ogdm_jax.sampling.sampler import sample
from tests.support.oracles import Gaussian

pytestmark = pytest.mark.fast

MAIN, WEAK = Gaussian(0.2, 0.5), Gaussian(-0.1, 0.5)
GRID = grids.edm(60)
Z = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))


def run(guidance, solver="unipc", main=MAIN.denoise, **more):
    how = {"key": jax.random.key(1), "guidance": guidance, **more}
    return jax.jit(lambda z: sample(main, z, GRID, solver, **how))(Z)


@pytest.mark.parametrize("solver", ["heun", "unipc", "dpmpp_2m"])
@pytest.mark.default
def test_the_mean_moves_by_w_times_the_difference(solver):
    """Equal spreads: D_w is the denoiser of mean weak + w (main - weak), with every solver."""
    x = run(autoguidance.guidance(WEAK.denoise, 2.0), solver)
    want = run((), solver, Gaussian(0.5, 0.5).denoise)
    np.testing.assert_allclose(x, want, atol=1e-4)
    np.testing.assert_allclose(run(autoguidance.guidance(WEAK.denoise, 1.0)), run(()), atol=1e-5)


def test_weights_are_arguments_and_the_window_is_a_branch():
    calls = []

    def weak(params):
        def denoise(x, sigma, label=None):
            jax.debug.callback(lambda s: calls.append(float(s)), sigma[0])
            return Gaussian(0.0, 0.5).denoise(x - params, sigma) + params

        return denoise

    guidance = autoguidance.guidance(weak, 2.0, (0.1, 5.0), params=jnp.float32(-0.1))
    x = run(guidance, "euler")
    jax.effects_barrier()
    levels = GRID[:-1]
    inside = levels[(levels >= 0.1) & (levels <= 5.0)]
    np.testing.assert_allclose(sorted(calls), sorted(inside), rtol=1e-5)
    assert np.abs(x - run((), "euler")).max() > 0.05
    assert np.abs(x - run(autoguidance.guidance(WEAK.denoise, 2.0), "euler")).max() > 0.01
    s = jnp.array([0.05, 0.2, 2.0, 8.0])  # each example's own level
    both = [g(Z, s) for g in (autoguidance.guide(MAIN.denoise, WEAK.denoise, 2.0), MAIN.denoise)]
    want = jnp.concatenate([both[1][:1], both[0][1:3], both[1][3:]])
    got = autoguidance.guide(MAIN.denoise, WEAK.denoise, 2.0, (0.1, 5.0))(Z, s)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_variance_corrector_and_classes():
    """What a denoiser brings is kept: learned variance, second evaluation; cfg acts inside."""
    learned = Denoiser(
        MAIN.denoise,
        variance=lambda x, s, label: (MAIN.denoise(x, s), jnp.full_like(x, 0.3)),
        corrector=Denoiser(Gaussian(0.3, 0.5).denoise),
    )
    guided = autoguidance.guide(learned, WEAK.denoise, 2.0)
    s = jnp.full(4, 0.7)
    want = 2 * MAIN.denoise(Z, s) - WEAK.denoise(Z, s)
    for got in (guided(Z, s), guided.variance(Z, s, None)[0]):
        np.testing.assert_allclose(got, want, atol=1e-6)
    second = 2 * Gaussian(0.3, 0.5).denoise(Z, s) - WEAK.denoise(Z, s)
    np.testing.assert_allclose(guided.corrector(Z, s), second, atol=1e-6)

    def classes(x, sigma, label=None):
        mean = 0.2 * jnp.maximum(label, 0)[:, None, None, None].astype(x.dtype)
        return Gaussian(0.0, 0.5).denoise(x - mean, sigma) + mean

    both = [autoguidance.guidance(WEAK.denoise, 2.0), cfg.guidance(2.0)]
    label = jnp.ones(4, jnp.int32)
    for order in (both, both[::-1]):  # cfg's mean .4, then -.1 + 2 (.4 + .1)
        x = run(order, main=classes, label=label)
        np.testing.assert_allclose(x, run((), main=Gaussian(0.9, 0.5).denoise), atol=1e-4)


def test_it_composes_with_an_owner_of_transitions():
    loss = lambda x0: jnp.sum((x0 - 0.8) ** 2, (1, 2, 3))
    both = [autoguidance.guidance(WEAK.denoise, 2.0), dsg.guidance(loss, 0.3)]
    assert (loss(run(both, "ancestral")) < loss(run(both[0], "ancestral"))).all()


def test_what_is_refused():
    session = types.SimpleNamespace(
        model=types.SimpleNamespace(image_shape=(8, 8, 1), label_dim=0, latents=None),
        open_model=lambda *words: types.SimpleNamespace(
            model=types.SimpleNamespace(image_shape=(8, 8, 1), label_dim=3)
        ),
    )
    with pytest.raises(ConfigError, match="--autoguidance.workdir: not given"):
        autoguidance.build(autoguidance.Settings(), session)
    with pytest.raises(ConfigError, match="'weak' has label_dim 3; expected 0"):
        autoguidance.build(autoguidance.Settings(workdir="weak"), session)
    latents = types.SimpleNamespace(image_shape=(8, 8, 1), label_dim=0, latents=Latents((8, 8, 1)))
    session.open_model = lambda *words: types.SimpleNamespace(model=latents)
    with pytest.raises(ConfigError, match="'weak' was trained on other numbers .*latents in the"):
        autoguidance.build(autoguidance.Settings(workdir="weak"), session)
    session.model = types.SimpleNamespace(
        **vars(latents) | {"latents": Latents((8, 8, 1), scale=1)}
    )
    with pytest.raises(ConfigError, match="scale 1 and 0.18215"):
        autoguidance.build(autoguidance.Settings(workdir="weak"), session)
    with pytest.raises(ConfigError, match="autoguidance.window: .* expected LOW,HIGH"):
        autoguidance.guidance(WEAK.denoise, window=(5.0, 1.0))
