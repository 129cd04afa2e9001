"""Properties P1-P19 of OGDM (spec 8.1) that concern its pure functions, and the golden tables of
spec 9.1, 9.2, 9.4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ogdm_jax.diffusion import grids, jumps, noise
from ogdm_jax.diffusion.denoiser import as_denoiser
from ogdm_jax.diffusion.process import Discrete
from ogdm_jax.methods import contract as slots
from ogdm_jax.methods import ogdm
from ogdm_jax.networks.discriminator import StyleGAN2Discriminator
from ogdm_jax.sampling.sampler import sample
from tests.support.discriminators import drawn
from tests.support.oracles import Gaussian

SHAPE = (8, 8, 3)
TINY = {"channel_base": 64, "channel_max": 8}


# Programs that run once: most of their time would be XLA's optimiser.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def linear(theta):
    """A denoiser with one parameter: the exact one of N(0, 1/4) at theta = 0."""
    return as_denoiser(lambda x, sigma, label=None: Gaussian().denoise(x, sigma) * (1 + theta))


def same(denoise):
    """What the step gives a method, for a denoiser without dropout and augmentation."""
    return lambda purpose, augment=True: denoise


def images(seed, batch=4, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal((batch, *shape)).astype(np.float32)


def wide(v):
    return v[:, None, None, None]


# -- which level (P9, P10, tables 9.1)
# ------------------------------------------------------------------------------

LEVELS = [0.002, 0.01, 0.1, 0.5, 1, 5, 20, 80]


@pytest.mark.fast
@pytest.mark.parametrize("x64,rtol", [(False, 1e-5), (True, 1e-7)])
def test_table_of_levels(x64, rtol):
    with jax.enable_x64(x64):
        sigma = jnp.asarray(LEVELS)
        tau = [1, 0.927060, 0.788747, 0.661198, 0.596561, 0.419333, 0.230360, 0]
        np.testing.assert_allclose(jumps.tau(sigma), tau, atol=2e-6)
        times = jnp.asarray([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
        back = [80, 45.313721, 17.527830, 2.515219, 0.16975267, 0.016720751, 0.002]
        np.testing.assert_allclose(jumps.sigma_of_tau(times), back, rtol=2e-5)
        half = [0.002, 0.002, 0.020487059, 0.14627306, 0.33167806, 2.1110082, 9.9384804, 45.313721]
        full = [
            0.002,
            0.002,
            0.0026297574,
            0.032902878,
            0.089426644,
            0.78943044,
            4.5694790,
            24.408335,
        ]
        for u, truth in ((0.5, half), (1.0, full)):
            np.testing.assert_allclose(
                ogdm.next_sigma(sigma, jnp.full((8,), u), 0.2), truth, rtol=2e-5
            )
        np.testing.assert_allclose(
            jumps.sigma_of_tau(jumps.tau(sigma)), sigma, rtol=1e-4 if not x64 else 1e-12
        )


@pytest.mark.parametrize("k", [0.0, 0.05, 0.2, 1.0])
def test_levels_stay_in_their_range(k):
    rng = np.random.default_rng(0)
    sigma = jnp.asarray(np.exp(rng.uniform(np.log(0.002), np.log(80), 4096)), jnp.float32)
    below = ogdm.next_sigma(sigma, jnp.asarray(rng.random(4096), jnp.float32), k)
    assert jnp.all(below >= np.float32(0.002)) and jnp.all(below <= sigma)
    assert jnp.all(jumps.tau(below) <= jnp.minimum(1, jumps.tau(sigma) + k) + 1e-5)
    if k == 0:
        np.testing.assert_allclose(below, sigma, rtol=1e-5)


def test_levels_spread_as_measured_on_the_official_code():
    """Share at the floor, median and mean ratio for k = 0.2 (spec 2.2)."""
    rng = np.random.default_rng(1)
    sigma = jnp.clip(
        jnp.exp(jnp.asarray(1.2 * rng.standard_normal(200_000) - 1.2, jnp.float32)), 0.002, 80
    )
    below = ogdm.next_sigma(sigma, jnp.asarray(rng.random(200_000), jnp.float32), 0.2)
    ratio = np.asarray(below / sigma)
    np.testing.assert_allclose(np.mean(np.asarray(below) <= 0.0020001), 0.0287, atol=0.002)
    np.testing.assert_allclose([np.median(ratio), ratio.mean()], [0.27, 0.35], atol=0.01)


def test_above_one_k_counts_the_levels_of_a_grid():
    grid = np.asarray(grids.edm(8))
    sigma = jnp.asarray(grid[:-1], jnp.float32)
    unused = jnp.zeros_like(sigma)
    np.testing.assert_allclose(ogdm.next_sigma(sigma, unused, 8), grid[1:], rtol=1e-5)
    np.testing.assert_allclose(ogdm.next_sigma(1.3 * sigma, unused, 8), grid[:-1], rtol=1e-5)
    with pytest.raises(ValueError, match="k: -0.1 given"):
        ogdm.next_sigma(sigma, unused, -0.1)


def test_discrete_gaps_are_uniform_and_stay_in_the_chain():
    """s ~ U{0..min(K, t)}: range, both ends, mean; K is rounded and not truncated."""
    rng = np.random.default_rng(2)
    index = jnp.asarray(rng.integers(0, 1000, 100_000), jnp.int32)
    gap = jumps.gap(index, jnp.asarray(rng.random(100_000), jnp.float32), 0.1)
    assert jnp.all((gap >= 0) & (gap <= jnp.minimum(100, index)))
    assert gap.max() == 100 and gap.min() == 0 and (index - gap).min() == 0
    np.testing.assert_allclose(gap.mean(), 100 / 2 - 100**2 / 4000, atol=0.5)
    np.testing.assert_allclose(
        np.mean(np.asarray(index == gap)), np.sum(1 / np.arange(1, 102)) / 1000, atol=7e-4
    )
    top = jnp.full((1,), 999)
    almost = jnp.asarray([np.nextafter(np.float32(1), np.float32(0))])
    assert [int(jumps.gap(top, almost, k)[0]) for k in (0.1, 0.15, 0.2, 0.57)] == [
        100,
        150,
        200,
        570,
    ]


def test_discrete_law_finds_levels_of_its_table():
    settings = ogdm.Settings(**ogdm.PRESETS["adm"])
    table = Discrete.make("linear", 1000).sigma
    index = np.array([999, 500, 100, 1, 0])
    pair = ogdm.draw_pair(settings, jnp.asarray(table[index], jnp.float32), jnp.full((5,), 0.9999))
    np.testing.assert_array_equal(pair.index, index)
    np.testing.assert_array_equal(pair.gap, [100, 100, 100, 1, 0])
    np.testing.assert_allclose(pair.sigma_next, [table[898], table[399], 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(
        ogdm.condition(pair, settings), np.stack([pair.index, pair.gap], 1)
    )


# -- the projection (P5, P6, P7, P8, P18, tables 9.2, 9.4)
# ----------------------------------------------------------


@pytest.mark.fast
def test_table_of_projections():
    with jax.enable_x64(True):
        sigma, x = jnp.asarray([40.0, 3, 0.5, 0.05]), wide(jnp.asarray([10.0, -2, 0.7, 1.3]))
        below = ogdm.next_sigma(sigma, jnp.full((4,), 0.5), 0.2)
        np.testing.assert_allclose(
            below, [21.296772, 1.1811935, 0.14627306, 0.0084905196], rtol=1e-5
        )
        denoise = lambda x, sigma, label=None: x / (1 + wide(sigma) ** 2)
        truth = {
            "euler": [5.327113555, -0.908716084, 0.600956460, 1.297308465],
            "heun": [5.329516964, -1.046826984, 0.635256936, 1.298425615],
        }
        for solver, values in truth.items():
            end = ogdm.project(denoise, x, sigma, below, solver)
            np.testing.assert_allclose(end.reshape(-1), values, rtol=2e-6, err_msg=solver)


def test_table_of_discrete_projections():
    """ddim_step of spec 9.4 in the coordinate x / sqrt(abar), its result back in the official
    one.
    """
    with jax.enable_x64(True):
        chain = Discrete.make("linear", 1000)
        pair = jumps.index_pair(
            jnp.asarray([999, 500, 100, 7]), jnp.asarray([100, 37, 100, 0]), chain.sigma
        )
        x, x0 = wide(jnp.asarray([0.3, -1.2, 0.7, 0.1])), wide(jnp.asarray([0.5, -0.4, 0.9, -1]))
        x = x * jnp.sqrt(1 + wide(pair.sigma) ** 2)
        end = ogdm.project(None, x, pair.sigma, pair.sigma_next, "ddim", x0_hat=x0)
        end = ogdm.view(end, pair, ogdm.Settings(input_scale="vp")).reshape(-1)
        np.testing.assert_allclose(end[:3], [0.30515835, -1.20191932, 0.9], atol=1e-6)
        # The official float32 sqrt(1 - abar) at abar = .9988 is off by 2e-5 of its value.
        np.testing.assert_allclose(end[3], -0.00170285, atol=2e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_projection_is_one_step_of_the_sampler(solver):
    """The sampler's last step goes to 0, so the projection is compared with its trajectory's first
    state.
    """
    latents, sigmas = images(3), np.array([3.0, 0.4, 0.0], np.float32)
    denoise = lambda x, sigma, label=None, **_: jnp.tanh(x / (1 + wide(sigma)))
    _, path = sample(denoise, latents, sigmas, solver=solver, trajectory=True)
    pair = (jnp.full((4,), s) for s in sigmas[:2])
    end = ogdm.project(denoise, 3.0 * latents, *pair, solver)
    states = jax.tree.leaves(path)[0]
    assert min(np.abs(end - state).max() for state in states) < 1e-5


def test_discrete_projection_is_variance_preserving_ddim():
    """VP-DDIM's formula (2010.02502, eq. 12 with eta 0) against Euler in x / sqrt(abar),
    float64.
    """
    with jax.enable_x64(True):
        bar = Discrete.make("cosine", 1000).alpha_bar
        t, s = np.array([900, 500, 30, 3]), np.array([850, 499, 5, 0])
        a, b = wide(jnp.asarray(bar[t])), wide(jnp.asarray(bar[s]))
        x, eps = jnp.asarray(images(4), jnp.float64), lambda x: jnp.tanh(1.3 * x)
        x0 = (x - jnp.sqrt(1 - a) * eps(x)) / jnp.sqrt(a)
        truth = jnp.sqrt(b) * x0 + jnp.sqrt(1 - b) * eps(x)
        level = lambda v: jnp.sqrt(1 / v - 1)[:, 0, 0, 0]
        denoise = lambda y, sigma, label=None: y - wide(sigma) * eps(y * jnp.sqrt(a))
        for solver in ("euler", "ddim"):
            end = ogdm.project(denoise, x / jnp.sqrt(a), level(a), level(b), solver) * jnp.sqrt(b)
            np.testing.assert_allclose(end, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
def test_zero_step_and_perfect_denoiser(solver):
    """sigma_s = sigma_t: x_t stays, no gradient. D = the clean image: fake = real."""
    x0, eps, sigma = images(5), images(6), jnp.asarray([0.01, 0.5, 3, 40])
    xt = x0 + wide(sigma) * eps
    end, slope = jax.jvp(
        lambda t: ogdm.project(linear(t), xt, sigma, sigma, solver), (0.0,), (1.0,)
    )
    np.testing.assert_array_equal(end, xt)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    for share in (0.0, 0.3, 1.0):
        end = ogdm.project(lambda x, sigma, label=None: x0, xt, sigma, share * sigma, solver)
        np.testing.assert_allclose(end, x0 + wide(share * sigma) * eps, rtol=1e-4, atol=1e-5)


def test_heun_at_the_floor_is_euler_with_finite_gradients():
    sigma = jnp.asarray([0.5, 0.003, 0.002, 0.01])
    below = jnp.asarray([0.0, 0.002, 0.002, 0.0021])
    xt = images(7)
    euler, heun = (
        lambda t, s=s: ogdm.project(linear(t), xt, sigma, below, s) for s in ("euler", "heun")
    )
    np.testing.assert_array_equal(heun(0.1)[:3], euler(0.1)[:3])
    assert np.abs(heun(0.1)[3] - euler(0.1)[3]).max() > 1e-5
    gradient = jax.grad(lambda t: jnp.sum(heun(t) ** 2))(0.1)
    through_x = jax.grad(
        lambda x: jnp.sum(ogdm.project(linear(0.1), x, sigma, below, "heun") ** 2)
    )(xt)
    assert np.isfinite(gradient) and np.isfinite(through_x).all()


def test_projection_uses_a_known_output_instead_of_a_call():
    calls = []

    def denoise(x, sigma, label=None):
        calls.append(sigma)
        return x

    sigma = jnp.full((4,), 2.0)
    for solver, known, expected in (
        ("euler", True, 0),
        ("euler", False, 1),
        ("heun", True, 1),
        ("heun", False, 2),
    ):
        calls.clear()
        ogdm.project(
            denoise, images(0), sigma, 0.5 * sigma, solver, x0_hat=images(1) if known else None
        )
        assert len(calls) == expected
    with pytest.raises(ValueError, match="unknown 'rk4'; expected one of euler, heun, ddim"):
        ogdm.project(denoise, images(0), sigma, sigma, "rk4")


# -- losses (P7, P11, P12, P13, P19)
# --------------------------------------------------------------------------------


@pytest.mark.fast
def test_losses_are_their_formulas_and_come_in_pairs():
    real, fake = jnp.asarray([2.0, 0.5, -1.0]), jnp.asarray([-3.0, 0.0, 2.0])
    np.testing.assert_allclose(ogdm.discriminator_loss(real, fake, "hinge"), [0, 1.5, 5])
    np.testing.assert_allclose(ogdm.generator_loss(fake), [3, 0, -2])
    softplus = lambda z: np.log1p(np.exp(z))
    np.testing.assert_allclose(
        ogdm.generator_loss(fake, "logistic"), softplus(-np.asarray(fake)), rtol=1e-6
    )
    truth = softplus(-np.asarray(real)) + softplus(np.asarray(fake))
    np.testing.assert_allclose(ogdm.discriminator_loss(real, fake, "logistic"), truth, rtol=1e-6)
    # Equilibrium (z = 0), equal logits, and the saturation of the hinge.
    zero = jnp.zeros((1,))
    np.testing.assert_allclose(ogdm.discriminator_loss(zero, zero, "hinge"), 2)
    np.testing.assert_allclose(
        ogdm.discriminator_loss(zero, zero, "logistic"), 2 * np.log(2), rtol=1e-6
    )
    assert jnp.all(ogdm.discriminator_loss(3 * real, 3 * real, "hinge") >= 2)
    slopes = jax.grad(lambda z: ogdm.discriminator_loss(z, -z, "hinge").sum())(
        jnp.asarray([1.5, 0.5])
    )
    np.testing.assert_array_equal(slopes, [0, -2])
    for function in (ogdm.generator_loss, lambda z, kind: ogdm.discriminator_loss(z, z, kind)):
        with pytest.raises(
            ValueError, match="unknown 'wasserstein'; expected one of hinge, logistic"
        ):
            function(real, "wasserstein")


@pytest.mark.parametrize(
    "c,t,r,v_real,v_fake,best,fooling",
    [
        (0.5, 1, 0.5, 0.5, 0.45, 0.2, 0.264911),
        (0.5, 3, 0.3, 1.06, 0.940811, 0.027027, 0.055026),
        (0.5, 0.3, 0.5, 0.2725, 0.255956, 0.735294, 0.790498),
    ],
)
def test_optimal_discriminator_on_gaussian_data(c, t, r, v_real, v_fake, best, fooling):
    """Projection with D = a x: variance as in closed form; the logistic loss is stationary at log
    p_real / p_fake.
    """
    with jax.enable_x64(True):
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        nodes, weights = wide(jnp.asarray(nodes)), jnp.asarray(weights / weights.sum())
        sigma, below = jnp.full((80,), t * 1.0), jnp.full((80,), r * t)

        def fake_variance(a):
            xt = np.sqrt(c**2 + t**2) * nodes
            fake = ogdm.project(lambda x, sigma, label=None: a * x, xt, sigma, below)
            return jnp.sum(weights * fake[:, 0, 0, 0] ** 2)

        np.testing.assert_allclose(c**2 + (r * t) ** 2, v_real, rtol=1e-6)
        np.testing.assert_allclose(c**2 / (c**2 + t**2), best, rtol=1e-4)
        np.testing.assert_allclose(fake_variance(best), v_fake, rtol=1e-4)
        np.testing.assert_allclose(fake_variance(fooling), v_real, rtol=1e-4)

        # D(x) = p + q x^2; expectations by quadrature. Zero gradient at the closed form says that
        # it is the optimum.
        def loss(d, kind="logistic"):
            logit = lambda v: (d[0] + d[1] * v * nodes**2)[:, 0, 0, 0]
            return jnp.sum(weights * ogdm.discriminator_loss(logit(v_real), logit(v_f), kind))

        v_f = fake_variance(best)
        star = jnp.asarray([0.5 * jnp.log(v_f / v_real), 0.5 * (1 / v_f - 1 / v_real)])
        np.testing.assert_allclose(jax.grad(loss)(star), 0, atol=1e-6)
        assert loss(star) < 2 * np.log(2)


def test_r1_is_the_squared_gradient():
    """|w|^2 for D = w.x; 0 where D ignores x; nonnegative, with finite second derivatives."""
    w, x = images(8)[0], jnp.asarray(images(9))
    linear_in_x = lambda x: jnp.einsum("bhwc,hwc->b", x, w)
    np.testing.assert_allclose(ogdm.r1_penalty(linear_in_x, x), np.full(4, np.sum(w**2)), rtol=1e-5)
    np.testing.assert_array_equal(ogdm.r1_penalty(lambda x: jnp.ones((4,)) * x.shape[0], x), 0)
    network = StyleGAN2Discriminator(img_resolution=8, img_channels=3, **TINY)
    cond = jnp.asarray([[1.0, 0.5]] * 4)
    penalty = lambda p: jnp.sum(ogdm.r1_penalty(lambda x: network.apply({"params": p}, x, cond), x))
    value, slopes = quick_jit(jax.value_and_grad(penalty))(born())
    assert value > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_r1_of_the_sum_sees_other_examples():
    """D that mixes the batch: the gradient is of sum_b D_b, with cross terms (as with minibatch
    statistics).
    """
    mix = lambda x: jnp.full((2,), jnp.sum(x))  # noqa: E731  d(sum)/dx = 2 everywhere
    np.testing.assert_allclose(ogdm.r1_penalty(mix, jnp.ones((2, 2, 2, 1))), [16, 16])


# -- the slots (P1, P2, P3, P4, P13 and the switches)
# ---------------------------------------------------------------


def context(**changes):
    """What the step would tell the method; the denoiser is linear(theta)."""
    base = slots.Context(
        image_shape=SHAPE,
        label_dim=0,
        batch=4,
        device_batch=4,
        devices=1,
        axis=None,
        sigma_data=0.5,
        sigma_min=0.002,
        sigma_max=80.0,
        noise=noise.edm(),
        denoiser=lambda params, buffers: linear(params),
        learning_rate=1e-3,
        steps=100,
        source=None,
        weights=None,
    )
    return dataclasses.replace(base, **changes)


def example(seed=10, label=None):
    x0, eps = jnp.asarray(images(seed)), jnp.asarray(images(seed + 1))
    sigma, key = jnp.asarray([0.05, 0.3, 1.0, 4.0]), jax.random.key(seed)
    return slots.Example(
        x0=x0,
        image=x0,
        label=label,
        augment=None,
        sigma=sigma,
        eps=eps,
        xt=x0 + wide(sigma) * eps,
        index=jnp.arange(4),
        key=key,
        noise_key=key,
    )


@functools.cache
def born():
    """Discriminator parameters as at birth, but with biases; an initialiser would take long to
    compile.
    """
    return drawn(StyleGAN2Discriminator(img_resolution=8, img_channels=3, **TINY))[0]["params"]


def players_of(**settings):
    """Both sides of the game at tiny sizes, as `ogdm.training` makes them."""
    settings = ogdm.Settings(**TINY | settings)
    return ogdm.Players(settings, context(), ogdm.discriminator(settings, context()))


def owned(phi):
    """What the step hands the penalty, of a discriminator's parameters."""
    return slots.Own(carry={"params": phi})


