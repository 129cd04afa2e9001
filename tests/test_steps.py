"""One-step rules: golden numbers, finite values and gradients at sigma 0, orders, what they
reject.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import steps
from ogdm_jax.diffusion.denoiser import Denoiser, as_denoiser
from tests.support.oracles import Gaussian, column

pytestmark = pytest.mark.fast

SIGMA = np.array([40, 3, 0.5, 0.05])
NEXT = np.array([21.296772, 1.1811935, 0.14627306, 0.0084905196])
X = np.array([10, -2, 0.7, 1.3]).reshape(4, 1, 1, 1)


def denoise(x, sigma, label=None, gain=1.0):
    return gain * x / (1 + column(sigma, x) ** 2)


def test_projection_goldens():
    """OGDM's edm_step, k = 0.2, U = 0.5."""
    with jax.enable_x64(True):
        x, sigma, sigma_next = jnp.asarray(X), jnp.asarray(SIGMA), jnp.asarray(NEXT)
        euler = steps.euler(denoise, x, sigma, sigma_next)
        np.testing.assert_allclose(
            euler.ravel(), [5.327113555, -0.908716084, 0.600956460, 1.297308465], atol=2e-7
        )
        heun = steps.heun(denoise, x, sigma, sigma_next, floor=0.002)
        np.testing.assert_allclose(
            heun.ravel(), [5.329516964, -1.046826984, 0.635256936, 1.298425615], atol=2e-7
        )


RULES = {
    "euler": lambda d, x, s, t: steps.euler(d, x, s, t),
    "heun": lambda d, x, s, t: steps.heun(d, x, s, t),
    "ddim": lambda d, x, s, t: steps.ddim(d, x, s, t, eta=1.0, noise=jnp.ones_like(x)),
    "ancestral": lambda d, x, s, t: steps.ancestral(d, x, s, t, noise=jnp.ones_like(x)),
    "ancestral_learned": lambda d, x, s, t: steps.ancestral(
        d, x, s, t, noise=jnp.ones_like(x), variance=0.4
    ),
    "heun_moments": lambda d, x, s, t: steps.heun_moments(d, x, d(x, s), s, t)[0],
    "dpmpp_2m_sde": lambda d, x, s, t: steps.dpmpp_2m_moments(
        x, d(x, s), 0.9 * d(x, s), s, t, 2 * s, 1.0
    )[0],
    "dpmpp_2m": lambda d, x, s, t: steps.dpmpp_2m(x, d(x, s), 0.9 * d(x, s), s, t, 2 * s),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.default
def test_sigma_zero_is_the_denoised_image_with_a_finite_gradient(name):
    x, sigma = jnp.asarray(X, jnp.float32), jnp.asarray(SIGMA, jnp.float32)
    sigma_next = jnp.asarray([0.0, 1.0, 0.0, 0.04])

    def total(gain, x, sigma, sigma_next):
        def scaled(x, s, label=None):
            return denoise(x, s, gain=gain)

        x_next = RULES[name](scaled, x, sigma, sigma_next)
        return x_next.sum(), x_next

    grads, x_next = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(1.0, x, sigma, sigma_next)
    assert all(bool(jnp.isfinite(g).all()) for g in grads), grads
    d = denoise(x, sigma)
    np.testing.assert_allclose(x_next[::2], d[::2], rtol=1e-6)


def test_floor_keeps_euler():
    x, sigma = jnp.asarray(X, jnp.float32), jnp.asarray(SIGMA, jnp.float32)
    sigma_next = jnp.asarray([21.0, 0.002, 0.001, 0.002])
    heun = steps.heun(denoise, x, sigma, sigma_next, floor=0.002)
    euler = steps.euler(denoise, x, sigma, sigma_next)
    assert heun[0] != euler[0]
    np.testing.assert_array_equal(heun[1:], euler[1:])


def test_shared_evaluation_and_corrector():
    """x0_hat saves the first evaluation; the corrector makes the second one."""
    calls = []

    def counted(tag):
        return lambda x, sigma, label=None: calls.append((label, tag)) or denoise(x, sigma)

    x, sigma, sigma_next = (jnp.asarray(v, jnp.float32) for v in (X, SIGMA, NEXT))
    plain = steps.heun(counted("a"), x, sigma, sigma_next, label=7)
    assert calls == [(7, "a"), (7, "a")]
    calls.clear()
    shared = steps.heun(counted("a"), x, sigma, sigma_next, label=7, x0_hat=denoise(x, sigma))
    assert calls == [(7, "a")]
    np.testing.assert_array_equal(plain, shared)
    calls.clear()
    two = Denoiser(counted("a"), corrector=as_denoiser(counted("b")))
    np.testing.assert_array_equal(steps.heun(two, x, sigma, sigma_next), plain)
    assert calls == [(None, "a"), (None, "b")]


def test_zero_step_and_perfect_denoiser():
    x, sigma = jnp.asarray(X, jnp.float32), jnp.asarray(SIGMA, jnp.float32)
    for rule in (steps.euler, steps.heun, steps.ddim):
        np.testing.assert_allclose(rule(denoise, x, sigma, sigma), x, rtol=1e-6)
        y, eps = 0.3 * jnp.ones_like(x), jnp.full_like(x, -0.7)
        xt = y + column(sigma, x) * eps
        sigma_next = jnp.asarray(NEXT, jnp.float32)
        x_next = rule(lambda x, s, label=None, y=y: y, xt, sigma, sigma_next)
        np.testing.assert_allclose(x_next, y + column(sigma_next, x) * eps, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_down_and_up_conserve_variance(eta):
    down, std = steps.split_sigma(jnp.asarray(SIGMA), jnp.asarray(NEXT), eta)
    np.testing.assert_allclose(down**2 + std**2, NEXT**2, rtol=1e-5)
    if eta == 1:
        np.testing.assert_allclose(down, NEXT**2 / SIGMA, rtol=1e-4)


def test_heun_moments_carry_the_marginal():
    """Heun down, noise up: the Gaussian marginal of sigma becomes that of sigma_next to third order
    of the step.
    """
    g = Gaussian(0.0, 0.5)
    with jax.enable_x64(True):
        x, sigma = jnp.ones((1, 1, 1, 1), jnp.float64), jnp.asarray([1.0])
        errors = []
        for ratio in (0.9, 0.95):
            sigma_next = ratio * sigma
            mean, std = steps.heun_moments(
                g.denoise, x, g.denoise(x, sigma), sigma, sigma_next, eta=1.0
            )
            variance = float(mean[0, 0, 0, 0] ** 2 * (0.25 + sigma[0] ** 2) + std[0] ** 2)
            errors.append(abs(variance - float(0.25 + sigma_next[0] ** 2)))
    assert errors[1] < errors[0] / 6


def test_bad_input():
    x, s = jnp.ones((1, 1, 1, 1)), jnp.ones(1)
    with pytest.raises(ValueError, match="eta=0.5 draws noise"):
        steps.ddim(denoise, x, s, s, eta=0.5)
    with pytest.raises(ValueError, match="5 slopes; expected 1 to 4"):
        steps.pndm(x, [x] * 5, s, s)
