"""dopri5: exact flows, tolerance, counts, independence of images, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from ogdm_jax import models
from ogdm_jax.config import ConfigError
from ogdm_jax.config.groups import Sample
from ogdm_jax.diffusion import grids, precondition, process
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.methods import cfg, dg
from ogdm_jax.sampling import adaptive, generate
from ogdm_jax.sampling.guidance import Guidance, plain_step
from ogdm_jax.sampling.sampler import nfe, sample
from ogdm_jax.training.evaluate import describe_sampler, words_of
from tests.support.oracles import Gaussian, column, two_bumps

DATA = Gaussian(0.3, 0.4)
GRID = grids.edm(5)
VARIABLES = pytest.mark.parametrize("variable", adaptive.VARIABLES)


def latents(n=3, dtype=None, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, 2, 2, 1), dtype or jnp.float32)


def solver(data, **settings):
    return jax.jit(lambda z: sample(data.denoise, z, GRID, "dopri5", with_nfe=True, **settings))


@pytest.mark.slow_cases("ve")
@pytest.mark.fast
@VARIABLES
def test_a_gaussian_flows_as_its_closed_form(variable):
    """x(s) = mean + sqrt((c + s^2) / (c + S^2)) (x - mean), and the last step is x0_hat."""
    z, low = latents(), GRID[-2]
    x, count = solver(DATA, variable=variable, rtol=1e-6, atol=1e-6)(z)
    at = DATA.ode(80.0 * z, 80.0, low)
    np.testing.assert_allclose(x, DATA.denoise(at, jnp.full(3, low)), atol=5e-5)
    assert x.dtype == jnp.float32 and count.dtype == jnp.int32 and (count > 9).all()


@pytest.mark.slow_cases("angle", "vp")
@VARIABLES
def test_the_error_falls_with_the_tolerance(variable):
    """Mixture in float64 against scipy's DOP853: the error follows the tolerance over six decades."""
    data = two_bumps()
    with jax.enable_x64(True):
        z = latents(2, jnp.float64)
        ends = (80.0, float(GRID[-2]))
        slope = jax.jit(
            lambda s, x: (x - data.denoise(x.reshape(z.shape), jnp.full(2, s)).ravel()) / s
        )
        start, finest = 80 * np.asarray(z).ravel(), {"rtol": 1e-12, "atol": 1e-12}
        exact = integrate.solve_ivp(slope, ends, start, "DOP853", **finest).y[:, -1]
        truth = data.denoise(jnp.asarray(exact).reshape(z.shape), jnp.full(2, ends[1]))
        errors, counts = [], []
        for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
            x, count = solver(data, variable=variable, rtol=tolerance, atol=tolerance)(z)
            errors.append(float(jnp.abs(x - truth).max()))
            counts.append(int(count.max()))
    assert errors[-1] < 1e-8 and errors[0] < 0.1, errors
    assert all(b < 0.2 * a for a, b in zip(errors, errors[1:])), errors
    assert sorted(counts) == counts
    order = np.log(errors[2] / errors[3]) / np.log(counts[3] / counts[2])
    assert 3.5 < order < 7.5, (order, errors, counts)  # evaluations needed for an error: order 5


def test_vp_is_score_sde_s_ode_in_its_own_time():
    """An independent route: scipy's RK45 on the drift -beta / 2 (x + score), as score_sde has it."""
    vp, data, z = process.VP(), two_bumps(), latents(1)
    top, low = float(vp.sigma(1.0)), float(vp.sigma(1e-3))

    score_at = jax.jit(data.score)

    def drift(t, x):
        beta, scale, sigma = 0.1 + 19.9 * t, float(vp.scale(t)), jnp.full(1, float(vp.sigma(t)))
        score = score_at(jnp.asarray(x, jnp.float32).reshape(z.shape) / scale, sigma) / scale
        return -0.5 * beta * (x + np.asarray(score).ravel())

    start = np.asarray(z).ravel() * top * vp.scale(1.0)
    found = integrate.solve_ivp(drift, (1.0, 1e-3), start, "RK45", rtol=1e-5, atol=1e-5)
    end = jnp.asarray(found.y[:, -1].reshape(z.shape) / vp.scale(1e-3), jnp.float32)
    ends = np.array([top, low, 0.0])
    x, count = jax.jit(
        lambda z: sample(data.denoise, z, ends, "dopri5", variable="vp", with_nfe=True)
    )(z)
    np.testing.assert_allclose(x, data.denoise(end, jnp.full(1, low)), atol=2e-4)
    # Two steps more or less: the first step is chosen in another way, and float32.
    assert abs(int(count[0]) - found.nfev) <= 12


@pytest.mark.slow_cases("True")
@pytest.mark.parametrize("trajectory", [False, True])
def test_evaluations_are_counted(trajectory):
    calls, data = [], two_bumps()

    def denoise(x, sigma, label=None):
        jax.debug.callback(lambda s: calls.append(float(s[0])), sigma)
        return data.denoise(x, sigma)

    found = jax.jit(
        lambda z: sample(denoise, z, GRID, "dopri5", trajectory=trajectory, with_nfe=True)
    )(latents(1))
    jax.effects_barrier()
    read = len(GRID) - 2 if trajectory else 0  # x0_hats that only the trajectory needs
    assert len(calls) == int(found[-1][0]) + read and min(calls) > 0
    _, count = sample(data.denoise, latents(3), GRID, "heun", with_nfe=True)
    assert count.tolist() == [9, 9, 9] == [nfe("heun", 5)] * 3