def play(**settings):
    """(discriminator params, G penalty of theta and phi, D loss of phi and theta)."""
    players, e = players_of(**settings), example()

    def generator(theta, phi):
        denoise = linear(theta)
        return jnp.mean(players.penalty(e, denoise(e.xt, e.sigma), same(denoise), owned(phi))[0])

    def opponent(phi, theta):
        return jnp.mean(players.loss(phi, e, same(linear(theta)), jnp.int32(1))[0])

    both = (quick_jit(jax.value_and_grad(f, argnums=(0, 1))) for f in (generator, opponent))
    return born(), *both


def is_zero(tree):
    return all(not np.any(leaf) for leaf in jax.tree.leaves(tree))


@pytest.mark.slow_cases("heun")
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_each_player_moves_only_itself(solver):
    params, generator, opponent = play(solver=solver)
    _, (theta, phi) = generator(0.1, params)
    assert theta != 0 and is_zero(phi)
    _, (phi, theta) = opponent(params, 0.1)
    assert not is_zero(phi) and is_zero(theta)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_discriminator_judges_real_and_fake_of_the_same_lower_level(solver):
    """Real is x0 + sigma_s eps, not sigma_t: made here by hand, from the pair's own draw."""
    players, e = players_of(solver=solver, input_scale="unit"), example()
    settings, denoise = players.settings, linear(0.1)
    network = StyleGAN2Discriminator(img_resolution=8, img_channels=3, mbstd_batch=4, **TINY)

    def both(phi):
        below = ogdm.next_sigma(e.sigma, jax.vmap(jax.random.uniform)(e.keys("ogdm/gap")), 0.2)
        levels = jnp.stack([e.sigma, below], 1)
        scale = wide(1 / jnp.sqrt(0.25 + below**2))
        real, fake = e.x0 + wide(below) * e.eps, ogdm.project(denoise, e.xt, e.sigma, below, solver)
        judge = lambda x: network.apply({"params": phi}, x, levels)
        losses = ogdm.discriminator_loss(judge(scale * real), judge(scale * fake))
        want = losses + settings.r1 * ogdm.r1_penalty(judge, scale * real)
        return players.loss(phi, e, same(denoise), jnp.int32(0))[0], want

    got, want = quick_jit(both)(born())
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_statistics_of_the_whole_batch_are_those_of_a_device():
    """Under a mesh the network sees the global batch: 0 must not mean all of it."""
    settings = ogdm.Settings(statistics_batch=0, **TINY)
    assert ogdm.discriminator(settings, context()).mbstd_batch == context().device_batch


