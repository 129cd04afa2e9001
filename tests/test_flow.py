"""Flow matching and v-prediction as preconditionings: a network that is exact for Gaussian data by
its own closed form gives the oracle's x0_hat, EDM's samples, and the field's own samplers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, noise, precondition, process, steps
from ogdm_jax.diffusion.process import PURE_NOISE, Discrete
from ogdm_jax.inverse import operators
from ogdm_jax.methods import cfg, dg, dps, dsg, mpgd, ogdm, sp, stf
from ogdm_jax.sampling.ablation import Design, ablation
from ogdm_jax.sampling.sampler import SOLVERS, sample
from ogdm_jax.sampling.solvers import FROM_PURE_NOISE
from tests.support.oracles import Gaussian, column

MEAN, STD = 0.3, 0.5
DATA = Gaussian(MEAN, STD)
LATENTS = jax.random.normal(jax.random.key(0), (6, 4, 4, 1))
TABLES = {
    "linear": Discrete.make("linear"),
    "cosine": Discrete.make("cosine"),
    "zero": Discrete.make("scaled_linear", zero_terminal=True),
    "few": Discrete.make("linear", 50, zero_terminal=True),
}


def velocity(z, signal, deviation, path: str):
    """E[v | z] of z = signal x0 + deviation eps: the regression of two jointly normal numbers."""
    a, b = (column(v, z) for v in (signal, deviation))
    c, d = (a, b) if path == "v" else (1.0, 1.0)  # v = c eps - d x0
    slope = (c * b - d * a * STD**2) / (a**2 * STD**2 + b**2)
    return -d * MEAN + slope * (z - a * MEAN)


def flow_network(z, t, label=None):
    return velocity(z, 1 - t, t, "flow")


def v_network(table, z, t, label=None):
    """Of the step t of a table."""
    bar = jnp.asarray(table.alpha_bar, z.dtype)[t.astype(jnp.int32)]
    return velocity(z, jnp.sqrt(bar), jnp.sqrt(1 - bar), "v")


def edm_network(x, c_noise, label=None):
    """EDM's F of the same data, from its own closed form (sigma_data is not that of the data)."""
    sigma = column(jnp.exp(4 * c_noise), x)
    root = jnp.sqrt(sigma**2 + 0.64)
    x0_hat = (STD**2 * x * root + sigma**2 * MEAN) / (STD**2 + sigma**2)
    return (x0_hat - 0.64 / root * x) * root / (0.8 * sigma)


EDM = precondition.edm(edm_network, 0.8)
DENOISERS = {
    "flow": precondition.flow(flow_network),
    "flow1000": precondition.flow(lambda z, t, y: flow_network(z, t / 1000), time_scale=1000.0),
    **{
        name: precondition.v_prediction(functools.partial(v_network, table), table)
        for name, table in TABLES.items()
    },
}