@pytest.mark.fast
def test_one_trace_serves_all_ends():
    traces = []

    @jax.jit
    def images(z, sigmas):
        traces.append(None)
        return sample(DATA.denoise, z, sigmas, "dopri5")

    for i in range(3):
        images(latents(seed=i), jnp.asarray(GRID) * (1 + i))
    assert len(traces) == 1


def test_an_image_depends_on_itself_alone_and_one_that_is_nan_spoils_no_other():
    data = two_bumps()

    def denoise(x, sigma, label):
        bad = (column(label, x) == 1) & (column(sigma, x) < 1)
        return jnp.where(bad, jnp.nan, data.denoise(x, sigma))

    run = jax.jit(lambda z, label: sample(denoise, z, GRID, "dopri5", label=label, with_nfe=True))
    z = latents(4)
    x, count = run(z, jnp.asarray([0, 1, 0, 0]))
    alone, own = run(z[2:3], jnp.asarray([0]))
    np.testing.assert_allclose(x[2], alone[0], atol=1e-5)
    assert count[2] == own[0]
    assert jnp.isnan(x[1]).all() and jnp.isfinite(x[jnp.asarray([0, 2, 3])]).all()
    assert count[1] < 600  # given up soon: the others wait for it


def test_transforms_of_the_denoiser_work():
    """Classifier-free guidance, and DG with the exact ratio of two Gaussians gives the other."""
    model, z = Gaussian(-0.3, 0.5), latents(64)
    ratio = lambda x, s, label=None: DATA.log_density(x, s) - model.log_density(x, s)
    drawn = lambda denoise, **more: jax.jit(lambda z: sample(denoise, z, GRID, "dopri5", **more))(z)
    guided = drawn(model.denoise, guidance=dg.guidance(ratio))
    np.testing.assert_allclose(guided, drawn(DATA.denoise), atol=3e-4)

    def labelled(x, sigma, label):
        return jnp.where(column(label, x) >= 0, 1.0, 0.0) + 0 * x

    x = drawn(labelled, label=jnp.zeros(64, jnp.int32), guidance=cfg.guidance(2.0))
    np.testing.assert_allclose(x, 2.0, atol=1e-4)


@pytest.mark.fast
def test_a_weight_for_each_image_is_refused():
    """All images had the first one's: an image is solved by itself."""
    labelled = lambda x, sigma, label: jnp.where(column(label, x) >= 0, 1.0, 0.0) + 0 * x
    draw = functools.partial(sample, labelled, latents(3), GRID, "dopri5")
    how = {"label": jnp.zeros(3, jnp.int32)}
    with pytest.raises(ValueError, match="answers for a batch of 3, .*one weight for all images"):
        draw(guidance=cfg.guidance(jnp.asarray([1.0, 2.0, 4.0])), **how)


@pytest.mark.fast
@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"guidance": Guidance("plain", transition=plain_step)},
            "a deterministic step has no noise",
        ),
        ({"churn": 1.0}, "churn with solver 'dopri5'"),
        ({"eta": 0.5}, "eta=0.5 with solver 'dopri5'"),
        ({"rtol": 0.0}, "rtol: 0.0 given; expected"),
        ({"atol": 2.0}, "atol: 2.0 given; expected"),
        ({"solver": "heun", "rtol": 1e-3}, "expected solver 'dopri5' with it"),
        ({"variable": "t"}, "variable='t'; expected one of angle, ve, vp"),
        ({"sigmas": [1.0, 0.0]}, "expected at least 2: it integrates"),
    ],
)
def test_what_cannot_be_is_one_sentence(settings, words):
    settings = {"sigmas": GRID, "key": jax.random.key(0), "solver": "dopri5"} | settings
    with pytest.raises(ValueError, match=words.replace("(", "[(]")):
        sample(DATA.denoise, latents(), **settings)


@pytest.mark.fast
def test_discrete_networks_are_refused():
    iddpm = precondition.iddpm(lambda x, c, label=None: 0.1 * x)
    with pytest.raises(ValueError, match="discrete noise levels only"):
        sample(iddpm, latents(), GRID, "dopri5")
    with pytest.raises(ValueError, match="chooses its steps"):
        nfe("dopri5", 5)


class Toy(models.Model):
    def denoiser(self, params, buffers):
        return Denoiser(DATA.denoise)


TOY = Toy(None, None, (2, 2, 1), 0)


def test_images_of_seeds_and_their_counts():
    settings = Sample(solver="dopri5", rtol=1e-4, atol=1e-4)
    images = generate.sampler(TOY, settings, jax.devices()[:2])
    counts = []
    parts = generate.generate(images, {}, {}, np.arange(6), None, 4, counts=counts)
    assert np.concatenate(list(parts)).shape == (6, 2, 2, 1)
    assert [len(part) for part in counts] == [4, 2]
    how = describe_sampler(settings, counts)
    assert how["nfe_range"][0] <= how["nfe"] <= how["nfe_range"][1] and how["rtol"] == 1e-4
    assert f"{how['nfe']} network evaluations an image" in words_of(settings, counts)
    own = functools.partial(generate.sampler, TOY, devices=jax.devices()[:1])
    cost = {
        grid: int(
            own(dataclasses.replace(settings, grid=grid))({}, {}, np.arange(2), None, [], [])[1][0]
        )
        for grid in ("edm", "ve", "vp")
    }
    assert len(set(cost.values())) == 3, cost  # each in its own variable
    with pytest.raises(ConfigError, match="steps: 1 given; expected at least 2"):
        own(dataclasses.replace(settings, steps=1))


def test_a_variable_of_another_solver_is_refused():
    with pytest.raises(ValueError, match="variable='vp' with solver 'euler'; expected 'dopri5'"):
        sample(DATA.denoise, jnp.zeros((1, 2, 2, 1)), grids.edm(4), solver="euler", variable="vp")
