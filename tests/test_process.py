"""Processes: inverses, derivatives, conversions, discrete tables, and VP-DDIM as VE-Euler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import process, steps
from tests.support.oracles import Gaussian

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "clock", [process.VP(), process.VE(), process.EDM(), process.VP.between(0.02, 90.0)]
)
def test_time_inverts_sigma_and_derivative_is_the_slope(clock):
    sigma = np.geomspace(0.002, 150.0, 40)
    t = clock.time(sigma)
    np.testing.assert_allclose(clock.sigma(t), sigma, rtol=1e-11)
    h = 1e-6 * t
    np.testing.assert_allclose(
        (clock.sigma(t + h) - clock.sigma(t - h)) / (2 * h), clock.sigma_derivative(t), rtol=2e-6
    )
    with jax.enable_x64(True):
        np.testing.assert_allclose(clock.sigma(jnp.asarray(t)), sigma, rtol=1e-11)


def test_vp_numbers():
    vp = process.VP()
    np.testing.assert_allclose(vp.sigma(1.0), 152.16697, rtol=1e-7)
    np.testing.assert_allclose(vp.sigma(1e-5), 1.0005e-3, rtol=1e-4)
    np.testing.assert_allclose(vp.scale(0.3), 1 / np.sqrt(1 + vp.sigma(0.3) ** 2), rtol=1e-12)
    for sigma, t in (
        (0.1, 0.026995),
        (0.5, 0.144814),
        (1.0, 0.25896),
        (10.0, 0.676045),
        (80.0, 0.933511),
    ):
        np.testing.assert_allclose(vp.time(sigma), t, rtol=5e-5)
    refitted = process.VP.between(float(vp.sigma(1e-3)), float(vp.sigma(1.0)))
    np.testing.assert_allclose([refitted.beta_d, refitted.beta_min], [19.9, 0.1], rtol=1e-9)
    float32 = vp.time(jnp.float32(1e-3))  # the usual form of the inverse loses all digits here
    np.testing.assert_allclose(float32, vp.time(1e-3), rtol=1e-5)


def test_predictions_convert_back_and_forth():
    with jax.enable_x64(True):
        x0, eps = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 2), jnp.float64)
        sigma = jnp.asarray([0.01, 0.5, 3.0, 80.0])
        s = sigma[:, None, None, None]
        x = x0 + s * eps
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        close(process.eps_from_x0(x, x0, sigma), eps)
        close(process.x0_from_eps(x, eps, sigma), x0)
        close(process.x0_from_score(x, process.score_from_x0(x, x0, sigma), sigma), x0)
        a = 1 / jnp.sqrt(1 + s**2)
        v = a * eps - s * a * x0
        close(process.v_from_x0(x, x0, sigma), v)
        close(process.x0_from_v(x, v, sigma), x0)
        g = Gaussian(0.2, 0.6)
        close(process.score_from_x0(x, g.denoise(x, sigma), sigma), g.score(x, sigma))


def test_zero_terminal_snr_is_the_limit_of_high_noise():
    """spec/sp.md 1 and 9.9: where nothing is left of the image, x0 = -v and eps = x_vp, and nothing
    overflows.
    """
    x0, eps = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1)).astype(np.float32)
    sigma = jnp.full(3, 1e12, jnp.float32)
    x = jnp.asarray(x0 + np.float32(1e12) * eps)
    v = process.v_from_x0(x, x0, sigma)
    np.testing.assert_allclose(v, -x0, atol=1e-6)
    np.testing.assert_allclose(process.x0_from_v(x, v, sigma), x0, atol=1e-6)
    np.testing.assert_allclose(process.vp_scale(sigma)[:, None, None, None] * x, eps, atol=1e-6)
    schedule = np.append(process.betas("linear", 100)[:-1], 1.0)
    with pytest.raises(
        ValueError, match="alpha_bar is 0 at .99.; expected steps of finite noise level"
    ):
        process.Discrete.make(schedule)
    assert np.isfinite(process.Discrete.make(schedule, keep=range(99)).sigma).all()


def test_discrete_tables():
    linear, cosine = process.Discrete.make("linear"), process.Discrete.make("cosine")
    np.testing.assert_allclose(linear.alpha_bar[[500, 999]], [0.0777967, 4.0358e-5], rtol=1e-5)
    np.testing.assert_allclose(linear.sigma[[0, 999]], [0.0100005, 157.407], rtol=1e-5)
    np.testing.assert_allclose(cosine.betas[0], 4.12842e-5, rtol=1e-5)
    np.testing.assert_allclose(cosine.alpha_bar[500], 0.492285, rtol=1e-5)
    np.testing.assert_allclose(cosine.sigma[[0, 999]], [0.00642541, 20291.17], rtol=1e-5)
    np.testing.assert_allclose(linear.posterior_variance[1], 5.45319e-5, rtol=1e-5)
    np.testing.assert_allclose(cosine.sigma[::-1], process.iddpm_levels()[:-1], rtol=1e-8)
    assert cosine.posterior_variance[0] == 0
    short = process.Discrete.make("linear", keep=process.space_timesteps(1000, "ddim25"))
    assert short.timesteps[[0, 1, 24]].tolist() == [0, 40, 960]
    np.testing.assert_allclose(np.cumprod(1 - short.betas), short.alpha_bar, rtol=1e-12)
    np.testing.assert_array_equal(short.index(jnp.asarray(short.sigma, jnp.float32)), np.arange(25))


def test_respacing():
    assert process.space_timesteps(1000, "250")[[1, 2, -2, -1]].tolist() == [4, 8, 995, 999]
    assert process.space_timesteps(1000, "10,10")[[0, 1, 9, 10, 11, 19]].tolist() == [
        0,
        55,
        499,
        500,
        555,
        999,
    ]
    for spacing in ("11", "ddim11", "ddim", "0"):
        with pytest.raises(ValueError, match="spacing="):
            process.space_timesteps(10, spacing)
    with pytest.raises(ValueError, match="keep"):
        process.Discrete.make(keep=[0, 1000])


def test_iddpm_table():
    levels = process.iddpm_levels()
    assert levels.shape == (1001,) and levels[-1] == 0
    np.testing.assert_allclose(levels[[0, 500]], [20291.17, 1.01239], rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_vp_ddim_is_the_rule_in_our_coordinate(eta):
    """DDIM as published (arXiv 2010.02502 eq. 12, in x_vp) against steps.ddim on x_vp /
    sqrt(alpha_bar).
    """
    with jax.enable_x64(True):
        x_vp, noise = jax.random.normal(jax.random.key(1), (2, 4, 3, 3, 2), jnp.float64)
        bar = jnp.asarray(process.Discrete.make().alpha_bar)
        now, before = bar[jnp.asarray([999, 600, 120, 1])], bar[jnp.asarray([801, 410, 100, 0])]
        a, b = now[:, None, None, None], before[:, None, None, None]
        eps = 0.3 * x_vp + 0.1 * jnp.sin(x_vp)
        x0 = x_vp / jnp.sqrt(a) - jnp.sqrt(1 / a - 1) * eps
        std = eta * jnp.sqrt((1 - b) / (1 - a)) * jnp.sqrt(1 - a / b)
        published = jnp.sqrt(b) * x0 + jnp.sqrt(1 - b - std**2) * eps + std * noise

        sigma, sigma_next = jnp.sqrt(1 / now - 1), jnp.sqrt(1 / before - 1)
        x = x_vp / jnp.sqrt(a)
        ours = steps.ddim(lambda *_: x0, x, sigma, sigma_next, eta=eta, noise=noise) * jnp.sqrt(b)
        np.testing.assert_allclose(ours, published, rtol=1e-10, atol=1e-10)
        if eta == 0:
            euler = steps.euler(lambda *_: x0, x, sigma, sigma_next) * jnp.sqrt(b)
            np.testing.assert_allclose(euler, published, rtol=1e-10, atol=1e-10)
        if eta == 1:
            ancestral = steps.ancestral(
                lambda *_: x0, x, sigma, sigma_next, noise=noise
            ) * jnp.sqrt(b)
            np.testing.assert_allclose(ancestral, published, rtol=1e-10, atol=1e-10)


def test_ddpm_variances():
    """posterior_std against the tables of the discrete process, for fixed and learned variances."""
    table = process.Discrete.make("linear", keep=process.space_timesteps(1000, "50"))
    with jax.enable_x64(True):
        sigma, sigma_next = jnp.asarray(table.sigma[1:]), jnp.asarray(table.sigma[:-1])
        scale = np.sqrt(table.alpha_bar[:-1])  # back to x_vp of the next step
        small, large = table.posterior_variance[1:], table.betas[1:]
        check = lambda v, want: np.testing.assert_allclose(
            steps.posterior_std(sigma, sigma_next, v) * scale, np.sqrt(want), rtol=1e-9
        )
        check("small", small)
        check("large", large)
        check(0.3, np.exp(0.3 * np.log(large) + 0.7 * np.log(small)))
        per_pixel = jnp.linspace(0, 1, 49 * 4).reshape(49, 2, 2, 1)
        both = [np.log(v)[:, None, None, None] for v in (large, small)]
        want = np.exp(0.5 * (per_pixel * both[0] + (1 - per_pixel) * both[1]))
        std = steps.posterior_std(sigma, sigma_next, per_pixel) * scale[:, None, None, None]
        np.testing.assert_allclose(std, want, rtol=1e-9)
    for variance in ("small", "large", "diffusion", 0.5):
        assert steps.posterior_std(jnp.ones(1), jnp.zeros(1), variance)[0] == 0
    with pytest.raises(ValueError, match="variance='medium'; expected small, large, diffusion"):
        steps.posterior_std(jnp.ones(1), jnp.zeros(1), "medium")


def test_stable_diffusions_ddim_levels():
    """spec/dsg.md G5: linear in sqrt(beta), 100 steps from index 1, the last of them to index 0."""
    table = process.Discrete.make(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    kept = np.arange(100) * 10 + 1
    before = np.append(0, kept[:-1])
    with jax.enable_x64(True):
        _, std = steps.split_sigma(jnp.asarray(table.sigma[kept]), jnp.asarray(table.sigma[before]))
    std = np.asarray(std) * np.sqrt(table.alpha_bar[before])  # in x_vp
    np.testing.assert_allclose(std[[0, 69]], [0.02064832, 0.26171692], rtol=1e-6)