def levels_of(kind: str) -> np.ndarray:
    if kind.startswith("flow"):
        return np.array([1e-3, 0.05, 0.3, 1.0, 7.0, 80.0, 1e3, PURE_NOISE])
    return TABLES[kind].sigma[:: max(1, len(TABLES[kind].sigma) // 9)]


def at(sigma):
    """Noised images of the oracle at these levels."""
    x = jax.random.normal(jax.random.key(3), (len(sigma), 4, 4, 1))
    sigma = jnp.asarray(sigma, jnp.float32)
    return MEAN + column(jnp.sqrt(STD**2 + sigma**2), x) * x, sigma


@pytest.mark.parametrize("kind", DENOISERS)
def test_the_exact_network_is_the_oracle_at_every_level(kind):
    """x0_hat and eps_hat to 1e-5 of the images' own size; eps_hat without cancellation."""
    x, sigma = at(levels_of(kind))
    x0_hat, eps_hat = DENOISERS[kind].with_noise(x, sigma)
    np.testing.assert_allclose(x0_hat, DATA.denoise(x, sigma), atol=1e-5)
    np.testing.assert_array_equal(x0_hat, DENOISERS[kind](x, sigma))
    exact = (x - MEAN) * column(sigma / (STD**2 + sigma**2), x)
    np.testing.assert_allclose(eps_hat, exact, atol=1e-5)


@pytest.mark.parametrize("kind", ["flow", "linear", "zero"])
def test_the_weighted_error_is_that_of_the_velocity(kind):
    """weight |x0_hat - x0|^2 = |F - v|^2 for each image, in the network's own coordinates."""
    distribution = noise.logit_normal() if kind == "flow" else noise.v(TABLES[kind])
    levels = levels_of(kind)
    sigma = jnp.asarray(levels, jnp.float32)
    x0, eps = 0.5 * jax.random.normal(jax.random.key(5), (2, len(levels), 4, 4, 1))
    network = lambda z, t, label=None: jnp.sin(3 * z) + column(t, z) / 999
    make = (
        precondition.flow
        if kind == "flow"
        else functools.partial(precondition.v_prediction, betas=TABLES[kind])
    )
    x0_hat = make(network)(x0 + column(sigma, x0) * eps, sigma)
    ours = distribution.weight(sigma) * jnp.sum((x0_hat - x0) ** 2, (1, 2, 3))
    if kind == "flow":
        signal, deviation = 1 / (1 + levels), levels / (1 + levels)
        time, c, d = deviation, 1.0, 1.0
    else:
        signal, deviation = 1 / np.sqrt(1 + levels**2), levels / np.sqrt(1 + levels**2)
        time, c, d = TABLES[kind].index(sigma), signal, deviation
    wide = lambda v: np.asarray(v, np.float64).reshape(-1, 1, 1, 1) if np.ndim(v) else v
    z = wide(signal) * np.asarray(x0) + wide(deviation) * np.asarray(eps)
    v = wide(c) * np.asarray(eps) - wide(d) * np.asarray(x0)
    theirs = np.sum((np.sin(3 * z) + wide(time) / 999 - v) ** 2, (1, 2, 3))
    # float32 knows x0_hat - x0 to 6e-8, which the weight divides by a level of 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)


# plms extrapolates what each network gives, by design: eps, v or a velocity are different numbers.
ALIKE = [solver for solver in SOLVERS if solver != "plms"]


@pytest.mark.slow_cases("dopri5")
@pytest.mark.parametrize("solver", ALIKE)
def test_every_solver_draws_what_edms_preconditioning_of_the_oracle_draws(solver):
    key = jax.random.key(1)
    draw = functools.partial(sample, latents=LATENTS, solver=solver, key=key)
    flow = draw(DENOISERS["flow"], sigmas=grids.edm(8))
    # the corrector's steps of unit signal-to-noise carry rounding of the score on
    atol = 5e-3 if solver == "pc" else 5e-5
    np.testing.assert_allclose(flow, draw(EDM, sigmas=grids.edm(8)), atol=atol)
    if solver == "dopri5":  # a network of discrete levels is refused, see test_adaptive
        return
    sigmas = grids.ddim(8, TABLES["linear"], "trailing")
    np.testing.assert_allclose(
        draw(DENOISERS["linear"], sigmas=sigmas), draw(EDM, sigmas=sigmas), atol=max(atol, 2e-4)
    )


@pytest.mark.parametrize("solver", [s for s in FROM_PURE_NOISE if s in ALIKE])
def test_from_pure_noise_too(solver):
    key = jax.random.key(1)
    draw = functools.partial(sample, latents=LATENTS, solver=solver, key=key)
    for kind, sigmas in (
        ("flow", grids.flow(6, 3.0)),
        ("zero", grids.ddim(6, TABLES["zero"], "trailing")),
    ):
        assert sigmas[0] == PURE_NOISE
        np.testing.assert_allclose(
            draw(DENOISERS[kind], sigmas=sigmas), draw(EDM, sigmas=sigmas), atol=2e-5
        )


@pytest.mark.parametrize("kind", ["flow", "linear"])
def test_plms_of_any_network_nears_the_closed_form(kind):
    errors = []
    for n in (25, 50, 100):
        grid = grids.flow(n, 3.0) if kind == "flow" else grids.ddim(n, TABLES[kind], "trailing")
        top = float(grid[0])
        exact = MEAN + STD * (LATENTS * top - MEAN) / np.sqrt(STD**2 + top**2)
        errors.append(float(jnp.abs(sample(DENOISERS[kind], LATENTS, grid, "plms") - exact).max()))
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1] and errors[2] < 0.05


def euler_in_t(latents, times):
    """dz/dt = v from t = 1, in float64 and nobody's code but this."""
    z = np.asarray(latents, np.float64)
    with jax.enable_x64(True):
        for t, t_next in zip(times[:-1], times[1:]):
            v = flow_network(jnp.asarray(z), jnp.full(len(z), t))
            z = z + (t_next - t) * np.asarray(v)
    return z


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_the_flow_grid_is_the_fields_sampler(shift):
    """Euler in t and Euler in sigma hold the same x0_hat and eps_hat along a straight path."""
    times = np.linspace(1, 0, 11)
    times = shift * times / (1 + (shift - 1) * times)
    sigmas = grids.flow(10, shift)
    np.testing.assert_allclose(sigmas[1:] / (1 + sigmas[1:]), times[1:], atol=1e-15)
    for kind in ("flow", "flow1000"):
        got = sample(DENOISERS[kind], LATENTS, sigmas, "euler")
        np.testing.assert_allclose(got, euler_in_t(LATENTS, times), atol=1e-6)


def test_heun_in_t_is_the_ablation_sampler_on_the_flow_path():
    """Heun's rule differs: it averages velocities in t. Order 2 from pure noise, against the exact
    flow m + s z of Gaussian data.
    """
    times, z = np.linspace(1, 0, 9), np.asarray(LATENTS, np.float64)
    design = lambda n: Design("heun", grids.flow(n)[:-1], "flow", "flow")
    with jax.enable_x64(True):
        latents = jnp.asarray(z)
        v = lambda z, t: np.asarray(flow_network(jnp.asarray(z), jnp.full(len(z), t)))
        for t, t_next in zip(times[:-1], times[1:]):
            d, h = v(z, t), t_next - t
            z = z + h * (d if t_next == 0 else (d + v(z + h * d, t_next)) / 2)
        got = [ablation(DENOISERS["flow"], latents, n, design(n)) for n in (8, 32, 64)]
        np.testing.assert_allclose(got[0], z, atol=1e-6)
        errors = [float(jnp.abs(x - (MEAN + STD * latents)).max()) for x in got[1:]]
    assert 1.7 < np.log2(errors[0] / errors[1]) < 2.4, errors


def test_ddim_from_zero_terminal_snr_in_the_variance_preserving_coordinate():
    """z_T = latents, x0_hat = -F there, then DDIM's rule of abar alone (2305.08891), float64."""
    table, kept = TABLES["zero"], grids.ddim_timesteps(10, 1000, "trailing")[::-1]
    assert kept[0] == 999
    bar = np.append(table.alpha_bar[kept], 1.0)
    bar[0] = 0.0
    z = np.asarray(LATENTS, np.float64)
    with jax.enable_x64(True):
        for a2, a2_next in zip(bar[:-1], bar[1:]):
            a, b = np.sqrt(a2), np.sqrt(1 - a2)
            v = velocity(jnp.asarray(z), jnp.full(6, a), jnp.full(6, b), "v")
            x0, eps = a * z - b * np.asarray(v), b * z + a * np.asarray(v)
            z = np.sqrt(a2_next) * x0 + np.sqrt(1 - a2_next) * eps
    for solver in ("euler", "ddim"):
        got = sample(DENOISERS["zero"], LATENTS, grids.ddim(10, table, "trailing"), solver)
        np.testing.assert_allclose(got, z, atol=2e-6)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s not in FROM_PURE_NOISE])