def test_gradient_is_linear_in_gamma():
    slopes = [play(gamma=gamma)[1](0.1, born())[1][0] for gamma in (0.0, 0.01, 0.03)]
    assert slopes[0] == 0
    np.testing.assert_allclose(slopes[2], 3 * slopes[1], rtol=1e-5)


def test_sharing_the_denoising_output_changes_calls_and_not_numbers():
    """Without dropout and augmentation labels the shared output is the one that would be computed
    again.
    """
    (phi, shared, _), (_, apart, _) = play(share_denoise=True), play(share_denoise=False)
    np.testing.assert_allclose(shared(0.1, phi)[0], apart(0.1, phi)[0], rtol=1e-6)
    np.testing.assert_allclose(shared(0.1, phi)[1][0], apart(0.1, phi)[1][0], rtol=1e-4)


def test_a_penalty_is_gamma_pixels_generator_loss_of_the_projection():
    players, e = players_of(), example()
    network = StyleGAN2Discriminator(img_resolution=8, img_channels=3, mbstd_batch=4, **TINY)

    def both(params):
        loss, metrics = players.penalty(
            e, linear(0.0)(e.xt, e.sigma), same(linear(0.0)), owned(params)
        )
        below = ogdm.next_sigma(e.sigma, jax.vmap(jax.random.uniform)(e.keys("ogdm/gap")), 0.2)
        fake = ogdm.project(linear(0.0), e.xt, e.sigma, below)
        return (
            loss,
            metrics,
            network.apply({"params": params}, fake, jnp.stack([e.sigma, below], 1)),
        )

    loss, metrics, logits = quick_jit(both)(born())
    np.testing.assert_allclose(metrics["ogdm/generator_logit"], logits, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(loss, -0.025 * 192 * logits, rtol=1e-4, atol=1e-6)
    made = jax.eval_shape(players.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made["params"]) == jax.tree.map(jnp.shape, born())


def at(count, lead=0.0):
    """The carry of a discriminator that has had `count` updates."""
    return {"opt_state": (optax.ScaleByAdamState(jnp.int32(count), None, None),), "lead": lead}


@pytest.mark.parametrize(
    "settings,truth",
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup": "3 steps"}, [0, 0, 0, 1]),
        ({"warmup": "9 images"}, [0, 0, 0, 1]),  # of 4 a step: rounded up
        ({"adaptive": 0.5}, [0, 0, 0.4, 1]),
        ({"warmup": "2 steps", "adaptive": 0.5}, [0, 0, 0.4, 1]),
        ({"warmup": "3 steps", "adaptive": 0.1}, [0, 0, 0, 1]),
    ],
)
def test_gamma_waits_for_the_discriminator(settings, truth):
    """At n = 0..3 updates, with leads -0.3, 0, 0.2, 0.9."""
    players = players_of(**settings)
    shares = [players.share(at(n, lead)) for n, lead in enumerate((-0.3, 0.0, 0.2, 0.9))]
    np.testing.assert_allclose(shares, truth, rtol=1e-6)
    shown, e = "ogdm/gamma", example()
    penalty = lambda carry: players.penalty(  # noqa: E731
        e, linear(0.1)(e.xt, e.sigma), same(linear(0.1)), slots.Own(carry=carry)
    )
    for n, lead, share in ((0, -0.3, truth[0]), (2, 0.2, truth[2])):
        loss, metrics = quick_jit(penalty)({"params": born(), **at(n, lead)})
        whole = -0.025 * 192 * metrics["ogdm/generator_logit"]
        np.testing.assert_allclose(loss, share * whole, rtol=1e-5)
        assert (shown in metrics) == bool(settings)
        np.testing.assert_allclose(metrics.get(shown, 0.025), 0.025 * share if settings else 0.025)


