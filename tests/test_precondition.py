"""Preconditioning against the closed forms of 2206.00364: unit variances, limits, inverses, tables,
rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import models, randomness
from ogdm_jax.config import Precondition
from ogdm_jax.diffusion import noise, precondition, process

pytestmark = pytest.mark.fast

SIGMAS = jnp.asarray([0.003, 0.05, 0.5, 2.0, 20.0, 75.0])
ALL = [precondition.edm, precondition.vp, precondition.ve, precondition.iddpm]


def zero(x, c_noise, label=None):
    return jnp.zeros_like(x)


def coefficients(denoiser_of, sigma):
    """(c_skip, c_out, c_in, c_noise) [B] as a network meets them."""
    seen, ones = {}, jnp.ones((sigma.size, 1, 1, 1))

    def network(x, c_noise, label=None):
        seen.update(c_in=x.ravel(), c_noise=c_noise)
        return jnp.zeros_like(x)

    c_skip = denoiser_of(network)(ones, sigma).ravel()
    c_out = denoiser_of(lambda x, *_: ones)(0 * ones, sigma).ravel()
    return c_skip, c_out, seen["c_in"], seen["c_noise"]


def image(n: int, seed: int = 0, shape=(4, 4, 3)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, *shape))


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
def test_edm_identities(sigma_data):
    """lambda c_out^2 = 1; c_in and the target have variance 1: c_in^2 (s^2 + sd^2) = 1, c_skip =
    sd^2 c_in^2.
    """
    c_skip, c_out, c_in, c_noise = coefficients(
        lambda network: precondition.edm(network, sigma_data), SIGMAS
    )
    np.testing.assert_allclose(
        noise.edm(sigma_data=sigma_data).weight(SIGMAS) * c_out**2, 1, rtol=1e-5
    )
    np.testing.assert_allclose(c_in**2 * (SIGMAS**2 + sigma_data**2), 1, rtol=1e-5)
    np.testing.assert_allclose(
        ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * SIGMAS**2) / c_out**2, 1, rtol=1e-5
    )
    np.testing.assert_allclose(jnp.exp(4 * c_noise), SIGMAS, rtol=1e-5)


@pytest.mark.default
def test_unit_variance_inputs_and_targets():
    """Samples say the same: input and target of the network have variance 1 at every level."""
    n, sd = 4096, 0.5
    y, unit = sd * image(n, 1, (4, 4, 1)), image(n, 2, (4, 4, 1))
    for sigma in SIGMAS:
        c_skip, c_out, c_in, _ = coefficients(precondition.edm, sigma[None])
        x = y + sigma * unit
        assert abs(float(jnp.var(c_in[0] * x)) - 1) < 0.03
        assert abs(float(jnp.var((y - c_skip[0] * x) / c_out[0])) - 1) < 0.03


@pytest.mark.default
def test_initial_loss_is_one():
    """With a network that says 0, EDM's weighted loss per number is 1 for data of standard
    deviation sigma_data.
    """
    law, n = noise.edm(), 8192
    keys = randomness.example_keys(jax.random.key(0), "sigma", jnp.arange(n))
    sigma = law.sample(keys)
    y = 0.5 * image(n, 3)
    x = y + sigma[:, None, None, None] * image(n, 4)
    loss = law.weight(sigma)[:, None, None, None] * jnp.square(precondition.edm(zero)(x, sigma) - y)
    assert abs(float(loss.mean()) - 1) < 0.01


@pytest.mark.parametrize("wrap", ALL)
def test_limit_of_small_noise_is_the_identity(wrap):
    x = image(2)
    bounded = lambda x, c_noise, label=None: jnp.sin(
        jnp.stack([x.sum((1, 2, 3)) + c_noise] * 48, 1).reshape(x.shape)
    )
    np.testing.assert_allclose(wrap(bounded)(x, jnp.asarray([1e-5, 1e-6])), x, atol=5e-5)


@pytest.mark.parametrize(
    "wrap,oracle",
    [(precondition.vp, -1), (precondition.iddpm, -1), (precondition.ve, 1)],
)
def test_eps_networks_give_back_the_image(wrap, oracle):
    """A network that knows the noise: F = eps for VP and iDDPM, F = -eps for VE, gives x0_hat =
    x0.
    """
    x0, eps = image(6, 5), image(6, 6)
    x = x0 + SIGMAS[:, None, None, None] * eps
    d = wrap(lambda *_: -oracle * eps)(x, SIGMAS)
    np.testing.assert_allclose(d, x0, atol=5e-5)


def test_vp_clock():
    """c_noise = 999 t(sigma) inverts sigma(t) to float32 precision; the range is sigma(1e-5) to
    sigma(1).
    """
    t = np.geomspace(1e-5, 1, 50)
    denoise = precondition.vp(zero)
    sigma = jnp.asarray(process.VP().sigma(t), jnp.float32)
    c_noise = coefficients(precondition.vp, sigma)[3]
    np.testing.assert_allclose(c_noise, 999 * t, rtol=2e-5)
    assert denoise.sigma_min == pytest.approx(
        1.0005e-3, rel=1e-3
    ) and denoise.sigma_max == pytest.approx(152.167, rel=1e-4)


def test_iddpm_table_and_rounding():
    denoise = precondition.iddpm(zero)
    u = process.iddpm_levels()
    assert u.shape == (1001,) and u[1000] == 0 and np.all(np.diff(u) < 0)
    assert u[500] == pytest.approx(1.01239, abs=1e-5)
    assert (denoise.sigma_max, denoise.sigma_min) == (
        pytest.approx(20291.17, rel=1e-4),
        pytest.approx(0.00642, rel=1e-3),
    )
    assert float(denoise.round_sigma(1.0)) == pytest.approx(0.9998446, abs=1e-6)
    assert int(precondition.iddpm_index(1.0)) == 504
    # Every level is its own nearest, so c_noise = 999 - j there.
    some = np.arange(0, 1000, 37)
    np.testing.assert_array_equal(
        coefficients(precondition.iddpm, jnp.asarray(u[some], jnp.float32))[3], 999 - some
    )
    np.testing.assert_array_equal(
        precondition.iddpm_index(jnp.asarray(u[some].reshape(4, -1)[:, :3])).shape, (4, 3)
    )


@pytest.mark.parametrize("wrap", ALL[:3])
def test_other_levels_are_not_rounded(wrap):
    np.testing.assert_array_equal(wrap(zero).round_sigma(SIGMAS), SIGMAS)


@pytest.mark.parametrize("wrap", ALL)
def test_interface(wrap):
    """Scalars broadcast, extra channels go, features are what the network gives."""
    seen = {}

    def network(x, c_noise, label=None):
        seen.update(label=label, c_noise=c_noise)
        return jnp.concatenate([jnp.cos(x), x], axis=-1)

    taps = lambda x, c_noise, label, at: {at: (x[:, :1], c_noise, label)}
    x, label, denoise = image(3), jnp.asarray([0, 1, -1]), wrap(network, taps=taps)
    one = denoise(x, 0.7, label)
    assert seen["label"] is label and seen["c_noise"].shape == (3,)
    np.testing.assert_array_equal(one, denoise(x, jnp.full(3, 0.7), label))
    assert one.shape == x.shape and one.dtype == jnp.float32
    c_in = float(coefficients(wrap, jnp.asarray([0.7]))[2][0])
    scaled, c_noise, told = denoise.features(x, 0.7, label, at="mid")["mid"]
    np.testing.assert_allclose(scaled, c_in * x[:, :1], rtol=1e-6)
    np.testing.assert_array_equal(c_noise, seen["c_noise"])
    assert told is label
    with jax.enable_x64(True):
        assert denoise(jnp.asarray(np.asarray(x), jnp.float64), 0.7).dtype == jnp.float64


def test_errors_name_the_field():
    denoise = precondition.edm(zero)
    with pytest.raises(ValueError, match=r"sigma has shape \(2,\)"):
        denoise(image(3), jnp.ones(2))
    with pytest.raises(ValueError, match="x has shape"):
        denoise(image(3)[0], jnp.ones(3))
    with pytest.raises(ValueError, match="sigma_data 0"):
        precondition.edm(zero, 0)


@pytest.mark.default
def test_time_between_the_steps():
    """Interpolated in log sigma: the figures of spec/latent.md section 7 (those of k-diffusion's
    sigma_to_t), the steps themselves at their levels, the ends beyond them.
    """
    table = {
        "scaled_linear": "0.05 1.93 0.1 10.38 0.5 169.31 1 353.89 5 795.17 10 933.51",
        "linear": "0.05 10.95 0.1 26.41 0.5 144.15 1 258.09 5 565.35 10 673.67 80 929.62",
    }
    seen = []
    network = lambda x, t, label=None: seen.append(np.asarray(t)) or x
    for betas, text in table.items():
        numbers = np.array(text.split(), float).reshape(-1, 2)
        chain = process.Discrete.make(betas)
        for wrap in (precondition.adm, precondition.v_prediction):
            denoise = wrap(network, betas, interpolate=True)
            sigma = jnp.asarray([*numbers[:, 0], chain.sigma[0] / 2, chain.sigma[-1] * 2])
            denoise(jnp.zeros((len(sigma), 1, 1, 1)), sigma)
            np.testing.assert_allclose(seen.pop(), [*numbers[:, 1], 0, 999], atol=6e-3)
            denoise(jnp.zeros((1000, 1, 1, 1)), jnp.asarray(chain.sigma))
            np.testing.assert_allclose(seen.pop(), np.arange(1000), atol=2e-3)
            np.testing.assert_array_equal(denoise.round_sigma(sigma), sigma)
    made = models.wrap(Precondition("adm", schedule="scaled_linear", interpolate=True))(network)
    made(jnp.zeros((1, 1, 1, 1)), jnp.ones(1))
    np.testing.assert_allclose(seen.pop(), 353.89, atol=6e-3)