def test_other_solvers_are_refused_from_pure_noise(solver):
    with pytest.raises(ValueError, match="pure noise.*euler, ddim"):
        sample(DENOISERS["flow"], LATENTS, grids.flow(8), solver)


def test_the_diffusions_variance_is_refused_from_pure_noise():
    """Its first step would leave noise of the level 2^24; those of DDPM stay near the level."""
    how = {"solver": "ancestral", "key": jax.random.key(1)}
    with pytest.raises(ValueError, match="variance='diffusion' on a grid.*pure noise"):
        sample(DENOISERS["flow"], LATENTS, grids.flow(8), variance="diffusion", **how)
    states = sample(
        DENOISERS["flow"], LATENTS, grids.flow(8), variance="large", trajectory=True, **how
    )
    assert jnp.abs(states[1].states[1]).max() < 10 * grids.flow(8)[1]


def test_errors_fall_from_pure_noise():
    """Towards the exact m + s z of Gaussian data; the second order in log sigma is worth it."""
    exact = MEAN + STD * LATENTS

    def error(solver, n):
        x = sample(DENOISERS["flow"], LATENTS, grids.flow(n), solver)
        return float(jnp.abs(x - exact).max())

    assert 1.8 < error("euler", 32) / error("euler", 64) < 2.2
    assert error("dpmpp_2m", 32) / error("dpmpp_2m", 128) > 6
    assert error("dpmpp_2m", 64) < 0.2 * error("euler", 64)