def test_the_lead_is_a_running_mean_of_who_is_told_apart():
    """With signs that are given: lead_n = 1 - (1 - 1/50)^n where every real image scores higher."""
    judge = lambda x, pair: jnp.sum(x, axis=(1, 2, 3))  # noqa: E731
    pair, x = ogdm.Pair(jnp.ones(4), jnp.ones(4)), jnp.asarray(images(1))
    fake = x + wide(jnp.asarray([-1.0, 1.0, 0.0, -1.0]))
    told = ogdm.own_loss(judge, x, fake, pair, ogdm.Settings(adaptive=0.1))[1]["ogdm/lead"]
    np.testing.assert_array_equal(told, [1, -1, 0, 1])
    assert "ogdm/lead" not in ogdm.own_loss(judge, x, fake, pair, ogdm.Settings())[1]
    players = players_of(adaptive=0.1)
    carry = {"params": {"w": jnp.ones(2)}, "lead": jnp.zeros(())}
    carry["opt_state"] = players.adam.init(carry["params"])
    seen = lambda loss, params, key, noise_key: (params, {"ogdm/lead": jnp.ones(())})  # noqa: E731
    update = slots.Update(jnp.int32(0), jax.random.key(0), {}, None, seen)
    for n in range(1, 4):
        carry, _ = players.update(carry, update)
        np.testing.assert_allclose(carry["lead"], 1 - 0.98**n, rtol=1e-6)
        assert carry["opt_state"][0].count == n


@pytest.mark.fast
@pytest.mark.parametrize(
    "settings,peak,decay",
    [({}, 1e-3, 0), ({"learning_rate": 2e-3}, 2e-3, 0), ({"decay": 100}, 1e-3, 100)],
)
def test_the_discriminators_rate_is_the_denoisers_unless_given_and_falls_in_a_line(
    settings, peak, decay
):
    adam = players_of(**settings).adam  # of a constant gradient each step is the rate
    gradient = jnp.ones(())
    state = adam.init(gradient)
    for step in range(102):
        moved, state = adam.update(gradient, state)
        rate = peak * max(1 - step / decay, 0) if decay else peak
        np.testing.assert_allclose(moved, -rate, rtol=1e-4, atol=1e-9)


def test_the_discriminators_step_draws_all_anew_or_the_noise_alone():
    drawn, key = {}, jax.random.key(0)
    for resample in ("all", "noise"):
        players = players_of(resample=resample)
        carry = {"params": (w := {"w": jnp.ones(2)}), "opt_state": players.adam.init(w)}
        seen = lambda loss, params, *keys: (drawn.update({resample: keys}) or params, {})  # noqa: B023,E731
        players.update(carry, slots.Update(jnp.int32(0), key, {}, None, seen))
    (every, fresh), (kept, noise) = drawn["all"], drawn["noise"]
    assert kept == key and every == fresh == noise != key