def test_zero_terminal_table():
    """2305.08891: sqrt(abar) is moved linearly; the first step stays, the last is pure noise."""
    plain, zero = Discrete.make("scaled_linear"), TABLES["zero"]
    q, moved = np.sqrt(plain.alpha_bar), np.sqrt(zero.alpha_bar)
    np.testing.assert_allclose(moved[0], q[0], rtol=1e-12)
    assert zero.sigma[-1] == PURE_NOISE and (np.diff(zero.sigma) > 0).all()
    ratio = np.diff(moved[:-1]) / np.diff(q[:-1])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


def test_distributions():
    """Logit-normal times, uniform times, uniform steps; weights in closed form."""
    keys = jax.random.split(jax.random.key(4), 20000)
    t = process.Flow().time(noise.logit_normal(0.5, 0.8).sample(keys))
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() - 0.5) < 0.02 and abs(logit.std() - 0.8) < 0.02
    t = np.sort(process.Flow().time(noise.flow().sample(keys)))
    assert np.abs(t - np.arange(20000) / 20000).max() < 0.015
    edges = noise.flow().sigma(jnp.asarray([0.0, 0.5, 1 - 6e-8, 1.0]))
    assert edges[0] == PURE_NOISE and edges[1] == 1 and edges[3] > 0
    sigma = jnp.asarray([0.1, 1.0, 9.0])
    np.testing.assert_allclose(noise.flow().weight(sigma), (1 + 1 / sigma) ** 2)
    np.testing.assert_allclose(noise.v().weight(sigma), 1 + 1 / sigma**2, rtol=1e-6)
    np.testing.assert_allclose(noise.ddpm(min_snr=5.0).weight(sigma), [5.0, 1.0, 1 / 81], rtol=1e-6)
    assert noise.v(TABLES["zero"]).weight(jnp.asarray(PURE_NOISE)) == 1
    pure = [noise.flow(), noise.v(TABLES["zero"])]
    assert all(d.reaches_pure_noise for d in pure)
    assert not any(d.reaches_pure_noise for d in (noise.vp(), noise.v(), noise.logit_normal()))


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: precondition.flow(flow_network, 0.5, 0.5), "0 <= t_min < t_max <= 1"),
        (lambda: precondition.flow(flow_network, 0.0, 1.5), "0 <= t_min < t_max <= 1"),
        (
            lambda: precondition.v_prediction(flow_network, TABLES["linear"], zero_terminal=True),
            "zero_terminal given with a table",
        ),
        (lambda: grids.flow(4, 0.0), "shift=0.0"),
        (lambda: noise.logit_normal(std=0.0), "noise.logit_normal: std 0.0"),
        (lambda: precondition.adm(flow_network, predict="flow"), "'eps', 'x0', 'v'"),
    ],
)
def test_bad_arguments_are_one_sentence(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


# -- the five methods on them: equal to EDM's route to the same oracle

MASK = np.zeros((1, 4, 4, 1), np.float32)
MASK[:, ::2] = 1
LOSS = operators.measurement_loss(operators.inpaint(MASK), 0.7 * MASK + np.zeros((6, 4, 4, 1)))


@pytest.mark.parametrize("kind", ["flow", "linear", "zero"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_ogdm_projects_alike_between_its_levels(kind, solver):
    """next_sigma's pairs, and Gaussian data's exact Euler step as the third route."""
    sigma = levels_of(kind)
    sigma = sigma[sigma <= (80 if solver == "heun" else np.inf)][:6]
    x, sigma = at(sigma)
    low = ogdm.next_sigma(sigma, jnp.linspace(0.1, 0.9, len(sigma)), 0.3)
    assert bool(jnp.all(low <= sigma)) and bool(jnp.isfinite(low).all())
    low = DENOISERS[kind].round_sigma(low) if solver == "heun" else low
    ours = ogdm.project(DENOISERS[kind], x, sigma, low, solver)
    np.testing.assert_allclose(ours, ogdm.project(EDM, x, sigma, low, solver), atol=2e-4)
    if solver == "euler":
        exact = steps.euler_update(x, DATA.denoise(x, sigma), sigma, low)
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-4)


def test_stfs_target_of_the_velocitys_loss_is_the_velocitys_mean():
    """The posterior mean over references is that of the straight path's z too: weights of
    |z - (1 - t) x0|^2 / (2 t^2), and at pure noise the mean of all.
    """
    references = STD * jax.random.normal(jax.random.key(7), (40, 4, 4, 1))
    levels = np.array([0.05, 0.4, 2.0, 50.0, PURE_NOISE])
    x = references[:5] + column(levels, references) * LATENTS[:5]
    target, _ = stf.stable_target(x, jnp.asarray(levels, jnp.float32), references)
    t = (levels / (1 + levels)).reshape(-1, 1)
    z = np.asarray(x, np.float64).reshape(5, -1) / (1 + levels.reshape(-1, 1))
    flat = np.asarray(references, np.float64).reshape(40, -1)
    away = np.square(z[:, None] - (1 - t)[:, :, None] * flat[None]).sum(-1) / (2 * t**2)
    weights = np.exp(-(away - away.min(1, keepdims=True)))
    want = weights @ flat / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(target.reshape(5, -1), want, atol=2e-4)


@pytest.mark.parametrize("kind", ["flow", "linear", "zero"])
def test_sps_loss_is_the_same(kind):
    x, sigma = at(levels_of(kind))
    features = lambda x, sigma: jnp.tanh(x * column(jax.lax.rsqrt(1 + sigma**2), x))
    loss = lambda denoise: sp.self_perceptual_loss(
        features, *x0_eps, *denoise.with_noise(x, sigma), jnp.full_like(sigma, 0.7)
    )
    eps = jax.random.normal(jax.random.key(8), x.shape)
    x0_eps = (0.5 * eps[::-1], eps)
    np.testing.assert_allclose(loss(DENOISERS[kind]), loss(EDM), rtol=1e-4, atol=1e-5)


GUIDES = {
    "cfg": cfg.guidance(1.5),
    "dg": dg.guidance(lambda x, s, label: jnp.sum(jnp.sin(x * 0.1), (1, 2, 3)) / (1 + s**2), 0.5),
    # from pure noise an exact x0_hat has no gradient: its direction would be of rounding alone
    "dsg": dsg.guidance(LOSS, 0.3, window=(0.0, 1e6)),
    "dps": dps.guidance(LOSS, 0.1),
    "mpgd": mpgd.guidance(LOSS, 0.1),
}


@pytest.mark.parametrize("method", GUIDES)
def test_guided_samples_are_the_same(method):
    solver = "euler" if method in ("cfg", "dg") else "ancestral"
    label = jnp.zeros(6, jnp.int32) if method == "cfg" else None
    draw = functools.partial(
        sample, latents=LATENTS, solver=solver, key=jax.random.key(2), guidance=GUIDES[method]
    )
    for kind, sigmas in (
        ("flow", grids.flow(6)),
        ("zero", grids.ddim(6, TABLES["zero"], "trailing")),
    ):
        ours = draw(DENOISERS[kind], sigmas=sigmas, label=label)
        np.testing.assert_allclose(ours, draw(EDM, sigmas=sigmas, label=label), atol=5e-4)
        assert np.isfinite(np.asarray(ours)).all()


def test_a_discriminator_says_nothing_beyond_its_clock():
    """DG's networks end at t = 1, sigma 152; from pure noise the correction would be 1e7 times the
    network's error.
    """
    ratio = dg.log_ratio(lambda x, t, label: x.sum((1, 2, 3)) * 1e-3)
    x, sigma = at([0.5, 80.0, float(process.VP().sigma(1.0)), 160.0, PURE_NOISE])
    gradient = jax.grad(lambda x: ratio(x, sigma).sum())(x)
    seen = np.abs(np.asarray(gradient)).max((1, 2, 3)) > 0
    assert seen.tolist() == [True, True, True, False, False]