def test_lazy_r1_keeps_its_average_and_skips_its_steps():
    judge = lambda x, pair: jnp.sum(x, axis=(1, 2, 3)) / 192**0.5  # noqa: E731  R1 = 1
    pair, x = ogdm.Pair(jnp.ones(4), jnp.ones(4)), jnp.asarray(images(1))
    run = lambda settings, step: ogdm.own_loss(judge, x, x, pair, settings, step)
    every, lazy = ogdm.Settings(r1=0.5), ogdm.Settings(r1=0.5, r1_interval=4)
    base = run(ogdm.Settings(r1=0.0), 0)[0]
    np.testing.assert_allclose(run(every, 3)[0] - base, 0.5, rtol=1e-4)
    extra = [np.mean(run(lazy, jnp.int32(i))[0] - base) for i in range(8)]
    np.testing.assert_allclose(extra, [2, 0, 0, 0] * 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["edm", "adm"])
def test_presets_train_and_name_only_known_switches(name):
    assert ogdm.PRESETS[name].items() <= ogdm.preset(name).items()
    params, generator, opponent = play(**ogdm.preset(name) | TINY)
    assert np.isfinite(generator(0.1, params)[0]) and np.isfinite(opponent(params, 0.1)[0])


def test_conditions_and_views():
    pair = ogdm.Pair(jnp.asarray([1.0, 4.0]), jnp.asarray([0.5, 0.0]))
    np.testing.assert_array_equal(ogdm.condition(pair, ogdm.Settings()), [[1, 0.5], [4, 0]])
    logs = ogdm.condition(pair, ogdm.Settings(condition="log_sigma"))
    np.testing.assert_allclose(logs, np.log([[1, 0.5], [4, 0.002]]) / 4, rtol=1e-6)
    x = jnp.ones((2, 1, 1, 1))
    seen = lambda kind: ogdm.view(x, pair, ogdm.Settings(input_scale=kind)).reshape(-1)
    np.testing.assert_array_equal(seen("none"), [1, 1])
    np.testing.assert_allclose(seen("vp"), [1 / np.sqrt(1.25), 1], rtol=1e-6)
    np.testing.assert_allclose(seen("unit"), [1 / np.sqrt(0.5), 2], rtol=1e-6)


def test_each_network_call_has_dropout_of_its_own():
    """Denoising, first and second projection call, in both players' steps: no key twice."""
    players, e = players_of(solver="heun", share_denoise=False), example()

    def keys(params):
        seen = []

        def denoiser(purpose, augment=True):
            def denoise(x, sigma, label=None):
                seen.append(jax.random.key_data(e.keys(f"dropout/{purpose}")))
                return 0.5 * x

            return as_denoiser(denoise)

        players.penalty(e, e.xt, denoiser, owned(params))
        players.loss(params, e, denoiser, 0)
        return seen

    seen = [
        tuple(np.asarray(k).ravel())
        for k in [*quick_jit(keys)(born()), jax.random.key_data(e.keys("dropout/denoise"))]
    ]
    assert len(seen) == 5 and len(set(seen)) == 5


@pytest.mark.fast
@pytest.mark.parametrize(
    "settings,changes,message",
    [
        (
            {"distribution": "vp"},
            {},
            "config.ogdm.distribution: unknown 'vp'; expected one of edm, adm",
        ),
        ({"solver": "rk4"}, {}, "config.ogdm.solver: unknown 'rk4'"),
        ({"loss": "wgan"}, {}, "config.ogdm.loss: unknown 'wgan'"),
        ({"gamma": float("inf")}, {}, "config.ogdm.gamma: inf given"),
        ({"warmup": "soon"}, {}, "config.ogdm.warmup: 'soon' is no duration"),
        ({"warmup": "8"}, {"steps": 8}, "config.ogdm.warmup: '8' given; expected less than"),
        ({"r1_interval": 0}, {}, "config.ogdm.r1_interval: 0 given"),
        (
            {"condition": "index"},
            {},
            "config.ogdm.condition: 'index' given; expected 'sigma' or 'log_sigma'",
        ),
        ({"distribution": "adm", "k": 10}, {}, "config.ogdm.k: 10.0 given; expected a fraction"),
        (
            {},
            {"image_shape": (28, 28, 1)},
            "images are 28x28; expected squares with a side 2\\^n of at least 8",
        ),
        (
            {},
            {"device_batch": 6},
            "config.ogdm.statistics_batch: 4 given; expected a divisor of the 6 images",
        ),
        ({"statistics_batch": 0}, {"device_batch": 6}, "config.ogdm.statistics_batch: 0 given"),
    ],
)
def test_bad_settings_are_one_sentence(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        ogdm.training(ogdm.Settings(**TINY | settings), context(**changes))
    with pytest.raises(
        ValueError, match="config.ogdm.preset: unknown 'vp'; expected one of edm, adm"
    ):
        ogdm.preset("vp")
